"""Give channels of very different ranges equal ones, where a map's one grid would lose the narrow channels.

A map has one grid. If some channels reach a hundred times as far as others, the grid's step is larger than everything
the narrow channels say. Where convolutions read the map, each channel can be multiplied by a factor of its own, and
the convolutions' weights for that channel divided by it:

- behind nothing, ReLU or LeakyReLU the factor goes into the convolution that makes the channel, exactly;
- SiLU and Hardswish do not commute with a factor. There the convolution is taken apart into up to three, each with
  channels of similar ranges and a grid of its own. `times` behind each activation relabels its grid, which costs
  nothing at run time, and a concatenation joins the parts on one grid.

Factors pass through pooling, resizing, concatenations, selections and products on their way to the convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsconvert.graph.grids import QMAX
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.shapes import value_shapes
from dsconvert.measure.importance import Measure, gradients

IMAGES = 16  # that are looked at
# A map gets factors, or one part more, if that saves this share of the error which all maps leave at best. A smaller
# share makes many more parts, and saves little more (docs/notebook.md, "Channels of equal range").
WORTH = 0.1
BETTER = 4.0  # and only if it leaves so many times less of the map's own error
MOST_PARTS = 3
WIDEST = 1e4  # a factor at most: a channel that never moves needs none
PASSING = ("maxpool", "upsample", "resize", "mean", "mean_pool")  # keep a channel's factor
OF_ALL_FACTORS = ("LeakyReLU", "ReLU")  # f(a x) = a f(x) for a > 0


@dataclass(frozen=True)
class _Reader:
    """A convolution that reads channels of a map, perhaps by way of other operations."""

    name: str
    owners: tuple[int, ...]  # of each input channel the map's channel that it is; -1: none of the map


@dataclass(frozen=True)
class _Chain:
    """A convolution, perhaps its activation, and the convolutions that alone read the result."""

    conv: Node
    act: Node | None
    readers: tuple[_Reader, ...]
    joins: tuple[str, ...] = ()  # concatenations on the way

    @property
    def value(self) -> str:
        """The map whose channels get factors."""
        return (self.act or self.conv).name

    @property
    def is_gated(self) -> bool:
        """Whether its activation does not commute with a factor."""
        return self.act is not None and not _commutes(self.act)


@dataclass(frozen=True)
class _Seen:
    """What images say of the float network, by value name and channel."""

    peaks: Mapping[str, Tensor]  # largest magnitude
    effects: Mapping[str, Tensor]  # squared change of the result for a change by 1, summed over positions

    def error(self, name: str, widest: float) -> float:
        """The squared error of the result if a map is rounded on a grid that reaches so far."""
        return _step_variance(widest) * float(self.effects[name].sum())


def _step_variance(reach: float) -> float:
    return (reach / QMAX) ** 2 / 12


def evened(
    graph: Graph, params: Mapping[str, ConvParams], measure: Measure, images: Sequence[Tensor], seed: int
) -> tuple[Graph, dict[str, ConvParams]]:
    """The same network with channels of similar ranges where the rounding error of its result falls by much.

    measure: the result, as in `measure.importance`. images: (1, c, h, w) each, as the network reads them."""
    shapes = value_shapes(graph, {name: p.weight.shape for name, p in params.items()}, tuple(images[0].shape[1:]))
    chains = _chains(graph, {name: shape[0] for name, shape in shapes.items()})
    seen = _look(graph, params, measure, images, seed)
    plans = {chain.value: _plan(chain, seen, _widest(graph, chain, seen)) for chain in chains}
    left = sum(plan.errors[-1] for plan in plans.values())
    made = dict(params)
    for chain in chains:
        plan = plans[chain.value]
        count = plan.worth(WORTH * left)
        if not count:
            continue
        if not chain.is_gated:
            _give_factors(graph, made, chain, plan.factors)
        else:
            graph = _in_parts(graph, made, chain, plan, count)
    return graph, made


def _chains(graph: Graph, widths: Mapping[str, int]) -> list[_Chain]:
    """Every convolution whose result, perhaps behind an activation, only convolutions read. widths: channels by value
    name."""
    consumers, found = graph.consumers(), list[_Chain]()
    for conv in graph.convs():
        following = consumers.get(conv.name, [])
        act = following[0] if len(following) == 1 and following[0].op in ("act", "relu") else None
        if act is not None and act.op == "relu" and act.attrs["top"]:
            continue  # its upper limit is a number, which a factor would move
        if conv.name in graph.outputs:
            continue
        chain = _followed(graph, consumers, widths, _Chain(conv, act, ()))
        if chain is not None and chain.readers:
            found.append(chain)
    return found


def _followed(
    graph: Graph, consumers: Mapping[str, Sequence[Node]], widths: Mapping[str, int], start: _Chain
) -> _Chain | None:
    """The chain with all that reads its map; None where a factor would not reach a convolution."""
    readers, joins, met = list[_Reader](), list[str](), set[str]()
    left = [(start.value, tuple(range(widths[start.value])))]
    while left:
        value, owners = left.pop()
        if value in graph.outputs:
            return None
        for node in consumers.get(value, []):
            if node.op == "conv":
                readers.append(_Reader(node.name, owners))
                continue
            if node.name in met or node.inputs.count(value) > 1:  # two of its inputs have factors
                return None
            met.add(node.name)
            if node.op == "concat":
                place = node.inputs.index(value)
                before, behind = (
                    sum(widths[x] for x in some) for some in (node.inputs[:place], node.inputs[place + 1 :])
                )
                left.append((node.name, (*[-1] * before, *owners, *[-1] * behind)))
                joins.append(node.name)
            elif node.op == "select":
                left.append((node.name, tuple(owners[i] for i in node.attrs["channels"])))
            elif node.op in PASSING or node.op == "product" or _commutes(node):
                left.append((node.name, owners))
            else:
                return None
    return replace(start, readers=tuple(readers), joins=tuple(joins))


def _commutes(node: Node) -> bool:
    """Whether f(a x) = a f(x) for a > 0."""
    return (node.op == "relu" and not node.attrs["top"]) or (
        node.op == "act" and node.attrs["kind"] in OF_ALL_FACTORS
    )  # fmt: skip


def _look(
    graph: Graph, params: Mapping[str, ConvParams], measure: Measure, images: Sequence[Tensor], seed: int
) -> _Seen:
    peaks: dict[str, Tensor] = {}
    effects: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    for image in images:
        for name, (value, gradient) in gradients(graph, params, image, measure, generator).items():
            peak, effect = value.abs().amax((0, 2, 3)), gradient.square().sum((0, 2, 3))
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
            effects[name] = effects[name] + effect if name in effects else effect
    return _Seen(peaks, {name: total / max(len(images), 1) for name, total in effects.items()})


def _widest(graph: Graph, chain: _Chain, seen: _Seen) -> float:
    """The largest magnitude of the map and of all that is joined with it, which has its grid."""
    joined = (x for node in graph.nodes if node.name in chain.joins for x in node.inputs)
    return max(float(seen.peaks[name].max()) for name in (chain.value, *joined))


@dataclass(frozen=True)
class _Plan:
    """What can be done for a chain's map, and what it leaves of the error."""

    now: float  # squared error of the result from the map's rounding as it is
    errors: tuple[float, ...]  # with factors, in one part, in two, ...; where no parts are needed there is one entry
    parts: tuple[tuple[tuple[int, ...], ...], ...]  # the channels of each part, the narrow ones first
    factors: Tensor  # (c,) where no parts are needed, else empty
    tops: Tensor  # (c,) largest magnitude by channel
    widest: float  # the magnitude that every part shall reach

    def worth(self, least: float) -> int:
        """In how many parts the map shall be: 0 where nothing saves `least`."""
        best, found = self.now, 0
        for count, error in enumerate(self.errors, 1):
            if best - error >= least and best >= BETTER * error:
                best, found = error, count
        return found


