"""Asymmetric GPTQ over DSConv blocks (GPTQ: arXiv 2210.17323; asymmetric targets: GPTAQ, arXiv 2504.02692).

One layer, unfolded: W is (cho, K) with K = chi kh kw, x the float network's input column, q the quantized network's.
We look for W' = CDSw (m VQK) minimising, per output channel,

    J(W') = E || (y - W' q) centred ||^2 = const - 2 C W'^T + W' H W'^T,   y = W x,  H = E[q q^T],  C = E[y q^T]

(means taken out: CDSb takes care of them; E weights every position by its importance to the network's result). A
hundred images overfit, so r ||W' - W||^2 is added to it: H gets r on its diagonal, which is GPTQ's damping, and C gets
r W. The real-valued optimum is then C H^-1; GPTQ rounds it one column at a time, each column's rounding error
being made up for by the columns still to come. Columns go block by block (the channels of one block at one tap share
an m), blocks and columns of most energy first; when a block is reached, the m is chosen that adds least to J.
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
    """Float weight (cho, chi, kh, kw) and its input moments -> the DSTensor with the least damped J found.

    Per output channel the better of least squares and of GPTQ is kept, each with the CDSw that is optimal for its
    integers: never worse than least squares on J. With `channels`, the second moment (cho, cho) of the
    output's gradients, later channels make up for the errors of earlier ones (see `fit.channels`).
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
    except torch.linalg.LinAlgError:  # constant inputs, as behind a dead layer: H is rounding noise
        return plain
    target = torch.empty_like(flat)
    target[:, order] = (damped.cross[:, order] @ factor.T) @ factor  # C H^-1
    upper, start = factor.numpy(), code.start(target.reshape(weight.shape), format)
    together = None if channels is None else damped_channels(channels)
    turns = [torch.arange(len(flat))] if together is None else parts(together)
    fitted, errors = [], torch.zeros_like(target)
    for index, rows in enumerate(turns):
        wanted = target[rows]
        if together is not None:
            decided, rest = (torch.cat(r) if r else rows[:0] for r in (turns[:index], turns[index:]))
            wanted = wanted - made_up_for(together, decided, errors, rest)[: len(rows)]
        best = _Best(wanted @ damped.hessian, damped.hessian, plain.rows(rows))
        shape = (len(rows), *weight.shape[1:])
        stored, m = code.round(wanted[:, order].numpy(), start[rows].numpy(), upper, lengths, format)
        stored = code.settled(stored[:, torch.argsort(order)].reshape(shape), format)
        best.offer(stored, _scatter(m, groups, shape, format.block_size))
        fitted.append(best.tensor())
        errors[rows] = target[rows] - fitted[-1].weight().double().flatten(1)
    return DSTensor.joined(fitted).rows(torch.argsort(torch.cat(turns)))


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U (K, K) with U^T U = H^-1: H = R R^T with R upper triangular, the Cholesky factor from the
    last column to the first, and U = R^-1. H itself is never inverted, which takes three times as long and loses
    digits. Raises LinAlgError where H is not positive definite."""
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)


def _scatter(chosen: Tensor, groups: list[Tensor], shape: tuple[int, ...], block_size: int) -> Tensor:
    """m (groups, cho) -> (cho, nblk, kh, kw)."""
    cho, chi, kh, kw = shape
    m = torch.ones(cho, block_count(chi, block_size), kh * kw, dtype=torch.float64)
    for found, group in zip(chosen, groups, strict=True):
        channel, tap = divmod(int(group[0]), kh * kw)
        m[:, channel // block_size, tap] = found
    return m.reshape(cho, -1, kh, kw)


class _Best:
    """The best integers so far, per output channel, by J with its optimal CDSw. linear (cho, K) is C."""

    def __init__(self, linear: Tensor, hessian: Tensor, plain: DSTensor) -> None:
        self.linear, self.hessian = linear, hessian
        self.format, self.stored, self.m = plain.format, plain.stored, plain.m.double()
        self.cds, self.gain = self._judge(self.stored, self.m, plain.cds_w.double())

    def _judge(self, stored: Tensor, m: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
        """Optimal CDSw = (C I^T) / (I H I^T) and how much of J it takes away, for I = m VQK."""
        vqk = self.format.values(stored).double()
        integers = (expand_blocks(m, vqk.shape[1], self.format.block_size) * vqk).flatten(1)
        cross = (self.linear * integers).sum(1)
        power = ((integers @ self.hessian) * integers).sum(1)
        cds = torch.where((cross > 0) & (power > 1e-12), cross / power.clamp_min(1e-12), fallback)
        return cds, 2 * cds * cross - cds.square() * power

    def offer(self, stored: Tensor, m: Tensor) -> None:
        """Take the output channels that are better than what is there."""
        cds, gain = self._judge(stored, m, self.cds)
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.cds = torch.where(better, cds, self.cds)
        self.stored = torch.where(better[:, None, None, None], stored, self.stored)
        self.m = torch.where(better[:, None, None, None], m, self.m)

    def tensor(self) -> DSTensor:
        """The best of all that was offered."""
        return DSTensor(self.stored, self.m.to(torch.int8), self.cds.float(), self.format)
