"""Channels of very different ranges are taken apart, where that costs next to nothing.

A map has one grid. Where some channels reach a hundred times as far as others, its step is larger than all that the
others have to say. A convolution whose result only depthwise convolutions read can be two, each with some of the
channels and a grid of its own; the depthwise convolutions are two as well, and what they make is joined.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsconvert.graph.grids import QMAX
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.run import run_float
from dsconvert.onnxfile.lower import Lowered

# mean noise of the channels of depthwise convolutions, as a share of their variance, that is worth the trouble
NOISY = 1e-2
SILENT = 1e-3  # of the median channel's variance
BETTER = 4.0  # times less noise than together, or they stay so


@dataclass(frozen=True)
class _Chain:
    """A convolution, perhaps its activation, and the depthwise convolutions that alone read the result."""

    conv: Node
    act: Node | None
    readers: tuple[Node, ...]

    @property
    def value(self) -> str:
        """What the depthwise convolutions read."""
        return (self.act or self.conv).name


def taken_apart_by_range(low: Lowered, images: Iterable[Tensor]) -> Lowered:
    """The same network, with convolutions in two where noise falls by much on images (1, c, h, w); see the module."""
    chains = _chains(low.graph, low.params)
    if not chains:
        return low
    peaks, spreads = _statistics(low, chains, images)
    for chain in chains:
        groups = _groups(peaks[chain.value], [_gains(low.params[d.name], spreads[d.name]) for d in chain.readers])
        if groups:
            low = _split(low, chain, groups)
    return low


def _chains(graph: Graph, params: Mapping[str, ConvParams]) -> list[_Chain]:
    readers, found, taken = graph.consumers(), list[_Chain](), set[str]()
    for conv in graph.convs():
        value, act = conv, None
        following = readers.get(conv.name, [])
        if len(following) == 1 and following[0].op in ("act", "relu"):
            value = act = following[0]
        reading = tuple(readers.get(value.name, []))
        names = {n.name for n in (conv, value)}
        depthwise = all(_is_depthwise(n, params) for n in reading)
        if not reading or not depthwise or conv.attrs["groups"] > 1 or names & set(graph.outputs) or names & taken:
            continue
        taken |= names | {n.name for n in reading}
        found.append(_Chain(conv, act, reading))
    return found


def _is_depthwise(node: Node, params: Mapping[str, ConvParams]) -> bool:
    """Whether it is one whose output channels are as many as its inputs'."""
    return node.op == "conv" and node.attrs["groups"] == len(params[node.name].weight) > 1


def _statistics(
    low: Lowered, chains: Sequence[_Chain], images: Iterable[Tensor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The largest numbers of each channel of what is split, and the variances of the depthwise convolutions'."""
    wanted, made = {c.value for c in chains}, {d.name for c in chains for d in c.readers}
    peaks: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0

    def visit(name: str, value: Tensor) -> None:
        flat = value[0].flatten(1)
        if name in wanted:
            peak = flat.abs().amax(1)
            peaks[name] = torch.maximum(peaks[name], peak) if name in peaks else peak
        if name in made:
            sums[name] = sums.get(name, torch.zeros(len(flat))) + flat.var(1)

    for image in images:
        run_float(low.graph, low.params, image, visit)
        count += 1
    return peaks, {name: total / max(count, 1) for name, total in sums.items()}


def _gains(p: ConvParams, variance: Tensor) -> Tensor:
    """By how much a depthwise convolution carries its input's noise on, channel by channel, as a share of its output's
    variance. Channels that say next to nothing are not held to the little that they say."""
    least = SILENT * float(variance.median())
    return p.weight.flatten(1).square().sum(1) / variance.clamp_min(max(least, 1e-12))


def _groups(peaks: Tensor, gains: Sequence[Tensor]) -> tuple[list[int], list[int]] | None:
    """The channels in two groups of about equal peaks, the narrow ones first; None where that is not worth it."""
    gain = torch.stack(list(gains)).sum(0)
    order = peaks.argsort()
    steps = (peaks[order] / QMAX).square() / 12  # the variance of a rounding, were the channel the largest
    noise = gain[order].cumsum(0)
    together = float(steps[-1] * noise[-1])
    apart = steps[:-1] * noise[:-1] + steps[-1] * (noise[-1] - noise[:-1])
    if together < NOISY * len(peaks) or float(apart.min()) * BETTER > together:
        return None
    first = int(apart.argmin()) + 1
    return sorted(order[:first].tolist()), sorted(order[first:].tolist())


def _split(low: Lowered, chain: _Chain, groups: tuple[list[int], list[int]]) -> Lowered:
    """The chain in two, its depthwise convolutions' results joined in the order that they had."""
    params, nodes = dict(low.params), list[Node]()
    together = groups[0] + groups[1]
    back = [together.index(i) for i in range(len(together))]
    for node in low.graph.nodes:
        if node in (chain.conv, chain.act):
            nodes += [_part(node, i, params, g, node is not chain.conv) for i, g in enumerate(groups)]
        elif node in chain.readers:
            parts = [_part(node, i, params, g, True) for i, g in enumerate(groups)]
            joined = Node("concat", f"{node.name}.joined", tuple(p.name for p in parts), {})
            nodes += [*parts, joined, Node("select", node.name, (joined.name,), {"channels": back})]
        else:
            nodes.append(node)
    for name in [chain.conv.name, *(d.name for d in chain.readers)]:
        del params[name]
    return replace(low, graph=replace(low.graph, nodes=tuple(nodes)), params=params)


def _part(node: Node, number: int, params: dict[str, ConvParams], group: list[int], reads_part: bool) -> Node:
    """A node for some of the channels."""
    name = f"{node.name}.part{number}"
    if node.op == "conv":
        p = params[node.name]
        params[name] = ConvParams(p.weight[group], p.bias[group])
    attrs = dict(node.attrs)
    if reads_part and node.op == "conv":
        attrs["groups"] = len(group)
    inputs = tuple(f"{x}.part{number}" for x in node.inputs) if reads_part else node.inputs
    return replace(node, name=name, inputs=inputs, attrs=attrs)
