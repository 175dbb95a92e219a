"""How much of a layer's rounding errors the fit will leave, foretold before there are widths to fit.

Rounding the columns of W one after the other, each error made up for by the columns still to come, leaves a diagonal
form of J: with H = L^T D L, L unit lower triangular in their order, J is the sum of D_ii e_ii^2 over the errors e of
each column alone (LDLQ, arXiv 2307.13304, section 3), where rounding to the nearest has that of H_ii. Errors are alike
from column to column, so tr D / tr H of J is left; of output channels fitted together, the same share of G besides.
From layer to layer it goes from a sixth to two thirds: a large input map's columns are nearly linear in each other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from dsconvert.base.threads import in_order, threads_for
from dsconvert.dsconv.format import WeightFormat
from dsconvert.fit.channels import damped as damped_channels
from dsconvert.fit.moments import damped_hessian, damping_for, measure_moments
from dsconvert.fit.seen import HALF_MAX, Drawn, Seen
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import float_step
from dsconvert.measure.importance import Part

IMAGES = 16  # looked at, evenly spread


class Left(NamedTuple):
    """Shares (0..1) of a layer's J that are left by columns, and by output channels fitted together."""

    columns: float
    channels: float

    def of(self, format: WeightFormat) -> float:
        """The share in a format: at 8 bits channels are fitted on their own."""
        return self.columns * (self.channels if format.bits < 8 else 1.0)


def left_over(
    graph: Graph,
    params: Mapping[str, ConvParams],
    images: Callable[[int], Tensor],
    drawn: Mapping[str, Drawn],
    channels: Mapping[str, Tensor],
    part: Part,
    photographs: int,
) -> dict[str, Left]:
    """Shares by convolution name, from the float network's inputs. Grouped convolutions, and those that nothing depends
    on, are left out: nothing makes up for their errors.

    images: (1, 3, h, w) by number, this process's `part` of all.
    drawn, channels: as `Importance` has them.
    photographs: how many of all images are no views of others.
    """
    step = max(1, part.all // IMAGES)
    taken = [index for index in range(part.mine) if (part.first + index) % step == 0]
    values: dict[str, list[Tensor]] = {INPUT: [images(index).half() for index in taken]}
    last, found = graph.last_use(), {}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            if node.op == "conv" and node.attrs["groups"] == 1 and not drawn[node.name].even:
                weight, nothing = params[node.name].weight, torch.empty(0, 1)
                seen = (
                    Seen(x[0].float(), nothing.expand(0, len(places.picks)), *places)
                    for x, places in zip(values[node.inputs[0]], map(drawn[node.name].get, taken), strict=True)
                )
                hessian = measure_moments(node, torch.Size((0, *weight.shape[1:])), seen).hessian
                with threads_for(weight.numel()):
                    by_columns = left_by(damped_hessian(hessian, damping_for(photographs)))
                    by_channels = left_by(damped_channels(channels[node.name]))
                found[node.name] = Left(by_columns, by_channels)
            inputs = list(zip(*(values[name] for name in node.inputs), strict=True))
            values[node.name] = list(in_order(partial(_float_value, node, params), inputs))
            for name in set(node.inputs):
                if last[name] == index:
                    del values[name]
    return found


def _float_value(node: Node, params: Mapping[str, ConvParams], inputs: Sequence[Tensor]) -> Tensor:
    """What a node of the float network makes of one image's values, kept in half precision: so is the result."""
    return float_step(node, [x.float() for x in inputs], params).clamp_(-HALF_MAX, HALF_MAX).half()


def left_by(moment: Tensor) -> float:
    """tr D / tr H of a positive definite H (n, n) with its largest diagonal entries first."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    last_first = order.flip(0)  # what comes last has nothing left to make up for it
    factor, failed = torch.linalg.cholesky_ex(moment[last_first][:, last_first])
    if int(failed):  # constant inputs, as behind a dead layer: rounding noise
        return 1.0
    return float(factor.diagonal().square().sum() / moment.diagonal().sum())
