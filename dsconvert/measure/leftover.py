"""Predict which share of a layer's rounding error the fit will leave, before the layer is fitted.

GPTQ rounds the columns of W one after another, and later columns compensate the errors of earlier ones. With H = L^T D
L, L unit lower triangular in the order of rounding, the objective J becomes

    J = sum over columns of D_ii e_ii^2,    e: each column's own rounding error

while rounding to the nearest leaves sum H_ii e_ii^2 (LDLQ, arXiv 2307.13304, section 3). Errors are of similar size in
all columns, so the share tr D / tr H of J is left. Where output channels are fitted together, the same share of G is
left besides. The share varies between layers from a sixth to two thirds: the columns of a large input map are nearly
linearly dependent.
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

IMAGES = 16  # most images looked at, evenly spread


class Left(NamedTuple):
    """The shares (0..1) of a layer's J that the compensation over columns and over output channels leave."""

    columns: float
    channels: float

    def of(self, format: WeightFormat) -> float:
        """Return the share that is left in a format; at 8 bits output channels are not fitted together."""
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
    """Return the shares for each convolution, from the float network's inputs.

    Grouped convolutions, and convolutions that nothing depends on, are left out: their errors are not compensated.

    images: returns this process's image of an index, (1, 3, h, w).
    drawn, channels: as in `Importance`.
    part: which images of all this process has.
    photographs: how many of all images are not views of others.
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
    """Return a node's value for one image, kept in half precision."""
    return float_step(node, [x.float() for x in inputs], params).clamp_(-HALF_MAX, HALF_MAX).half()


def left_by(moment: Tensor) -> float:
    """Return tr D / tr H of a positive definite H (n, n), with its largest diagonal entries rounded first."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    last_first = order.flip(0)  # the Cholesky factor's first row belongs to the column that is rounded last
    factor, failed = torch.linalg.cholesky_ex(moment[last_first][:, last_first])
    if int(failed):  # constant inputs, as behind a dead layer: H holds only rounding noise
        return 1.0
    return float(factor.diagonal().square().sum() / moment.diagonal().sum())
