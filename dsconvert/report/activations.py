"""What the layers hand on: float values of a few images against the uint8 grids they are put on."""

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

KEPT = 1 << 16  # values of one layer and image that the histogram is made of


@dataclass(frozen=True)
class Watched:
    """A convolution's value as the next layers read it (behind its activation): drawn `values`, its `grid`, and how
    far quantizing it is heard: signal to noise in dB, over every value."""

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
    """By convolution name. Images (1, 3, h, w) run through the float network; each value is quantized on its own, the
    convolution's output first and then the activation's, so that the error is of these two grids alone. Detect's
    outputs are judged behind the sigmoid that decoding puts them through."""
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
    """The histogram of one layer's values over its grid."""
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
