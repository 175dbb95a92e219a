"""Activation grids chosen by error: the uint8 range that changes the network's result least.

The squared rounding error of every calibration value is weighted by what `importance` says of it; what cutting the
upper end costs is measured as a whole (`fit.clipping`). A convolution's output that feeds an activation is judged
after that activation: the far negative side of SiLU's input is all alike and deserves no grid points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dsconvert.fit.clipping import LEAST_SHARE, effect_at
from dsconvert.fit.importance import judged
from dsconvert.graph.integer import QMAX, QParams
from dsconvert.graph.ir import INPUT, Graph
from dsconvert.graph.run import ACTIVATIONS

SEARCH_SAMPLES = 16384
LOWS = torch.logspace(-1.3, 0, 40).tolist()  # shares of the observed extremes that are tried as ends of the range
HIGHS = [LEAST_SHARE ** (1 - i / 48) for i in range(49)]
ROUNDS = 3
TOGETHER = 8  # ranges tried at once: their rounded values still fit the cache
IMAGE_GRID = QParams.of_range(0.0, 1.0)  # exact for 8-bit images: scale 1/255, zero point 0


def choose_grids(
    graph: Graph, samples: Mapping[str, tuple[Tensor, Tensor]], clipping: Mapping[str, Tensor], seed: int
) -> dict[str, QParams]:
    """Quantization parameters for every value that has its own (see `grid_of`), from (values, weights) and the
    effects of clipping, both as `Importance` has them."""
    kinds = {n.name: n.attrs["kind"] for n in graph.nodes if n.op == "act"}
    behind = judged(graph)
    generator = torch.Generator().manual_seed(seed)
    grids = {INPUT: IMAGE_GRID}
    for name, (values, weights) in samples.items():
        judge = ACTIVATIONS[kinds[behind[name]]] if name in behind else lambda x: x
        if values.numel() > SEARCH_SAMPLES:
            picks = torch.randint(values.numel(), (SEARCH_SAMPLES,), generator=generator)
            picks = torch.cat((picks, values.argmin()[None], values.argmax()[None]))
            values, weights = values[picks], weights[picks] * (values.numel() / SEARCH_SAMPLES)
        grids[name] = best_range(values, weights, judge, clipping[behind.get(name, name)])
    return grids


def best_range(values: Tensor, weights: Tensor, judge: Callable[[Tensor], Tensor], clipping: Tensor) -> QParams:
    """The grid of least cost, both ends searched in turn: sum weight (judge(dequantized) - judge(value))^2 over the
    values up to the upper end, and `clipping` (squared effects by `clipping.LEVELS`, after judge) for those above."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    target = judge(values)
    # nothing may be worth nothing: where no gradient arrives, values still count a little
    weights = weights + 1e-6 * weights.mean().clamp_min(1e-30)

    def errors(ends: Sequence[tuple[float, float]]) -> list[float]:
        found: list[float] = []
        for part in (ends[i : i + TOGETHER] for i in range(0, len(ends), TOGETHER)):
            highs = torch.tensor([hi for _, hi in part])
            kept = (judge(on_grids(values, part)) - target).square_().mul_(weights).mul_(values <= highs[:, None])
            cut = (0.0 if hi >= high else effect_at(clipping, float(judge(torch.tensor(hi)))) for _, hi in part)
            found += map(sum, zip(kept.sum(1).tolist(), cut, strict=True))
        return found

    lo, hi = low, high
    for _ in range(ROUNDS):
        before = lo, hi
        lo, hi = least([(lo, high * share) for share in HIGHS], errors)
        lo, hi = least([(low * share, hi) for share in LOWS], errors)
        if (lo, hi) == before:
            break
    return QParams.of_range(lo, hi)


def least(
    ends: list[tuple[float, float]], errors: Callable[[Sequence[tuple[float, float]]], list[float]]
) -> tuple[float, float]:
    """The first of those with the least error."""
    return min(zip(errors(ends), range(len(ends)), ends, strict=True))[2]


def on_grids(values: Tensor, ends: Sequence[tuple[float, float]]) -> Tensor:
    """Values (n,) rounded to the grid of each range: (ranges, n), as `QParams` rounds and reads them one by one."""
    grids = [QParams.of_range(*both) for both in ends]
    scales = torch.tensor([grid.scale for grid in grids])[:, None]
    zeros = torch.tensor([float(grid.zero_point) for grid in grids])[:, None]
    return torch.round(values / scales).add_(zeros).clamp_(0, QMAX).sub_(zeros).mul_(scales)
