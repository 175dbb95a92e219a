"""Estimate what each layer's weight error costs in each format, from the gradients that `importance` computes anyway.

A weight error D changes the measured numbers v by J D, to first order. With the weight's gradient g = J^T s for random
signs s,

    E[<g, D>^2] = ||J D||^2

Rounding errors have random signs, independent between weights. The mean over these signs is E[sum g^2 D^2], which
varies much less with s than <g, D>^2. So one backward pass for each image judges every layer in every format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from dsconvert.dsconv.codes import usual_format
from dsconvert.dsconv.format import WeightFormat
from dsconvert.graph.ir import Node


def formats_of(channels: int, bits: Sequence[int], block_sizes: Sequence[int]) -> list[WeightFormat]:
    """Return the formats that a layer of so many input channels can be stored in.

    At 8 bits there is one, as every block size gives the same weight.
    """
    formats = dict.fromkeys(usual_format(b, channels, size) for b in bits for size in block_sizes)
    return [f for f in formats if f.code.fits(f.bits, channels, f.block_size)]


def damage_of(weight: Tensor, formats: Sequence[WeightFormat], squares: Tensor) -> dict[WeightFormat, float]:
    """Return sum g^2 D^2 for each format, where D is the weight's rounding error.

    weight, squares: (cho, chi, kh, kw); squares is g^2, summed over images.
    """
    return {f: f.code.damage(weight, f, squares) for f in formats}


def squared_gradient(node: Node, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """Return g^2 of a weight (cho, chi, kh, kw) for one image.

    The output's gradient is centred first: the mean error of an output channel does no damage, as CDSb corrects it.

    x: the layer's input (1, chi, h, w).
    gradient: of its output (1, cho, h', w').
    """
    return _of_weight(node, x, gradient - gradient.mean((2, 3), keepdim=True), shape).square_()


@dataclass(frozen=True)
class Spots:
    """Sums over images of a layer whose map has one position, as behind a global mean.

    Centred there, a gradient would be 0. CDSb corrects the mean error over images. With G the gradient of a weight, and
    g the gradient of its output,

        min over c of sum (G - g c)^2  =  sum G^2 - (sum g G)^2 / sum g^2
    """

    squares: Tensor  # sum G^2, (cho, chi, kh, kw)
    products: Tensor  # sum g G, of the same shape
    outputs: Tensor  # sum g^2, (cho, 1, 1, 1)

    @staticmethod
    def of(node: Node, x: Tensor, gradient: Tensor, shape: torch.Size) -> Spots:
        """Of one image; see `squared_gradient`."""
        of_weight, of_output = _of_weight(node, x, gradient, shape), gradient.reshape(-1, 1, 1, 1)
        return Spots((of_weight**2).cpu(), (of_weight * of_output).cpu(), (of_output**2).cpu())

    @staticmethod
    def none(weight: Tensor) -> Spots:
        """Of no image, for a weight of that shape."""
        nothing = torch.zeros_like(weight)
        return Spots(nothing, nothing, nothing[:, :1, :1, :1])

    def plus(self, other: Spots) -> Spots:
        """Of the images of both."""
        outputs = self.outputs + other.outputs
        return Spots(self.squares + other.squares, self.products + other.products, outputs)

    def centred(self) -> Tensor:
        """Return the sum over images of g^2 of the weight, with what CDSb corrects left out, (cho, chi, kh, kw)."""
        return (self.squares - self.products.square() / self.outputs.clamp_min(1e-30)).clamp_min(0)


def _of_weight(node: Node, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    a = node.attrs
    return conv2d_weight(x, shape, gradient, a["stride"], a["padding"], a["dilation"], a["groups"])
