"""How much each layer's weight error costs at each width, from the gradients that `importance` has anyway.

A weight error D moves the measured numbers v by J D, to first order. With g = J^T s the gradient of the weight for
random signs s, E[<g, D>^2] = ||J D||^2. Rounding errors are of either sign, independent from weight to weight: in the
mean over their signs too that is E[sum g^2 D^2], which varies much less from one s to another than <g, D>^2 does. One
backward pass an image judges every layer at every width at once.
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
    """What a layer of so many input channels can be stored in: of 8 bits one, as all block sizes are the same there."""
    formats = dict.fromkeys(usual_format(b, channels, size) for b in bits for size in block_sizes)
    return [f for f in formats if f.code.fits(f.bits, channels, f.block_size)]


def damage_of(weight: Tensor, formats: Sequence[WeightFormat], squares: Tensor) -> dict[WeightFormat, float]:
    """sum g^2 D^2 by format, for the sum of g^2 over images, of the weight's shape (cho, chi, kh, kw)."""
    return {f: f.code.damage(weight, f, squares) for f in formats}


def squared_gradient(node: Node, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """g^2 of the weight (cho, chi, kh, kw) for one image: x (1, chi, h, w) the layer's input, gradient (1, cho, h', w')
    of its output.

    A weight error's mean over an output channel is left out (the gradient is centred), as CDSb will correct it."""
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    return conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"]).square_()