def _plan(chain: _Chain, seen: _Seen, widest: float) -> _Plan:
    tops, effects = seen.peaks[chain.value], seen.effects[chain.value]
    if not chain.is_gated:
        now, best, factors = _factors(chain, seen, widest)
        return _Plan(now, (best,), (), factors, tops, widest)
    now = seen.error(chain.value, widest)
    most = MOST_PARTS if chain.conv.attrs["groups"] == 1 else 1
    found = [_parts(tops, effects, count) for count in range(1, min(most, len(tops)) + 1)]
    return _Plan(now, tuple(error for error, _ in found), tuple(parts for _, parts in found), Tensor(), tops, widest)


def _factors(chain: _Chain, seen: _Seen, widest: float) -> tuple[float, float, Tensor]:
    """The error without factors, with the best, and these, (c,).

    What LeakyReLU reads is rounded too, and reaches ten times as far down: then neither map's channels reach equally
    far, and how far the map before it reaches, beside the one behind it, is searched for."""
    tops, effects = seen.peaks[chain.value].clamp_min(1e-30), seen.effects[chain.value]
    if chain.act is None or chain.act.op == "relu" or chain.act.attrs["kind"] != "LeakyReLU":
        factors = (widest / tops).clamp(max=WIDEST)
        return (
            seen.error(chain.value, widest),
            _step_variance(widest) * float((effects / factors.square()).sum()),
            factors,
        )
    before, through = seen.peaks[chain.conv.name].clamp_min(1e-30), seen.effects[chain.conv.name]

    def error(reach: float, factors: Tensor) -> float:
        both = _step_variance(reach) * through + _step_variance(widest) * effects
        return float((both / factors.square()).sum())

    found: list[tuple[float, Tensor]] = []
    for reach in (widest * 2 ** (i / 4) for i in range(-4, 15)):
        factors = torch.minimum(reach / before, widest / tops).clamp(max=WIDEST)
        found.append((error(reach, factors), factors))
    best, factors = min(found, key=lambda one: one[0])
    return error(float(before.max()), torch.ones_like(tops)), best, factors


