"""What a layer's fit knows of its images: second moments of its inputs and float outputs (see `gptq`)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base import workers
from dsconvert.base.threads import batched, in_order
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.channels import gram
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

TOGETHER = 4  # images whose positions are multiplied at once; processes share images in runs of as many, so sums agree
DAMPING = 0.1  # of the mean diagonal of H, with many images: ten times GPTQ's, as few positions matter
SURE, MOST_DAMPING = 64, 2.0  # images of which the damping is 1; of others it is SURE / images, between these two


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded inputs q and float outputs y, means taken out, float64. K is in the weight's
    own order (channel, row, column)."""

    hessian: Tensor  # H = cov(q, q) (K, K)
    cross: Tensor  # C = cov(y, q) (cho, K)
    mean_q: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (K,)
    mean_y: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (cho,)
    damping: float = DAMPING  # r of `gptq`, as a share of the mean diagonal of H

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
    from dsconvert.base import loops  # numba takes a while to load

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
