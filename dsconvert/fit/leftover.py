"""How much of a layer's rounding errors the fit will leave, foretold before there are widths to fit.

Rounding the columns of W one after the other, each error made up for by the columns still to come, leaves a diagonal
form of J: with H = L^T D L, L unit lower triangular in their order, J is the sum of D_ii e_ii^2 over the errors e of
each column alone (LDLQ, arXiv 2307.13304, section 3), where rounding to the nearest has that of H_ii. Errors are alike
from column to column, so tr D / tr H of J is left; of output channels fitted together, the same share of G besides.
From layer to layer it goes from a sixth to two thirds: a large input map's columns are nearly linear in each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dsconvert import workers
from dsconvert.dsconv.tensor import Width
from dsconvert.fit import draws
from dsconvert.fit.channels import damped as damped_channels
from dsconvert.fit.channels import gram
from dsconvert.fit.gptq import damped_hessian, unfolded
from dsconvert.fit.lockstep import float_values
from dsconvert.fit.threads import threads_for
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node

IMAGES = 32  # looked at, evenly spread


class Left(NamedTuple):
    """Shares (0..1) of a layer's J that are left by columns, and by output channels fitted together."""

    columns: float
    channels: float

    def of(self, width: Width) -> float:
        """The share at a width: at 8 bits channels are fitted on their own."""
        return self.columns * (self.channels if width.bits < 8 else 1.0)


def left_over(
    graph: Graph,
    params: Mapping[str, ConvParams],
    images: Iterable[Tensor],
    positions: Mapping[str, Tensor],
    channels: Mapping[str, Tensor],
    count: int,
    seed: int,
    first: int = 0,
) -> dict[str, Left]:
    """Shares by convolution name, from the float network's inputs. images (1, 3, h, w) each are this process's, the
    first of them at place `first` among `count`; positions and channels as `Importance` has them. Grouped
    convolutions, and those that nothing depends on, are left out: nothing makes up for their errors."""
    step = max(1, count // IMAGES)
    values: dict[str, list[Tensor]] = {INPUT: []}
    places: list[int] = []
    for place, image in enumerate(images, first):
        if place % step == 0:
            values[INPUT].append(image.half())
            places.append(place)
    last, found = graph.last_use(), {}
    with torch.no_grad():
        for index, node in enumerate(graph.nodes):
            if node.op == "conv" and node.attrs["groups"] == 1 and node.name in positions:
                seen = [
                    (x[0].float(), positions[node.name][place - first], place)
                    for x, place in zip(values[node.inputs[0]], places, strict=True)
                ]
                weight = params[node.name].weight
                with threads_for(weight.numel()):
                    hessian = _hessian(node, weight.shape, seen, seed)
                    by_columns = left_by(damped_hessian(hessian))
                    by_channels = left_by(damped_channels(channels[node.name]))
                found[node.name] = Left(by_columns, by_channels)
            values[node.name] = float_values(node, values, params)
            for name in set(node.inputs):
                if last[name] == index:
                    del values[name]
    return found


def _hessian(node: Node, shape: torch.Size, seen: Iterable[tuple[Tensor, Tensor, int]], seed: int) -> Tensor:
    """cov(x, x) (K, K) over the important positions of (input (chi, h, w), weights (h' w'), place) in all processes."""
    size = shape[1:].numel()
    hessian = torch.zeros(size, size, dtype=torch.float64)
    sums, total = torch.zeros(size, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for x, weights, place in seen:
        picks, w = draws.positions(weights.double(), draws.of_image(seed, place))
        root = w.sqrt().to(x)
        columns = unfolded(x, 0, tuple(shape[2:]), node, picks.to(x.device)) * root
        hessian += gram(columns).cpu()
        sums += (columns @ root).double().cpu()
        total += w.sum()
    hessian, sums, total = (workers.summed(t) for t in (hessian, sums, total))
    mean = sums / total.clamp_min(1e-30)
    return hessian / total.clamp_min(1e-30) - torch.outer(mean, mean)


def left_by(moment: Tensor) -> float:
    """tr D / tr H of a positive definite H (n, n) with its largest diagonal entries first."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    last_first = order.flip(0)  # what comes last has nothing left to make up for it
    factor, failed = torch.linalg.cholesky_ex(moment[last_first][:, last_first])
    if int(failed):  # constant inputs, as behind a dead layer: rounding noise
        return 1.0
    return float(factor.diagonal().square().sum() / moment.diagonal().sum())
