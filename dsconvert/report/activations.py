"""Compare the layers' float values on a few images with the uint8 grids that hold them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from dsconvert.graph.activations import ACTIVATIONS
from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.report.layers import ActivationView, histogram, sqnr_db

KEPT = 1 << 16  # most values of one layer and image in the histogram


@dataclass(frozen=True)
class Watched:
    """The value of a convolution as the next layers read it, behind its activation function.

    values: some of them, drawn at random.
    grid: the grid that holds them.
    db: signal-to-quantization-noise ratio in dB, over all values.
    """

    values: Tensor
    grid: QParams
    db: float


def watch(
    graph: Graph,
    params: Mapping[str, ConvParams],
    own: Mapping[str, QParams],
    images: Iterable[Tensor],
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Watched]:
    """Run images (1, 3, h, w) through the float network, and return the watched value of each convolution by its name.

    Every value is quantized by itself, first the convolution's output and then the activation's, so the error comes
    from these two grids alone. Detect's outputs are judged behind the sigmoid of the decoding.

    own: activation grids by value name.
    seed: decides which values are drawn.
    progress: called with the number of images done.
    """
    grids, behind = grid_of(graph, own), graph.activated()
    before = {act: conv for conv, act in behind.items()}
    kinds = {n.name: n.attrs["kind"] for n in graph.nodes if n.op == "act"}
    convs = {n.name for n in graph.convs()}
    decoded = {name for name in convs & set(graph.outputs) if not name.endswith(".mask")}
    generator = torch.Generator().manual_seed(seed)
    waiting: dict[str, Tensor] = {}
    sums = {name: [0.0, 0.0] for name in convs}
    values: dict[str, list[Tensor]] = {name: [] for name in convs}

    def visit(name: str, value: Tensor) -> None:
        if name in behind:
            waiting[name] = _rounded(grids[name], value)
            return
        conv = before.get(name, name)
        if conv not in convs:
            return
        made = ACTIVATIONS[kinds[name]](waiting.pop(conv)) if name in before else value
        heard = torch.sigmoid if name in decoded else _unchanged
        wanted = heard(value)
        sums[conv][0] += float(wanted.double().square().sum())
        sums[conv][1] += float((heard(_rounded(grids[name], made)) - wanted).double().square().sum())
        values[conv].append(_drawn(value.flatten(), generator))

    for index, image in enumerate(images):
        run_float(graph, params, image, visit)
        if progress:
            progress(index + 1)
    return {
        name: Watched(torch.cat(values[name]), grids[behind.get(name, name)], sqnr_db(*sums[name]))
        for name in convs
        if values[name]
    }


def activation_view(name: str, watched: Watched) -> ActivationView:
    """Return the histogram of one layer's values over its grid."""
    grid, v = watched.grid, watched.values
    low, high = -grid.scale * grid.zero_point, grid.scale * (QMAX - grid.zero_point)
    counts, edges = histogram(v.numpy(), low, high)
    half = grid.scale / 2
    outside = float(((v < low - half) | (v > high + half)).double().mean())
    return ActivationView(name, edges, counts, low, high, grid.scale, outside, watched.db)


def _rounded(grid: QParams, value: Tensor) -> Tensor:
    return grid.dequantize(grid.quantize(value))


def _unchanged(value: Tensor) -> Tensor:
    return value


def _drawn(flat: Tensor, generator: torch.Generator) -> Tensor:
    if flat.numel() <= KEPT:
        return flat.clone()
    return flat[torch.randint(flat.numel(), (KEPT,), generator=generator)]
