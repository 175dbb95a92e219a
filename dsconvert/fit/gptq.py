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

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsconvert import workers
from dsconvert.dsconv.tensor import DSTensor, Width, block_count, expand_blocks, max_multiplier, vqk_limits
from dsconvert.dsconv.trellis import strings, values
from dsconvert.fit.channels import damped as damped_channels
from dsconvert.fit.channels import gram, made_up_for, parts
from dsconvert.fit.least_squares import fit_weight, from_blocks, relieve_pairs, to_blocks
from dsconvert.fit.seen import Seen
from dsconvert.fit.threads import batched, in_order, shared, threads_for
from dsconvert.fit.trellis import round_strings, starting
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

Floats = NDArray[np.float64]
# a target (cho, K), columns in order, and CDSw (cho,) -> VQK, or their code, (cho, K), and m (groups, cho)
Rounded = Callable[[Floats, Floats], tuple[Tensor, Tensor]]

TOGETHER = 4  # images whose positions are multiplied at once; processes share images in runs of as many, so sums agree
DAMPING = 0.1  # of the mean diagonal of H, with many images: ten times GPTQ's, as few positions matter
SURE, MOST_DAMPING = 64, 2.0  # images of which the damping is 1; of others it is SURE / images, between these two


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded inputs q and float outputs y, means taken out: hessian H = cov(q, q) (K, K),
    cross C = cov(y, q) (cho, K), and the means (K,) and (cho,) themselves, float64, K in the weight's own order
    (channel, row, column). damping: r of the module's docstring as a share of the mean diagonal of H."""

    hessian: Tensor
    cross: Tensor
    mean_q: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    mean_y: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    damping: float = DAMPING

    def damped(self, weight: Tensor) -> Moments:
        """The moments of J for the float weight (cho, K)."""
        pulled = self.cross + ridge(self.hessian, self.damping) * weight
        return replace(self, hessian=damped_hessian(self.hessian, self.damping), cross=pulled)

    def with_bias(self, weight: DSTensor) -> QConv:
        """The weight with the CDSb that makes the mean of its outputs the float network's."""
        made = (weight.weight().double().flatten(1) * self.mean_q).sum(1)
        return QConv(weight, (self.mean_y - made).float())


def damping_for(images: int) -> float:
    """The damping of moments over so many images: what few images show is partly chance, so W stays nearer."""
    return min(max(DAMPING, SURE / images), MOST_DAMPING)


def ridge(hessian: Tensor, damping: float) -> Tensor:
    """r for H (K, K)."""
    return damping * hessian.diagonal().mean().clamp_min(1e-12)


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    """H (K, K) with r on its diagonal."""
    return hessian + ridge(hessian, damping) * torch.eye(len(hessian), dtype=hessian.dtype)


def measure_moments(
    node: Node, weight_shape: torch.Size, images: Iterable[Seen], photographs: int | None = None
) -> Moments:
    """H and C from what the layer sees of every image (in all processes), groups 1. photographs: how many of all
    images are no views of others, which decides the damping (by default all)."""
    kernel, size = tuple(weight_shape[2:]), weight_shape[1:].numel()
    hessian, cross = (torch.zeros(n, size, dtype=torch.float64) for n in (size, weight_shape[0]))
    sums = torch.zeros(size + weight_shape[0], dtype=torch.float64)
    total, count = (torch.zeros((), dtype=torch.float64) for _ in range(2))  # weights, and images
    runs = batched(images, TOGETHER)
    first = next(runs, None)
    offset = torch.zeros(size + weight_shape[0])
    if first is not None:  # float32 would lose what varies little around much; the same offset in all processes
        w = torch.cat([seen.weights for seen in first])
        mean = (_columns(node, kernel, first, offset, torch.ones_like(w)) @ w) / w.sum().clamp_min(1e-30)
        offset = workers.gathered(mean)[0]

    def products(run: Sequence[Seen]) -> tuple[Tensor, ...]:
        w = torch.cat([seen.weights for seen in run])
        root = w.sqrt()
        both = _columns(node, kernel, run, offset, root)
        count = torch.tensor(float(len(run)))
        return gram(both[:size]), both[size:] @ both[:size].T, both @ root, w.double().sum(), count

    for found in in_order(products, chain([first] if first is not None else [], runs)):
        for whole, part in zip((hessian, cross, sums, total, count), found, strict=True):
            whole += part
    hessian, cross, sums, total, count = (workers.summed(t) for t in (hessian, cross, sums, total, count))
    left = sums / total
    left_q, left_y = left.split((size, weight_shape[0]))
    mean_q, mean_y = (left + offset.double()).split((size, weight_shape[0]))
    centred = hessian / total - torch.outer(left_q, left_q), cross / total - torch.outer(left_y, left_q)
    return Moments(*centred, mean_q, mean_y, damping_for(photographs or max(1, int(count))))


