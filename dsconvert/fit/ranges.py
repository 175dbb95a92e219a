"""Activation grids chosen by error: the uint8 range with the least squared error over calibration values.

A convolution's output that feeds an activation is judged after that activation: the far negative side of SiLU's
input is all alike and deserves no grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from dsconvert.graph.integer import QParams, keeps_grid
from dsconvert.graph.ir import INPUT, ConvParams, Graph
from dsconvert.graph.run import ACTIVATIONS, run_float

SAMPLES_PER_IMAGE = 2048
SEARCH_SAMPLES = 65536
GRID = torch.linspace(0.2, 1.0, 33).tolist()  # shares of the observed extreme that are tried
IMAGE_GRID = QParams.of_range(0.0, 1.0)  # exact for 8-bit images: scale 1/255, zero point 0


def sample_values(
    graph: Graph, params: Mapping[str, ConvParams], batches: Iterable[Tensor], seed: int
) -> dict[str, Tensor]:
    """Value name -> calibration values: per image a random sample, its minimum and its maximum always in it."""
    generator = torch.Generator().manual_seed(seed)
    kept: dict[str, list[Tensor]] = {n.name: [] for n in graph.nodes if not keeps_grid(n.op)}

    def visit(name: str, value: Tensor) -> None:
        if name not in kept:
            return
        for image in value:
            flat = image.reshape(-1)
            picks = torch.randint(flat.numel(), (SAMPLES_PER_IMAGE,), generator=generator).to(flat.device)
            kept[name].append(torch.cat((flat[picks], flat.aminmax().min[None], flat.aminmax().max[None])).cpu())

    for batch in batches:
        run_float(graph, params, batch, visit)
    return {name: torch.cat(values) for name, values in kept.items()}


def choose_grids(graph: Graph, samples: Mapping[str, Tensor], seed: int) -> dict[str, QParams]:
    """Quantization parameters for every value that has its own (see `grid_of`)."""
    judges = _judges(graph)
    generator = torch.Generator().manual_seed(seed)
    grids = {INPUT: IMAGE_GRID}
    for name, values in samples.items():
        if values.numel() > SEARCH_SAMPLES:
            picks = torch.randint(values.numel(), (SEARCH_SAMPLES,), generator=generator)
            values = torch.cat((values[picks], values.aminmax().min[None], values.aminmax().max[None]))
        grids[name] = best_range(values, judges.get(name, lambda x: x))
    return grids


def _judges(graph: Graph) -> dict[str, Callable[[Tensor], Tensor]]:
    """What a value turns into before it matters: its activation, or the decoder's sigmoid."""
    judges: dict[str, Callable[[Tensor], Tensor]] = {
        n.inputs[0]: ACTIVATIONS[n.attrs["kind"]] for n in graph.nodes if n.op == "act"
    }
    return {**judges, **dict.fromkeys(graph.outputs, torch.sigmoid)}


def best_range(values: Tensor, judge: Callable[[Tensor], Tensor]) -> QParams:
    """The grid minimising sum (judge(dequantized) - judge(value))^2: both ends searched in turn, twice."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    target = judge(values)

    def error(lo: float, hi: float) -> float:
        grid = QParams.of_range(lo, hi)
        return float((judge(grid.dequantize(grid.quantize(values))) - target).square().sum())

    lo, hi = low, high
    for _ in range(2):
        hi = min((high * g for g in GRID), key=lambda h: error(lo, h))
        lo = min((low * g for g in GRID), key=lambda x: error(x, hi))
    return QParams.of_range(lo, hi)
