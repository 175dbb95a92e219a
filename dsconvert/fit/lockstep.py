"""The float and the quantized network side by side over the calibration images, one node at a time.

At every convolution the quantized side has real, already quantized inputs and the float side has the outputs it
should have made; what is fitted there therefore also makes up for errors of the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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
# (node, its weight, what it sees) -> the fitted weight
FitLayer = Callable[[Node, Tensor, Iterable[Seen]], DSTensor]


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
    scaled: Collection[str] = (),
) -> dict[str, QConv]:
    """Fit every convolution: VQK and KDS by `fit_layer`, then CDSw and CDSb to the float network's outputs.

    `batches` are image batches (n, 3, h, w), read once; `first` is the place of the first image in the calibration set.
    `own` are the activation grids; without any, activations stay float on both sides. `positions` weights every
    convolution's output positions, (images, h' w'); by default all count the same. Convolutions that are `scaled` keep
    the CDSw that `fit_layer` gave them, and get CDSb alone. What is `known` is taken as it is;
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
            made = (float_step(node, [x.float() for x in xs], params) for xs in _inputs(node, floats))
            floats[node.name] = [y.clamp_(-HALF_MAX, HALF_MAX).half() for y in made]
            if node.op == "conv" and known and node.name in known:
                fitted[node.name] = known[node.name]
            elif node.op == "conv":
                seen = _seen(node, floats, quants, side, (positions or {}).get(node.name), first)
                weight = fit_layer(node, params[node.name].weight, seen())
                fitted[node.name] = side.roomy(node, fit_cds(node, weight, seen(), node.name in scaled))
                if finished:
                    finished(fitted)
            quants[node.name] = [side.step(node, xs, fitted) for xs in _inputs(node, quants)]
            for name in set(node.inputs):
                if last[name] == index:
                    del floats[name], quants[name]
            if progress:
                progress(index + 1, len(graph.nodes))
    return fitted


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


def fit_bias(node: Node, weight: DSTensor, batches: Iterable[Seen]) -> QConv:
    """CDSb = mean(y) - CDSw mean(a) of the accumulators a and float outputs y of `fit_cds`, CDSw as it is. No groups.

    The mean of a is the weight on the mean of what it meets, so no convolution is computed."""
    chi, *kernel = weight.vqk.shape[1:]
    inputs = torch.zeros(chi, kernel[0] * kernel[1], dtype=torch.float64)
    outputs, total = torch.zeros(len(weight.vqk), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for seen in batches:
        x, y = seen.real(seen.input), seen.float_output.float()
        w = seen.weights.to(x).unflatten(1, y.shape[2:])
        inputs += torch.bmm(x.flatten(2), _met_by_taps(node, kernel, w, x.shape[2:])).sum(0).double().cpu()
        outputs += torch.bmm(y.flatten(2), w.flatten(1)[..., None]).sum((0, 2)).double().cpu()
        total += w.sum(dtype=torch.float64).cpu()
    inputs, outputs, total = (workers.summed(t) for t in (inputs, outputs, total))
    mean = (weight.unscaled().double().flatten(2) * inputs / total).sum((1, 2))
    return QConv(weight, (outputs / total - weight.cds_w.double() * mean).float())


def _met_by_taps(node: Node, kernel: Sequence[int], weights: Tensor, size: Sequence[int]) -> Tensor:
    """How much what every tap meets at an input position (h, w) counts, given the weights (n, h', w') of output
    positions: (n, h w, taps)."""
    a = node.attrs
    pad, (h, w), (rows, columns) = a["padding"], size, weights.shape[1:]
    met = weights.new_zeros(len(weights), kernel[0], kernel[1], h + 2 * pad, w + 2 * pad)
    for y in range(kernel[0]):
        for x in range(kernel[1]):
            at = met[:, y, x, y * a["dilation"] :: a["stride"], x * a["dilation"] :: a["stride"]]
            at[:, :rows, :columns] = weights
    return met[..., pad : pad + h, pad : pad + w].flatten(3).flatten(1, 2).mT


def fit_cds(node: Node, weight: DSTensor, batches: Iterable[Seen], scaled: bool = False) -> QConv:
    """CDSw and CDSb as the weighted regression of float outputs y on accumulators a = conv(x, m VQK + z), per channel.

    argmin sum w (CDSw a + CDSb - y)^2 gives CDSw = cov(a, y) / var(a), CDSb = mean(y) - CDSw mean(a). The old CDSw
    stays where the accumulator is constant or the regression would move it by more than a factor of two, and where the
    weight is `scaled` already.
    """
    if scaled:
        return fit_bias(node, weight, batches)
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
