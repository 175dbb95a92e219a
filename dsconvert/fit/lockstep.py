"""The float and the quantized network side by side over the calibration images, one node at a time.

At every convolution the quantized side has real, already quantized inputs and the float side has the outputs it
should have made; what is fitted there therefore also makes up for errors of the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dsconvert import workers
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv, QParams, grid_of, integer_step
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import conv, float_step

HALF_MAX = torch.finfo(torch.half).max
Progress = Callable[[int, int], None]
# (node, its weight, what it sees) -> the fitted convolution, or its weight alone
FitLayer = Callable[[Node, Tensor, Iterable[Seen]], DSTensor | QConv]


@dataclass(frozen=True)
class _Side:
    """How the quantized side keeps values: as uint8 on their grids, or (no grids) as float."""

    grids: Mapping[str, QParams]

    def enter(self, x: Tensor) -> Tensor:
        return self.grids[INPUT].quantize(x).to(torch.uint8) if self.grids else x

    def roomy(self, node: Node, conv: QConv) -> QConv:
        """The convolution with every bias expressible in its accumulator, where there is one."""
        return conv.with_room(self.grids[node.inputs[0]].scale) if self.grids else conv

    def step(self, node: Node, inputs: list[Tensor], convs: Mapping[str, QConv]) -> Tensor:
        if self.grids:
            whole = inputs if node.op == "act" else [x.float() for x in inputs]  # a table is read by any integers
            # by way of int16: torch's own conversion takes twice as long
            return integer_step(node, whole, convs, self.grids).to(torch.int16).to(torch.uint8)
        if node.op == "conv":
            c = convs[node.name]
            return conv(node, inputs[0], c.weight.weight().to(inputs[0]), c.bias.to(inputs[0]))
        return float_step(node, inputs, {})


def fit_lockstep(
    graph: Graph,
    params: Mapping[str, ConvParams],
    fit_layer: FitLayer,
    own: Mapping[str, QParams],
    batches: Iterable[Tensor],
    progress: Progress | None = None,
    positions: Mapping[str, Tensor] | None = None,
    known: Mapping[str, QConv] | None = None,
    finished: Callable[[Mapping[str, QConv]], None] | None = None,
    first: int = 0,
) -> dict[str, QConv]:
    """Fit every convolution by `fit_layer`, and what has no CDSb from there by `fit_cds`.

    `batches` are image batches (n, 3, h, w), read once; `first` is the place of the first image in the calibration set.
    `own` are the activation grids; without any, activations stay float on both sides. `positions` weights every
    convolution's output positions, (images, h' w'); by default all count the same. What is `known` is taken as it is;
    `finished` sees all that is fitted so far, after every convolution that is fitted. Values are kept for all batches
    at once, the float side's in half precision (a hundredth of an activation step), and released after their last use.
    """
    side = _Side(grid_of(graph, own) if own else {})
    floats: dict[str, list[Tensor]] = {INPUT: []}
    quants: dict[str, list[Tensor]] = {INPUT: []}
    for x in batches:
        floats[INPUT].append(x.half())
        quants[INPUT].append(side.enter(x))
    last = graph.last_use()
    fitted: dict[str, QConv] = {}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            floats[node.name] = float_values(node, floats, params)
            if node.op == "conv" and known and node.name in known:
                fitted[node.name] = known[node.name]
            elif node.op == "conv":
                seen = _seen(node, floats, quants, side, (positions or {}).get(node.name), first)
                made = fit_layer(node, params[node.name].weight, seen())
                fitted[node.name] = side.roomy(node, with_shifts(node, made, seen()))
                if finished:
                    finished(fitted)
            quants[node.name] = [side.step(node, xs, fitted) for xs in _inputs(node, quants)]
            for name in set(node.inputs):
                if last[name] == index:
                    del floats[name], quants[name]
            if progress:
                progress(index + 1, len(graph.nodes))
    return fitted


def float_values(node: Node, floats: Mapping[str, list[Tensor]], params: Mapping[str, ConvParams]) -> list[Tensor]:
    """What a node of the float network makes of values kept in half precision, batch by batch, in half precision."""
    steps = (float_step(node, [x.float() for x in xs], params) for xs in _inputs(node, floats))
    return [y.clamp_(-HALF_MAX, HALF_MAX).half() for y in steps]


def _seen(
    node: Node,
    floats: Mapping[str, list[Tensor]],
    quants: Mapping[str, list[Tensor]],
    side: _Side,
    w: Tensor | None,
    place: int,
) -> Callable[[], Iterator[Seen]]:
    """Batches made on the fly, as often as they are asked for."""
    source = node.inputs[0]

    def batches() -> Iterator[Seen]:
        first = 0
        for q, y in zip(quants[source], floats[node.name], strict=True):
            last = first + len(q)
            weights = torch.ones(len(y), y.shape[2] * y.shape[3], device=y.device) if w is None else w[first:last]
            yield Seen(q, y, weights, place + first, side.grids.get(source))
            first = last

    return batches


def _inputs(node: Node, values: Mapping[str, list[Tensor]]) -> list[list[Tensor]]:
    """The node's inputs, batch by batch."""
    return [list(xs) for xs in zip(*(values[name] for name in node.inputs), strict=True)]


def with_shifts(node: Node, made: DSTensor | QConv, batches: Iterable[Seen]) -> QConv:
    """What is fitted already as it is, and a weight alone with the shifts of `fit_cds`."""
    return made if isinstance(made, QConv) else fit_cds(node, made, batches)


def fit_cds(node: Node, weight: DSTensor, batches: Iterable[Seen]) -> QConv:
    """CDSw and CDSb as the weighted regression of float outputs y on accumulators a = conv(x, m VQK + z), per channel.

    argmin sum w (CDSw a + CDSb - y)^2 gives CDSw = cov(a, y) / var(a), CDSb = mean(y) - CDSw mean(a). The old CDSw
    stays where the accumulator is constant or the regression would move it by more than a factor of two.
    """
    merged = weight.unscaled()
    sums = torch.zeros(5, weight.vqk.shape[0], dtype=torch.float64)
    for seen in batches:
        x = seen.real(seen.input)
        acc = conv(node, x, merged.to(x), None)
        a, t = (v.transpose(0, 1).flatten(1).double() for v in (acc, seen.float_output))
        w = seen.weights.flatten().to(a)
        total = w.sum().expand(len(a))
        sums += torch.stack((total, a @ w, t @ w, a.square() @ w, (a * t) @ w)).cpu()
    n, sa, st, saa, sat = workers.summed(sums)
    var, cov = saa / n - (sa / n) ** 2, sat / n - (sa / n) * (st / n)
    old = weight.cds_w.double()
    cds = cov / var.clamp_min(1e-30)
    usable = (var > 1e-12) & (cds > 0.5 * old) & (cds < 2 * old)
    cds = torch.where(usable, cds, old)
    return QConv(replace(weight, cds_w=cds.float()), ((st - cds * sa) / n).float())
