"""Activation grids chosen by error: the uint8 range that changes the network's result least.

The squared rounding error of every calibration value is weighted by what `importance` says of it; what cutting the
upper end costs is measured as a whole (`measure.clipping`). A convolution's output that feeds an activation is judged
after that activation: the far negative side of SiLU's input is all alike and deserves no grid points.

A value is rounded before its activation and once more behind it, and where both steps fall together the second rounding
costs little. So the two grids are chosen once more, together, by the error of both roundings.

What is concatenated shares one grid where that errs less. An engine that joins maps on different grids rounds them
again, to the grid of the whole, and is slow at it: a table is looked up for every byte, where equal grids are one copy.
What is only joined, as in a C3 block, loses nothing by having that grid from the start; what other layers read too, as
the backbone's maps, is rounded for the range of all, so the squared errors decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from dsconvert.base.threads import in_order
from dsconvert.graph.activations import ACTIVATIONS, as_engines
from dsconvert.graph.gates import before_times
from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.integer import keeps_grid
from dsconvert.graph.ir import INPUT, Graph
from dsconvert.graph.ops import OPS
from dsconvert.measure.clipping import LEAST_SHARE, effects_at

SEARCH_SAMPLES = 8192
LOWS = torch.logspace(-1.3, 0, 40).tolist()  # shares of the observed extremes that are tried as ends of the range
HIGHS = [LEAST_SHARE ** (1 - i / 48) for i in range(49)]
ROUNDS = 3
# what the ends of the two grids around an activation are multiplied by. Upper ends are not lowered again: samples say
# little of what cutting them costs.
LOWER, UPPER = ([first + (last - first) * i / 12 for i in range(13)] for first, last in ((0.85, 1.15), (1.0, 1.12)))
Judge = Callable[[Tensor], Tensor]
IMAGE_GRID = QParams.of_range(0.0, 1.0)  # exact for 8-bit images: scale 1/255, zero point 0


@dataclass(frozen=True)
class Seen:
    """Calibration values (k,), their weights, and what clipping them costs by `clipping.LEVELS`."""

    values: Tensor
    weights: Tensor
    clipping: Tensor

    def error(self, grid: QParams) -> float:
        """The weighted squared error of having the values on a grid."""
        high = (QMAX - grid.zero_point) * grid.scale
        off = grid.dequantize(grid.quantize(self.values)).sub_(self.values).square_().mul_(self.weights)
        cut = float(effects_at(self.clipping, torch.tensor(high))) if float(self.values.max()) > high else 0.0
        return float((off * (self.values <= high)).sum()) + cut


def choose_grids(
    graph: Graph,
    samples: Mapping[str, tuple[Tensor, Tensor]],
    clipping: Mapping[str, Tensor],
    seed: int,
    reach: Mapping[str, float] = MappingProxyType({}),
    image: QParams = IMAGE_GRID,
) -> dict[str, QParams]:
    """Quantization parameters for every value that has its own (see `grid_of`), from (values, weights) and the
    effects of clipping, both as `Importance` has them. `reach`: how far up the grids of some values go at least,
    whatever was seen. `image`: the grid of the network's input."""
    kinds = {n.name: n.attrs["kind"] for n in graph.nodes if n.op == "act"}
    behind, limited = graph.activated(), graph.limited()
    generator = torch.Generator().manual_seed(seed)
    grids = {INPUT: image}
    seen: dict[str, Seen] = {}
    for name, (values, weights) in samples.items():
        if values.numel() > SEARCH_SAMPLES:
            picks = torch.randint(values.numel(), (SEARCH_SAMPLES,), generator=generator)
            picks = torch.cat((picks, values.argmin()[None], values.argmax()[None]))
            values, weights = values[picks], weights[picks] * (values.numel() / SEARCH_SAMPLES)
        if name in limited:  # its grid ends where the relu does
            values = values.clamp(0, limited[name] or None)
        seen[name] = Seen(values, weights, clipping[behind.get(name, name)])

    def best(name: str) -> QParams:
        judge = ACTIVATIONS[kinds[behind[name]]] if name in behind else _same
        own = seen[name]
        return best_range(own.values, own.weights, judge, own.clipping, reach.get(name, 0.0))

    grids.update(zip(seen, in_order(best, seen), strict=True))
    grids = share_grids(graph, {name: s for name, s in seen.items() if name not in behind}, grids)
    tied = {node.inputs[0]: node for node in graph.nodes if node.op == "times"}
    grids.update({name: before_times(node, grids[node.name]) for name, node in tied.items()})
    readers = Counter(grids.values())

    def pair(names: tuple[str, str]) -> tuple[QParams, QParams]:
        before, after = (grids[name] for name in names)
        free = readers[after] == 1 and names[1] not in tied
        return together(seen[names[0]], kinds[names[1]], before, after, free)

    for names, found in zip(behind.items(), in_order(pair, behind.items()), strict=True):
        grids.update(zip(names, found, strict=True))
    return grids