def _columns(node: Node, kernel: tuple[int, ...], run: Sequence[Seen], offset: Tensor, root: Tensor) -> Tensor:
    """Unfolded inputs above float outputs of some images, float32: (K + cho, positions), less offset (K + cho,), times
    root (positions,)."""
    columns = torch.empty(len(offset), len(root))
    size, end = len(offset) - len(run[0].float_output), 0
    for seen in run:
        start, end = end, end + len(seen.picks)
        unfold(node, kernel, seen, offset[:size], root[start:end], columns[:size, start:end])
        outputs = columns[size:, start:end].copy_(seen.float_output)
        outputs.sub_(offset[size:, None]).mul_(root[start:end])
    return columns


def unfold(node: Node, kernel: tuple[int, ...], seen: Seen, offset: Tensor, root: Tensor, found: Tensor) -> None:
    """found (K, p) gets the unfolded input at an image's positions, real, less offset (K,), times root (p,)."""
    x = seen.input
    if x.dtype != torch.uint8 or x.device.type != "cpu":
        found.copy_(seen.real(unfolded(x, seen.zero, kernel, node, seen.picks.to(x.device))))
        found.sub_(offset[:, None]).mul_(root)
        return
    from dsconvert.fit import loops  # numba takes a while to load

    a = node.attrs
    width = (x.shape[2] + 2 * a["padding"] - a["dilation"] * (kernel[1] - 1) - 1) // a["stride"] + 1
    places = ((p * a["stride"] - a["padding"]).numpy() for p in (seen.picks // width, seen.picks % width))
    grid = (float(seen.grid.zero_point), seen.grid.scale) if seen.grid else (0.0, 1.0)
    given = *places, *kernel, a["dilation"], *grid, offset.numpy(), root.numpy()
    loops.gather(x.contiguous().numpy(), *given, found.numpy())


def unfolded(x: Tensor, zero: int, kernel: tuple[int, ...], node: Node, picks: Tensor) -> Tensor:
    """Columns `picks` (p,) of the unfolded x (c, h, w): (c * kh * kw, p), without unfolding the others. `zero` is
    around x."""
    a = node.attrs
    (kh, kw), stride, dilation, pad = kernel, a["stride"], a["dilation"], a["padding"]
    padded = F.pad(x, (pad, pad, pad, pad), value=zero)
    width = (padded.shape[2] - dilation * (kw - 1) - 1) // stride + 1
    rows, columns = picks // width * stride, picks % width * stride
    taps_y, taps_x = (torch.arange(k, device=x.device) * dilation for k in (kh, kw))
    at = (rows + taps_y[:, None])[:, None] * padded.shape[2] + (columns + taps_x[:, None])[None]
    return padded.flatten(1)[:, at.flatten()].reshape(-1, len(picks))


def fit_weight_gptq(
    weight: Tensor,
    moments: Moments,
    bits: int,
    block_size: int,
    channels: Tensor | None = None,
    trellis: bool = False,
) -> DSTensor:
    """Float weight (cho, chi, kh, kw) and its input moments -> the DSTensor with the least damped J found.

    Per output channel the better of least squares and of GPTQ is kept, each with the CDSw that is optimal for its
    integers: never worse than least squares on J. With `channels`, the second moment (cho, cho) of the
    output's gradients, later channels make up for the errors of earlier ones (see `fit.channels`).
    """
    with threads_for(weight.numel()):
        return _fit(weight, moments, Width(bits, block_size, trellis), channels)


def _fit(weight: Tensor, moments: Moments, width: Width, channels: Tensor | None) -> DSTensor:
    plain = fit_weight(weight, *width)
    flat = weight.detach().cpu().double().flatten(1)
    damped = moments.damped(flat)
    groups = _groups(weight.shape, width, damped.hessian.diagonal())
    order = torch.cat(groups)
    try:
        factor = inverse_factor(damped.hessian[order][:, order])
    except torch.linalg.LinAlgError:  # constant inputs, as behind a dead layer: H is rounding noise
        return plain
    target = torch.empty_like(flat)
    target[:, order] = (damped.cross[:, order] @ factor.T) @ factor  # C H^-1
    upper = factor.numpy()
    start = _starting(target.reshape(weight.shape), width)
    rounded = _rounded(upper, [len(g) for g in groups], width)
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
        stored, m = rounded(wanted[:, order].numpy(), start[rows].numpy())
        stored = stored[:, torch.argsort(order)].reshape(shape)
        if not width.trellis:
            stored = from_blocks(relieve_pairs(to_blocks(stored, width.block_size), width.bits), *weight.shape[1:])
        best.offer(stored, _scatter(m, groups, shape, width.block_size))
        fitted.append(best.tensor())
        errors[rows] = target[rows] - fitted[-1].weight().double().flatten(1)
    return DSTensor.joined(fitted).rows(torch.argsort(torch.cat(turns)))


def inverse_factor(hessian: Tensor) -> Tensor:
    """The upper triangular U (K, K) with U^T U = H^-1: H = R R^T with R upper triangular, the Cholesky factor from the
    last column to the first, and U = R^-1. H itself is never inverted, which takes three times as long and loses
    digits. Raises LinAlgError where H is not positive definite."""
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    return torch.linalg.solve_triangular(upper, torch.eye(len(upper), dtype=upper.dtype), upper=True)


def _groups(shape: torch.Size, width: Width, energy: Tensor) -> list[Tensor]:
    """Column indices of every (block, tap): by falling energy, or along a trellis as its strings go."""
    _, chi, kh, kw = shape
    columns = torch.arange(chi * kh * kw).reshape(chi, kh * kw)
    if width.trellis:
        return list(strings(columns.reshape(1, chi, kh, kw), width.block_size)[0].split(min(width.block_size, chi)))
    groups = [columns[b * width.block_size : (b + 1) * width.block_size, t]
              for b in range(block_count(chi, width.block_size)) for t in range(kh * kw)]  # fmt: skip
    groups = [g[torch.argsort(energy[g], descending=True, stable=True)] for g in groups]
    return sorted(groups, key=lambda g: -float(energy[g].mean()))


def _starting(target: Tensor, width: Width) -> Tensor:
    """CDSw (cho,) float64 to round a target (cho, chi, kh, kw) with."""
    if not width.trellis:
        return fit_weight(target, *width).cds_w.double()
    size = min(width.block_size, target.shape[1])
    groups = strings(target, width.block_size).unflatten(1, (-1, size))
    return torch.from_numpy(starting(groups.square().mean(-1).sqrt().numpy(), width.bits))


def _rounded(upper: Floats, lengths: Sequence[int], width: Width) -> Rounded:
    """What rounds a target, columns in the order of the Cholesky factor (K, K) of H^-1, in groups of those lengths."""
    if width.trellis:
        return partial(round_strings, upper=upper, size=lengths[0], bits=width.bits)
    return partial(_round, upper=upper, lengths=lengths, bits=width.bits)


def _round(target: Floats, cds: Floats, upper: Floats, lengths: Sequence[int], bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ's loop over a target (cho, K), CDSw as given: VQK (cho, K), columns in that order, and m (groups, cho)."""
    w, vqk = target.copy(), np.empty_like(target)
    chosen = np.empty((len(lengths), len(w)))
    ends = np.cumsum(lengths)
    for m, length, end in zip(chosen, lengths, ends, strict=True):
        group = slice(int(end) - length, int(end))
        m[:], vqk[:, group], errors = _round_group(w[:, group], cds, upper[group, group], bits)
        rest, factor = torch.from_numpy(w)[:, group.stop :], torch.from_numpy(upper)[group, group.stop :]
        rest.addmm_(torch.from_numpy(errors), factor, alpha=-1)
    return torch.from_numpy(vqk), torch.from_numpy(chosen)


def _round_group(w: Floats, cds: Floats, upper: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """One group's columns w (cho, n) rounded with every m, given their part of the Cholesky factor; of each output
    channel the m of least J: m (cho,), VQK and the errors to be made up for by later columns, both (cho, n).

    Those errors are in units of what the later columns leave, so what a group adds to J is the sum of their squares."""
    from dsconvert.fit import loops  # numba takes a while to load

    m, vqk, errors = np.empty(len(w)), np.empty(w.shape), np.empty(w.shape)
    limits = map(float, (*vqk_limits(bits), max_multiplier(bits)))
    given = (w, np.ascontiguousarray(cds), np.ascontiguousarray(upper), *limits)
    shared(len(w), lambda first, last: loops.round_columns(first, last, *given, m, vqk, errors))
    return m, vqk, errors


def _scatter(chosen: Tensor, groups: list[Tensor], shape: tuple[int, ...], block_size: int) -> Tensor:
    """m (groups, cho) -> (cho, nblk, kh, kw)."""
    cho, chi, kh, kw = shape
    m = torch.ones(cho, block_count(chi, block_size), kh * kw, dtype=torch.float64)
    for found, group in zip(chosen, groups, strict=True):
        channel, tap = divmod(int(group[0]), kh * kw)
        m[:, channel // block_size, tap] = found
    return m.reshape(cho, -1, kh, kw)


class _Best:
    """The best integers so far, per output channel, by J with its optimal CDSw. linear (cho, K) is C; what is stored of
    a weight is its VQK, or its code."""

    def __init__(self, linear: Tensor, hessian: Tensor, plain: DSTensor) -> None:
        self.linear, self.hessian = linear, hessian
        self.width = plain.width
        self.stored = plain.vqk.double() if plain.code is None else plain.code
        self.m = plain.m.double()
        self.cds, self.gain = self._judge(self.stored, self.m, plain.cds_w.double())

    def _judge(self, stored: Tensor, m: Tensor, fallback: Tensor) -> tuple[Tensor, Tensor]:
        """Optimal CDSw = (C I^T) / (I H I^T) and how much of J it takes away, for I = m VQK."""
        bits, block_size, trellis = self.width
        vqk = values(stored, bits, block_size).double() if trellis else stored
        integers = (expand_blocks(m, vqk.shape[1], block_size) * vqk).flatten(1)
        cross = (self.linear * integers).sum(1)
        power = ((integers @ self.hessian) * integers).sum(1)
        cds = torch.where((cross > 0) & (power > 1e-12), cross / power.clamp_min(1e-12), fallback)
        return cds, 2 * cds * cross - cds.square() * power

    def offer(self, stored: Tensor, m: Tensor) -> None:
        cds, gain = self._judge(stored, m, self.cds)
        better = gain > self.gain
        self.gain = torch.where(better, gain, self.gain)
        self.cds = torch.where(better, cds, self.cds)
        self.stored = torch.where(better[:, None, None, None], stored, self.stored)
        self.m = torch.where(better[:, None, None, None], m, self.m)

    def tensor(self) -> DSTensor:
        bits, block_size, trellis = self.width
        m, cds_w = self.m.to(torch.int8), self.cds.float()
        if trellis:
            return DSTensor.along_trellis(self.stored, m, cds_w, bits, block_size)
        return DSTensor(self.stored.to(torch.int8), m, cds_w, bits, block_size)


def fit_layer(
    node: Node,
    weight: Tensor,
    width: Width,
    images: Iterable[Seen],
    channels: Tensor | None = None,
    photographs: int | None = None,
) -> DSTensor | QConv:
    """Fit one layer from what it sees of every image; of grouped convolutions the weight alone, by least squares.
    `channels` as in `fit_weight_gptq`, `photographs` as in `measure_moments`."""
    if node.attrs["groups"] > 1:
        return fit_weight(weight, *width)
    moments = measure_moments(node, weight.shape, images, photographs)
    return moments.with_bias(fit_weight_gptq(weight, moments, *width[:2], channels, width.trellis))
