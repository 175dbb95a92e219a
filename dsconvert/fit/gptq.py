"""Asymmetric GPTQ over DSConv blocks (GPTQ: arXiv 2210.17323; asymmetric targets: GPTAQ, arXiv 2504.02692).

Take one layer with its input unfolded into columns:

    W  (cho, K), K = chi kh kw    the float weight
    x, q  (K,)                    the input column of the float and of the quantized network
    y = W x  (cho,)               the float network's output
    W' = CDSw (m VQK)             the quantized weight we look for

W' minimises for each output channel, with means taken out of y and q (the bias CDSb restores them),

    J(W') = E ||y - W' q||^2 = const - 2 C W'^T + W' H W'^T,    H = E[q q^T]  (K, K),    C = E[y q^T]  (cho, K)

E weights every position by its importance for the network's result. A hundred images overfit, so r ||W' - W||^2 is
added to J. This adds r to H's diagonal (GPTQ's damping) and r W to C.

1. The real-valued optimum is C H^-1.
2. GPTQ rounds it one column at a time. Each column's rounding error is compensated by the columns that follow.
3. A block of input channels at one tap shares an m, so its columns are rounded together. All m are tried there, and the
   one that adds least to J is kept. Blocks with the most input energy go first, as later ones compensate for them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.base.threads import threads_for
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor, block_count, expand_blocks
from dsconvert.fit.channels import damped as damped_channels
from dsconvert.fit.channels import made_up_for, parts
from dsconvert.fit.moments import Moments


def fit_weight_gptq(weight: Tensor, moments: Moments, format: WeightFormat, channels: Tensor | None = None) -> DSTensor:
    """Quantize a float weight with the least damped J found.

    For each output channel, the integers of least squares and of GPTQ are compared, each with its optimal CDSw, and the
    better ones are kept. So J is never worse than for least squares.

    weight: (cho, chi, kh, kw), float.
    moments: H and C of the layer, without damping.
    format: bits, block size and code of the result.
    channels: second moment (cho, cho) of the outputs' gradients. With it, later channels compensate the errors of
        earlier ones (see `fit.channels`).
    """
    with threads_for(weight.numel()):
        return _fit(weight, moments, format, channels)


def _fit(weight: Tensor, moments: Moments, format: WeightFormat, channels: Tensor | None) -> DSTensor:
    code = format.code
    plain = DSTensor.nearest(weight, format)
    flat = weight.detach().cpu().double().flatten(1)
    damped = moments.damped(flat)
    groups = code.order(weight.shape, format, damped.hessian.diagonal())
    order, lengths = torch.cat(groups), [len(g) for g in groups]
    try:
        factor = inverse_factor(damped.hessian[order][:, order])
    except torch.linalg.LinAlgError:  # constant inputs, as behind a dead layer: H holds only rounding noise
        return plain
    target = torch.empty_like(flat)
    # the real-valued optimum C H^-1, with H^-1 = U^T U
    target[:, order] = (damped.cross[:, order] @ factor.T) @ factor
    upper, start = factor.numpy(), code.start(target.reshape(weight.shape), format)
    together = None if channels is None else damped_channels(channels)
    turns = [torch.arange(len(flat))] if together is None else parts(together)
    fitted, errors = [], torch.zeros_like(target)
    # decide the channels group by group; with `channels`, each group's target compensates the errors so far
    for index, rows in enumerate(turns):
        wanted = target[rows]
        if together is not None:
            decided, rest = (torch.cat(r) if r else rows[:0] for r in (turns[:index], turns[index:]))
            wanted = wanted - made_up_for(together, decided, errors, rest)[: len(rows)]
        # offer GPTQ's integers against least squares', both judged by J
        best = _Best(wanted @ damped.hessian, damped.hessian, plain.rows(rows))
        shape = (len(rows), *weight.shape[1:])
        stored, m = code.round(wanted[:, order].numpy(), start[rows].numpy(), upper, lengths, format)
        stored = code.settled(stored[:, torch.argsort(order)].reshape(shape), format)
        best.offer(stored, _scatter(m, groups, shape, format.block_size))
        fitted.append(best.tensor())
        errors[rows] = target[rows] - fitted[-1].weight().double().flatten(1)
    return DSTensor.joined(fitted).rows(torch.argsort(torch.cat(turns)))


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U (K, K) with U^T U = H^-1.

    With H = R R^T, R upper triangular, U is R^-1. R is the Cholesky factor of H with its rows and columns reversed,
    reversed back. Inverting H itself would take three times as long and lose digits.

    Raises LinAlgError where H is not positive definite.
    """
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)


def _scatter(chosen: Tensor, groups: list[Tensor], shape: tuple[int, ...], block_size: int) -> Tensor:
    """Put m (groups, cho), in the order of rounding, into its place: (cho, nblk, kh, kw)."""
    cho, chi, kh, kw = shape
    m = torch.ones(cho, block_count(chi, block_size), kh * kw, dtype=torch.float64)
    for found, group in zip(chosen, groups, strict=True):
        channel, tap = divmod(int(group[0]), kh * kw)
        m[:, channel // block_size, tap] = found
    return m.reshape(cho, -1, kh, kw)


class _Best:
    """Keeps the best integers so far for each output channel, judged by J with their optimal CDSw.

    linear: C, (cho, K).
    hessian: H, (K, K).
    plain: the integers to begin with.
    """

    def __init__(self, linear: Tensor, hessian: Tensor, plain: DSTensor) -> None:
        self.linear, self.hessian = linear, hessian
        self.format, self.stored, self.m = plain.format, plain.stored, plain.m.double()
        self.cds, self.gain = self._judge(self.stored, self.m, plain.cds_w.double())

    def _judge(self, stored: Tensor, m: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
        """Return the optimal CDSw (cho,) of the integers I = m VQK, and by how much they reduce J.

        CDSw = (C I^T) / (I H I^T),    reduction = 2 CDSw (C I^T) - CDSw^2 (I H I^T)
        """
        vqk = self.format.values(stored).double()
        integers = (expand_blocks(m, vqk.shape[1], self.format.block_size) * vqk).flatten(1)
        cross = (self.linear * integers).sum(1)
        power = ((integers @ self.hessian) * integers).sum(1)
        cds = torch.where((cross > 0) & (power > 1e-12), cross / power.clamp_min(1e-12), fallback)
        return cds, 2 * cds * cross - cds.square() * power

    def offer(self, stored: Tensor, m: Tensor) -> None:
        """Take over the output channels whose J is lower with these integers."""
        cds, gain = self._judge(stored, m, self.cds)
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.cds = torch.where(better, cds, self.cds)
        self.stored = torch.where(better[:, None, None, None], stored, self.stored)
        self.m = torch.where(better[:, None, None, None], m, self.m)

    def tensor(self) -> DSTensor:
        """Return the best integers as a DSTensor."""
        return DSTensor(self.stored, self.m.to(torch.int8), self.cds.float(), self.format)