def together(seen: Seen, kind: str, before: QParams, after: QParams, free: bool) -> tuple[QParams, QParams]:
    """The grids before and behind an activation, nudged so that both roundings together err less: first the one before
    it, then the one behind. seen: the values before it, with what they and their clipping count for behind it. free:
    whether the grid behind it may change, as it is nobody else's."""
    judge = ACTIVATIONS[kind]
    target, high = judge(seen.values), float(seen.values.max())
    weights = _never_nothing(seen.weights)

    def twice(values: Tensor) -> Tensor:
        return after.dequantize(after.quantize(as_engines(kind, values)))

    def first(ends: Sequence[tuple[float, float]]) -> list[float]:
        return range_errors(seen.values, target, weights, ends, twice, judge, seen.clipping, high)

    found = QParams.of_range(*least(nudged(before), first))
    if not free:
        return found, after
    kept = seen.values <= (QMAX - found.zero_point) * found.scale
    made = as_engines(kind, found.dequantize(found.quantize(seen.values[kept])))

    def second(ends: Sequence[tuple[float, float]]) -> list[float]:
        last = float(target.max())
        return range_errors(made, target[kept], weights[kept], ends, _same, _same, seen.clipping, last)

    return found, QParams.of_range(*least(nudged(after), second))


def nudged(grid: QParams) -> list[tuple[float, float]]:
    """Ranges near that of a grid, its own the first."""
    low, high = (grid.scale * (end - grid.zero_point) for end in (0, QMAX))
    return [(low, high), *((low * down, high * up) for down in LOWER for up in UPPER)]


def _same(values: Tensor) -> Tensor:
    return values


def _never_nothing(weights: Tensor) -> Tensor:
    """Where no gradient arrives, values still count a little."""
    return weights + 1e-6 * weights.mean().clamp_min(1e-30)


def share_grids(graph: Graph, seen: Mapping[str, Seen], own: Mapping[str, QParams]) -> dict[str, QParams]:
    """The grids, those of a concatenation and of what it joins made one where the joined values' errors add up to less
    on it than on their own grids and once more on the concatenation's. `seen` has all values but convolutions' that
    one activation reads (see `Graph.activated`)."""
    sources = {INPUT: INPUT}  # value -> the value whose grid it has
    grids = dict(own)
    # what has the same grid, without concatenations of it
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in seen}
    for node in graph.nodes:
        sources[node.name] = sources[node.inputs[0]] if keeps_grid(node.op) else node.name
        names = [sources[name] for name in node.inputs]
        if not OPS[node.op].joins or not all(name in seen for name in names):
            continue
        parts = {groups[name] for name in names}
        members = tuple(dict.fromkeys(m for name in names for m in groups[name]))
        values, weights = (
            torch.cat(t) for t in zip(*((seen[m].values, seen[m].weights) for m in members), strict=True)
        )
        grid = best_range(values, weights, _same, torch.stack([seen[m].clipping for m in members]).sum(0))
        apart = sum(seen[m].error(grids[m]) for m in members) + seen[node.name].error(grids[node.name])
        if sum(seen[m].error(grid) for m in members) > apart:
            continue
        for name in [node.name, *(n for n, part in groups.items() if part in parts)]:
            groups[name], grids[name] = members, grid
    return grids


def best_range(values: Tensor, weights: Tensor, judge: Judge, clipping: Tensor, reach: float = 0.0) -> QParams:
    """The grid of least cost, both ends searched in turn: sum weight (judge(dequantized) - judge(value))^2 over the
    values up to the upper end, and `clipping` (squared effects by `clipping.LEVELS`, after judge) for those above. The
    upper end is no less than `reach`."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), reach)
    target, weights = judge(values), _never_nothing(weights)

    def errors(ends: Sequence[tuple[float, float]]) -> list[float]:
        return range_errors(values, target, weights, ends, judge, judge, clipping, high)

    lo, hi = low, high
    for _ in range(ROUNDS):
        before = lo, hi
        lo, hi = least([(lo, max(high * share, reach)) for share in HIGHS], errors)
        lo, hi = least([(low * share, hi) for share in LOWS], errors)
        if (lo, hi) == before:
            break
    return QParams.of_range(lo, hi)


def range_errors(
    values: Tensor, target: Tensor, weights: Tensor, ends: Sequence[tuple[float, float]], made: Judge, judge: Judge,
    clipping: Tensor, high: float,
) -> list[float]:  # fmt: skip
    """Of the grid of each range sum weight (made(value on the grid) - target)^2 over the values up to its upper end;
    and of ranges that end below `high`, what `clipping` says of judge(upper end)."""
    from dsconvert.base import loops  # numba takes a while to load

    scales, zeros, tables = grids_of(ends)
    highs = torch.tensor([hi for _, hi in ends])
    kept = torch.empty(len(ends), dtype=torch.float64)
    given = (values, target, weights, scales, zeros, highs, made(tables), kept)
    loops.grid_errors(*(x.contiguous().numpy() for x in given))
    cut = torch.from_numpy(effects_at(clipping, judge(highs)))
    return (kept + torch.where(highs >= high, 0.0, cut)).tolist()


def least(
    ends: list[tuple[float, float]], errors: Callable[[Sequence[tuple[float, float]]], list[float]]
) -> tuple[float, float]:
    """The first of those with the least error."""
    return min(zip(errors(ends), range(len(ends)), ends, strict=True))[2]


def grids_of(ends: Sequence[tuple[float, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """Scales and zero points (ranges,) of the grid of each range, and the real values (ranges, 256) on it."""
    grids = [QParams.of_range(*both) for both in ends]
    scales = torch.tensor([grid.scale for grid in grids])
    zeros = torch.tensor([float(grid.zero_point) for grid in grids])
    return scales, zeros, (torch.arange(QMAX + 1.0) - zeros[:, None]) * scales[:, None]
