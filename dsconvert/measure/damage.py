"""Estimate what each layer's weight error costs in each format, from the gradients that `importance` computes anyway.

A weight error D changes the measured numbers v by J D, to first order. With the weight's gradient g = J^T s for random
signs s,

    E[<g, D>^2] = ||J D||^2

Rounding errors have random signs, independent between weights. The mean over these signs is E[sum g^2 D^2], which
varies much less with s than <g, D>^2. So one backward pass for each image judges every layer in every format.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    return conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"]).square_()
