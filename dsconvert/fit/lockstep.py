"""The float and the quantized network side by side over the calibration images, one node at a time.

At every convolution the quantized side has real, already quantized inputs and the float side has the outputs it
should have made; what is fitted there therefore also makes up for errors of the layers before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.integer import QConv, QParams, grid_of, integer_step
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import conv, float_step

Progress = Callable[[int, int], None]


def fit_lockstep(
    graph: Graph,
    params: Mapping[str, ConvParams],
    weights: Mapping[str, DSTensor],
    own: Mapping[str, QParams],
    batches: Sequence[Tensor],
    progress: Progress | None = None,
) -> dict[str, QConv]:
    """Fit CDSw and CDSb of every convolution to the float network's outputs; VQK and KDS stay as given.

    `batches` are image batches (n, 3, h, w). Values are kept for all batches at once, the quantized side as
    uint8, and released after their last use.
    """
    grids = grid_of(graph, own)
    floats: dict[str, list[Tensor]] = {INPUT: list(batches)}
    quants: dict[str, list[Tensor]] = {INPUT: [grids[INPUT].quantize(x).to(torch.uint8) for x in batches]}
    last = graph.last_use()
    fitted: dict[str, QConv] = {}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            floats[node.name] = _each(node, floats, lambda xs, n=node: float_step(n, xs, params))  # type: ignore[misc]
            if node.op == "conv":
                source = grids[node.inputs[0]]
                fitted[node.name] = fit_cds(
                    node,
                    weights[node.name],
                    params[node.name],
                    quants[node.inputs[0]],
                    floats[node.name],
                    source,
                )
            quants[node.name] = _each(
                node,
                quants,
                lambda xs, n=node: integer_step(n, [x.float() for x in xs], fitted, grids).to(torch.uint8),  # type: ignore[misc]
            )
            for name in set(node.inputs):
                if last[name] == index:
                    del floats[name], quants[name]
            if progress:
                progress(index + 1, len(graph.nodes))
    return fitted


def _each(node: Node, values: Mapping[str, list[Tensor]], step: Callable[[list[Tensor]], Tensor]) -> list[Tensor]:
    return [step(list(xs)) for xs in zip(*(values[name] for name in node.inputs), strict=True)]


def fit_cds(
    node: Node,
    weight: DSTensor,
    params: ConvParams,
    quant_inputs: Sequence[Tensor],
    float_outputs: Sequence[Tensor],
    source: QParams,
) -> QConv:
    """CDSw and CDSb as the regression of the float outputs on the integer accumulators, per output channel.

    argmin sum (CDSw * acc + CDSb - y)^2 gives CDSw = cov(acc, y) / var(acc), CDSb = mean(y) - CDSw * mean(acc).
    The old CDSw stays where the accumulator is constant or the regression would turn the weight's sign.
    """
    merged = weight.merged().float()
    sums = torch.zeros(5, weight.vqk.shape[0], dtype=torch.float64)
    for q, y in zip(quant_inputs, float_outputs, strict=True):
        acc = conv(node, (q.float() - source.zero_point) * source.scale, merged, None)
        a, t = acc.transpose(0, 1).flatten(1).double(), y.transpose(0, 1).flatten(1).double()
        count = torch.full_like(a[:, 0], a.shape[1])
        sums += torch.stack((count, a.sum(1), t.sum(1), a.square().sum(1), (a * t).sum(1)))
    n, sa, st, saa, sat = sums
    var, cov = saa / n - (sa / n) ** 2, sat / n - (sa / n) * (st / n)
    old = weight.cds_w.double()
    cds = cov / var.clamp_min(1e-30)
    usable = (var > 1e-12) & (cds > 0.5 * old) & (cds < 2 * old)
    cds = torch.where(usable, cds, old)
    return QConv(replace(weight, cds_w=cds.float()), ((st - cds * sa) / n).float())