def _parts(tops: Tensor, effects: Tensor, count: int) -> tuple[float, tuple[tuple[int, ...], ...]]:
    """The channels in so many parts of similar tops, so that the error is least, which comes first: the dynamic program
    over channels in the order of their tops."""
    order = tops.argsort()
    steps = _step_variance(1.0) * tops[order].double().square()
    before = torch.cat((torch.zeros(1), effects[order].cumsum(0))).double()
    channels = len(order)
    least = torch.full((channels + 1,), torch.inf, dtype=torch.float64)  # of the first so many channels
    least[0] = 0.0
    begins: list[list[int]] = []  # for each number of parts and of channels, where the last part begins
    for _ in range(count):
        made, where = torch.full_like(least, torch.inf), [0] * (channels + 1)
        for end in range(1, channels + 1):
            costs = least[:end] + steps[end - 1] * (before[end] - before[:end])
            where[end] = int(costs.argmin())
            made[end] = costs[where[end]]
        least = made
        begins.append(where)
    parts, end = list[tuple[int, ...]](), channels
    for where in reversed(begins):
        parts.insert(0, tuple(sorted(order[where[end] : end].tolist())))
        end = where[end]
    return float(least[channels]), tuple(parts)


def _give_factors(graph: Graph, params: dict[str, ConvParams], chain: _Chain, factors: Tensor) -> None:
    """Multiply each channel of the map by its factor (c,) where it is made, and divide by it where it is read."""
    p = params[chain.conv.name]
    params[chain.conv.name] = ConvParams(p.weight * factors[:, None, None, None], p.bias * factors)
    _divide_readers(graph, params, chain, factors)


def _divide_readers(graph: Graph, params: dict[str, ConvParams], chain: _Chain, factors: Tensor) -> None:
    nodes = {node.name: node for node in graph.nodes}
    padded = torch.cat((factors, torch.ones(1)))  # the last is of channels that are none of the map's
    for reader in chain.readers:
        p, groups = params[reader.name], nodes[reader.name].attrs["groups"]
        by_group = padded[list(reader.owners)].unflatten(0, (groups, -1))  # (groups, chi / groups)
        rows = by_group.repeat_interleave(len(p.weight) // groups, 0)  # (cho, chi / groups)
        params[reader.name] = ConvParams(p.weight / rows[:, :, None, None], p.bias)


def _in_parts(graph: Graph, params: dict[str, ConvParams], chain: _Chain, plan: _Plan, count: int) -> Graph:
    """The chain with a convolution and an activation for each part, all reaching as far as the widest map that is
    joined with them."""
    assert chain.act is not None
    parts = plan.parts[count - 1]
    times = [min(plan.widest / max(float(plan.tops[list(part)].max()), 1e-30), WIDEST) for part in parts]
    factors = torch.empty(len(plan.tops))
    for part, by in zip(parts, times, strict=True):
        factors[list(part)] = by
    _divide_readers(graph, params, chain, factors)
    conv, act, value = chain.conv, chain.act, chain.value
    nodes = list[Node]()
    for node in graph.nodes:
        if node is not conv and node is not act:
            nodes.append(node)
        elif count == 1:
            nodes.append(node if node is conv else replace(act, name=f"{value}.before"))
            if node is act:
                nodes.append(Node("times", value, (f"{value}.before",), {"by": times[0]}))
        elif node is conv:
            given = params.pop(conv.name)
            for i, part in enumerate(parts):
                nodes.append(replace(conv, name=f"{conv.name}.part{i}"))
                params[nodes[-1].name] = ConvParams(given.weight[list(part)], given.bias[list(part)])
        else:
            for i, by in enumerate(times):
                nodes.append(Node("act", f"{value}.part{i}", (f"{conv.name}.part{i}",), act.attrs))
                nodes.append(Node("times", f"{value}.times{i}", (nodes[-1].name,), {"by": by}))
            nodes += _joined(value, [f"{value}.times{i}" for i in range(count)], parts)
    return replace(graph, nodes=tuple(nodes))


def _joined(value: str, names: Sequence[str], parts: Sequence[Sequence[int]]) -> list[Node]:
    """The parts as one map, its channels in the order that they had."""
    together = [channel for part in parts for channel in part]
    back = [together.index(channel) for channel in range(len(together))]
    if back == list(range(len(back))):
        return [Node("concat", value, tuple(names), {})]
    return [
        Node("concat", f"{value}.joined", tuple(names), {}),
        Node("select", value, (f"{value}.joined",), {"channels": back}),
    ]
