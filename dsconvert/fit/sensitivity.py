"""How much each layer's weight error costs at each width, from the gradients that `importance` has anyway.

A weight error D moves the measured numbers v by J D, to first order. With g = J^T s the gradient for random signs s,
E[<g, D>^2] = ||J D||^2: one backward pass an image judges every layer at every width at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.grad import conv2d_weight

from dsconvert.dsconv.tensor import used_block_size
from dsconvert.fit.least_squares import fit_weight
from dsconvert.graph.ir import ConvParams, Node

# convolution name -> bits -> W' - W (cho, chi, kh, kw)
WeightErrors = Mapping[str, Mapping[int, Tensor]]


def weight_errors(
    params: Mapping[str, ConvParams], names: Sequence[str], block_size: int, widths: Sequence[int]
) -> dict[str, dict[int, Tensor]]:
    """Least-squares errors from one starting scale; at 8 bits of plain per-channel int8."""
    made: dict[str, dict[int, Tensor]] = {}
    for name in names:
        weight = params[name].weight
        blocks = {b: used_block_size(b, weight.shape[1], block_size) for b in widths}
        made[name] = {
            b: fit_weight(weight, b, blocks[b], starts=(0.8,), rounds=1).weight().to(weight) - weight for b in widths
        }
    return made


def squared_effects(node: Node, x: Tensor, gradient: Tensor, errors: Mapping[int, Tensor]) -> dict[int, float]:
    """<g, D>^2 by width, for one image: x (1, chi, h, w) the layer's input, gradient (1, cho, h', w') of its output.

    The error's mean over an output channel is left out (the gradient is centred), as CDSb will correct it."""
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    shape = next(iter(errors.values())).shape
    g = conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"])
    return {bits: float(g.flatten() @ error.flatten()) ** 2 for bits, error in errors.items()}
