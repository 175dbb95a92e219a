"""Fit one layer: from its float weight, a format and images to a quantized convolution.

Checkpoints, ONNX files and torch modules all call this. A fit is an object with one method, `layer`; `GPTQ` is the
product's. `convert.quantize` takes a maker of another fit (see benchmarks/named_fits.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.gptq import fit_weight_gptq
from dsconvert.fit.moments import Moments, measure_moments
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node
from dsconvert.graph.ops import conv

Batches = Callable[[], Iterable[Seen]]  # gives the images as one layer sees them; may be called several times


class Fit(Protocol):
    """Chooses a layer's integers and shifts."""

    def layer(self, node: Node, weight: Tensor, format: WeightFormat, batches: Batches) -> QConv:
        """Return the layer quantized in a format, with its bias CDSb.

        node: the convolution, for its stride, padding, dilation and groups.
        weight: (cho, chi / groups, kh, kw), float.
        batches: gives the calibration images as the layer sees them.
        """
        ...


# makes a fit from the second moments of output gradients, by convolution name, and the number of photographs
Maker = Callable[[Mapping[str, Tensor], int], Fit]


@dataclass(frozen=True)
class GPTQ:
    """Asymmetric GPTQ (see `gptq`), applied to each group of channels by itself.

    Some layers get the nearest weight instead, with the CDSw and CDSb of `fit_cds`. Their H would be too large, or
    their stride or dilation differs between height and width, or they are depthwise (one input channel a group).
    """

    # second moments (cho, cho) of output gradients by convolution name; the channels of these layers are fitted
    # together
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    photographs: int | None = None  # images that are not views of others; they set the damping. None: all images
    most_columns: int | None = None  # largest K, the number of H's columns; None: no limit

    def layer(self, node: Node, weight: Tensor, format: WeightFormat, batches: Batches) -> QConv:
        groups = node.attrs["groups"]
        if self._is_for_weights_alone(node, weight):
            return fit_cds(node, DSTensor.nearest(weight, format), batches())
        alone = replace(node, attrs={**node.attrs, "groups": 1})
        together = self.together(node, format)
        fitted = []
        for group, part in enumerate(weight.chunk(groups)):
            moments = self.moments(alone, part, of_group(batches(), group, groups))
            found = fit_weight_gptq(part, moments, format.integers, together)
            parts = format.code.refit(found, moments.hessian, moments.cross, format)
            fitted.append(moments.with_bias(DSTensor(*parts, format)))
        return QConv(DSTensor.joined([f.weight for f in fitted]), torch.cat([f.bias for f in fitted]))

    def moments(self, node: Node, weight: Tensor, images: Iterable[Seen]) -> Moments:
        """Measure the moments of J for a layer without groups."""
        return measure_moments(node, weight.shape, images, self.photographs)

    def together(self, node: Node, format: WeightFormat) -> Tensor | None:
        """Return the second moment by which a layer's channels are fitted together, or None.

        Channels are fitted together below 8 bits, without groups and with integer shifts.
        """
        if node.attrs["groups"] > 1 or format.bits == 8 or format.code.real:
            return None
        return self.channels.get(node.name)

    def _is_for_weights_alone(self, node: Node, weight: Tensor) -> bool:
        """Return whether the layer gets the nearest weight: see the class."""
        if self.most_columns is not None and weight[0].numel() > self.most_columns:
            return True
        if any(isinstance(node.attrs[key], tuple) for key in ("stride", "dilation")):
            return True
        return bool(node.attrs["groups"] > 1 and weight.shape[1] == 1)


def of_group(images: Iterable[Seen], group: int, groups: int) -> Iterator[Seen]:
    """Yield the images as one group of a layer's channels sees them."""
    for seen in images:
        if groups == 1:
            yield seen
        else:
            given, made = seen.input.chunk(groups)[group], seen.float_output.chunk(groups)[group]
            yield replace(seen, input=given, float_output=made)


def fit_cds(node: Node, weight: DSTensor, images: Iterable[Seen]) -> QConv:
    """Fit CDSw and CDSb by weighted regression of float outputs y on accumulators a = conv(x, m VQK), for each channel.

        argmin sum w (CDSw a + CDSb - y)^2  ->  CDSw = cov(a, y) / var(a),    CDSb = mean(y) - CDSw mean(a)

    The old CDSw stays where the accumulator is constant, or where CDSw would change by more than a factor of two.
    """
    merged = weight.unscaled()
    sums = torch.zeros(5, weight.vqk.shape[0], dtype=torch.float64)
    for seen in images:
        x = seen.real(seen.input)[None]
        acc = conv(node, x, merged.to(x), None)[0].flatten(1)[:, seen.picks.to(x.device)]
        a, t = (v.to(x.device).double() for v in (acc, seen.float_output))
        w = seen.weights.to(a)
        total = w.sum().expand(len(a))
        sums += torch.stack((total, a @ w, t @ w, a.square() @ w, (a * t) @ w)).cpu()
    n, sa, st, saa, sat = workers.summed(sums)
    var, cov = saa / n - (sa / n) ** 2, sat / n - (sa / n) * (st / n)
    old = weight.cds_w.double()
    cds = cov / var.clamp_min(1e-30)
    usable = (var > 1e-12) & (cds > 0.5 * old) & (cds < 2 * old)
    cds = torch.where(usable, cds, old)
    return QConv(replace(weight, cds_w=cds.float()), ((st - cds * sa) / n).float())
