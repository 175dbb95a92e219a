"""Activation grids chosen by error: the uint8 range that changes the network's result least.

The squared error of every calibration value is weighted by what `importance` says of it. A convolution's output that
feeds an activation is judged after that activation: the far negative side of SiLU's input is all alike and deserves
no grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from dsconvert.fit.importance import judged
from dsconvert.graph.integer import QParams
from dsconvert.graph.ir import INPUT, Graph
from dsconvert.graph.run import ACTIVATIONS

SEARCH_SAMPLES = 16384
GRID = torch.logspace(-1.3, 0, 40).tolist()  # shares of the observed extreme that are tried: 0.05 to 1
ROUNDS = 3
IMAGE_GRID = QParams.of_range(0.0, 1.0)  # exact for 8-bit images: scale 1/255, zero point 0


def choose_grids(graph: Graph, samples: Mapping[str, tuple[Tensor, Tensor]], seed: int) -> dict[str, QParams]:
    """Quantization parameters for every value that has its own (see `grid_of`), from (values, weights)."""
    kinds = {n.name: n.attrs["kind"] for n in graph.nodes if n.op == "act"}
    judges = {conv: ACTIVATIONS[kinds[act]] for conv, act in judged(graph).items()}
    generator = torch.Generator().manual_seed(seed)
    grids = {INPUT: IMAGE_GRID}
    for name, (values, weights) in samples.items():
        if values.numel() > SEARCH_SAMPLES:
            picks = torch.randint(values.numel(), (SEARCH_SAMPLES,), generator=generator)
            picks = torch.cat((picks, values.argmin()[None], values.argmax()[None]))
            values, weights = values[picks], weights[picks]
        grids[name] = best_range(values, weights, judges.get(name, lambda x: x))
    return grids


def best_range(values: Tensor, weights: Tensor, judge: Callable[[Tensor], Tensor]) -> QParams:
    """The grid minimising sum weight (judge(dequantized) - judge(value))^2: both ends searched in turn."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    target = judge(values)
    # nothing may be worth nothing: where no gradient arrives, values still count a little
    weights = weights + 1e-6 * weights.mean().clamp_min(1e-30)

    def error(lo: float, hi: float) -> float:
        grid = QParams.of_range(lo, hi)
        return float((weights * (judge(grid.dequantize(grid.quantize(values))) - target).square()).sum())

    lo, hi = low, high
    for _ in range(ROUNDS):
        hi = min((high * g for g in GRID), key=lambda h: error(lo, h))
        lo = min((low * g for g in GRID), key=lambda x: error(x, hi))
    return QParams.of_range(lo, hi)
