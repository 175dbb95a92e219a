"""How much each layer's weight error costs at each width, from the gradients that `importance` has anyway.

A weight error D moves the measured numbers v by J D, to first order. With g = J^T s the gradient for random signs s,
E[<g, D>^2] = ||J D||^2: one backward pass an image judges every layer at every width at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn.grad import conv2d_weight

from dsconvert.dsconv.tensor import Width, used_width
from dsconvert.fit.least_squares import fit_weight
from dsconvert.fit.threads import threads_for
from dsconvert.graph.ir import ConvParams, Node

# convolution name -> width -> W' - W (cho, chi, kh, kw)
WeightErrors = Mapping[str, Mapping[Width, Tensor]]


def weight_errors(
    params: Mapping[str, ConvParams], names: Sequence[str], bits: Sequence[int], block_sizes: Sequence[int]
) -> dict[str, dict[Width, Tensor]]:
    """Least-squares errors from one starting scale; at 8 bits of plain per-channel int8."""
    made: dict[str, dict[Width, Tensor]] = {}
    for name in names:
        weight = params[name].weight
        # a dict, as all block sizes are the same width at 8 bits
        widths = dict.fromkeys(used_width(b, weight.shape[1], size) for b in bits for size in block_sizes)
        widths = {w: None for w in widths if w.bits > 1 or w.runs}  # one bit is for runs alone
        with threads_for(weight.numel()):
            fits = {w: fit_weight(weight, *w, starts=(0.8,), rounds=1) for w in widths}
        made[name] = {w: fit.weight().to(weight) - weight for w, fit in fits.items()}
    return made


def squared_effects(node: Node, x: Tensor, gradient: Tensor, errors: Mapping[Width, Tensor]) -> dict[Width, float]:
    """<g, D>^2 by width, for one image: x (1, chi, h, w) the layer's input, gradient (1, cho, h', w') of its output.

    The error's mean over an output channel is left out (the gradient is centred), as CDSb will correct it."""
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    shape = next(iter(errors.values())).shape
    g = conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"])
    return {width: float(g.flatten() @ error.flatten()) ** 2 for width, error in errors.items()}
