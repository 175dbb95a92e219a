"""Second moments of a layer's inputs and float outputs: all that its fit knows about the images (see `gptq`)."""

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

TOGETHER = 4  # images multiplied at once; processes share images in runs of this length too, so that their sums agree
DAMPING = 0.1  # share of H's mean diagonal, with many images: ten times GPTQ's, as few positions matter
SURE, MOST_DAMPING = 64, 2.0  # the damping is SURE / images, between DAMPING and MOST_DAMPING


@dataclass(frozen=True)
class Moments:
    """Second moments of a layer's unfolded inputs q and float outputs y, means taken out, float64.

    K counts the columns in the weight's own order: channel, row, column.
    """

    hessian: Tensor  # H = cov(q, q) (K, K)
    cross: Tensor  # C = cov(y, q) (cho, K)
    mean_q: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (K,)
    mean_y: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))  # (cho,)
    damping: float = DAMPING  # r of `gptq`, as a share of the mean diagonal of H

    def damped(self, weight: Tensor) -> Moments:
        """Return the moments with the damping r added: r on H's diagonal, and r W added to C.

        weight: W, (cho, K) float.
        """
        pulled = self.cross + ridge(self.hessian, self.damping) * weight
        return replace(self, hessian=damped_hessian(self.hessian, self.damping), cross=pulled)

    def with_bias(self, weight: DSTensor) -> QConv:
        """Return the weight with the CDSb that gives its outputs the mean of the float network's."""
        made = (weight.weight().double().flatten(1) * self.mean_q).sum(1)
        return QConv(weight, (self.mean_y - made).float())


def damping_for(images: int) -> float:
    """Return the damping for so many images. Few images are partly chance, so they keep W' nearer to W."""
    return min(max(DAMPING, SURE / images), MOST_DAMPING)


def ridge(hessian: Tensor, damping: float) -> Tensor:
    """Return r for H (K, K)."""
    return damping * hessian.diagonal().mean().clamp_min(1e-12)


def damped_hessian(hessian: Tensor, damping: float) -> Tensor:
    """Return H (K, K) with r added to its diagonal."""
    return hessian + ridge(hessian, damping) * torch.eye(len(hessian), dtype=hessian.dtype)


def measure_moments(
    node: Node, weight_shape: torch.Size, images: Iterable[Seen], photographs: int | None = None
) -> Moments:
    """Measure H, C and the means over all images, of all processes, for a layer without groups.

    node: the convolution.
    weight_shape: (cho, chi, kh, kw); cho may be 0 where C is not needed.
    images: what the layer sees of this process's images.
    photographs: how many of all images are not views of others, which sets the damping; None: all.
    """
    kernel, size = tuple(weight_shape[2:]), weight_shape[1:].numel()
    hessian, cross = (torch.zeros(n, size, dtype=torch.float64) for n in (size, weight_shape[0]))
    sums = torch.zeros(size + weight_shape[0], dtype=torch.float64)
    total, count = (torch.zeros((), dtype=torch.float64) for _ in range(2))  # weights, and images
    runs = batched(images, TOGETHER)
    first = next(runs, None)
    offset = torch.zeros(size + weight_shape[0])
    # Subtract a rough mean first: float32 would lose a small variation around a large value. All processes use the
    #     first process's, so that their sums can be added.
    if first is not None:
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
    # put the offset back into the means; covariances need only the means relative to the offset
    left = sums / total
    left_q, left_y = left.split((size, weight_shape[0]))
    mean_q, mean_y = (left + offset.double()).split((size, weight_shape[0]))
    centred = hessian / total - torch.outer(left_q, left_q), cross / total - torch.outer(left_y, left_q)
    return Moments(*centred, mean_q, mean_y, damping_for(photographs or max(1, int(count))))


def _columns(node: Node, kernel: tuple[int, ...], run: Sequence[Seen], offset: Tensor, root: Tensor) -> Tensor:
    """Return the unfolded inputs above the float outputs of some images, (K + cho, positions) float32.

    offset: (K + cho,), subtracted.
    root: (positions,), the square root of each position's weight, multiplied.
    """
    columns = torch.empty(len(offset), len(root))
    size, end = len(offset) - len(run[0].float_output), 0
    for seen in run:
        start, end = end, end + len(seen.picks)
        unfold(node, kernel, seen, offset[:size], root[start:end], columns[:size, start:end])
        outputs = columns[size:, start:end].copy_(seen.float_output)
        outputs.sub_(offset[size:, None]).mul_(root[start:end])
    return columns


def unfold(node: Node, kernel: tuple[int, ...], seen: Seen, offset: Tensor, root: Tensor, found: Tensor) -> None:
    """Write an image's unfolded input at its drawn positions into `found` (K, p), as real numbers.

    offset: (K,), subtracted.
    root: (p,), multiplied.
    """
    x = seen.input
    if x.dtype != torch.uint8 or x.device.type != "cpu":
        found.copy_(seen.real(unfolded(x, seen.zero, kernel, node, seen.picks.to(x.device))))
        found.sub_(offset[:, None]).mul_(root)
        return
    from dsconvert.base import loops  # numba takes a while to import

    a = node.attrs
    width = (x.shape[2] + 2 * a["padding"] - a["dilation"] * (kernel[1] - 1) - 1) // a["stride"] + 1
    places = ((p * a["stride"] - a["padding"]).numpy() for p in (seen.picks // width, seen.picks % width))
    grid = (float(seen.grid.zero_point), seen.grid.scale) if seen.grid else (0.0, 1.0)
    given = *places, *kernel, a["dilation"], *grid, offset.numpy(), root.numpy()
    loops.gather(x.contiguous().numpy(), *given, found.numpy())


def unfolded(x: Tensor, zero: int, kernel: tuple[int, ...], node: Node, picks: Tensor) -> Tensor:
    """Return the columns `picks` (p,) of the unfolded x (c, h, w), as (c * kh * kw, p), without computing the others.

    zero: the value that pads x.
    """
    a = node.attrs
    (kh, kw), stride, dilation, pad = kernel, a["stride"], a["dilation"], a["padding"]
    padded = F.pad(x, (pad, pad, pad, pad), value=zero)
    width = (padded.shape[2] - dilation * (kw - 1) - 1) // stride + 1
    rows, columns = picks // width * stride, picks % width * stride
    taps_y, taps_x = (torch.arange(k, device=x.device) * dilation for k in (kh, kw))
    at = (rows + taps_y[:, None])[:, None] * padded.shape[2] + (columns + taps_x[:, None])[None]
    return padded.flatten(1)[:, at.flatten()].reshape(-1, len(picks))
