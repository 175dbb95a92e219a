"""How much each layer's weight error costs at each width, from the gradients that `importance` has anyway.

A weight error D moves the measured numbers v by J D, to first order. With g = J^T s the gradient of the weight for
random signs s, E[<g, D>^2] = ||J D||^2. Rounding errors are of either sign, independent from weight to weight: in the
mean over their signs too that is E[sum g^2 D^2], which varies much less from one s to another than <g, D>^2 does. One
backward pass an image judges every layer at every width at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.grad import conv2d_weight

from dsconvert.dsconv.tensor import Width, used_width
from dsconvert.fit.least_squares import fit_weight
from dsconvert.fit.threads import threads_for
from dsconvert.graph.ir import ConvParams, Node

# convolution name -> width -> W' - W (cho, chi, kh, kw)
WeightErrors = Mapping[str, Mapping[Width, Tensor]]
MOST = 4.0  # times as long a fitted channel may become


def weight_errors(
    params: Mapping[str, ConvParams], names: Sequence[str], bits: Sequence[int], block_sizes: Sequence[int]
) -> dict[str, dict[Width, Tensor]]:
    """Least-squares errors from two starting scales; at 8 bits of plain per-channel int8."""
    made: dict[str, dict[Width, Tensor]] = {}
    for name in names:
        weight = params[name].weight
        # a dict, as all block sizes are the same width at 8 bits
        widths = dict.fromkeys(used_width(b, weight.shape[1], size) for b in bits for size in block_sizes)
        widths = {w: None for w in widths if w.bits > 1 or w.runs}  # one bit is for runs alone
        with threads_for(weight.numel()):
            # many bits are best at 1, where nothing is clipped, few at 0.8
            fits = {w: fit_weight(weight, *w, starts=(1.0, 0.8), rounds=1) for w in widths}
        made[name] = {w: unshrunk(weight, fit.weight().to(weight)) - weight for w, fit in fits.items()}
    return made


def unshrunk(weight: Tensor, fitted: Tensor) -> Tensor:
    """Fitted (cho, chi, kh, kw), every output channel scaled so that <fitted, W> = <W, W>.

    The nearest weights of few bits are short ones (at 1 bit by 0.4), an error that is no noise: the outputs shrink with
    them. The fit's CDSw, which is for the outputs, leaves noise alone, and that is what is judged here."""
    w, f = weight.flatten(1), fitted.flatten(1)
    along = (w * f).sum(1)
    scale = torch.where(along > 0, w.square().sum(1) / along.clamp_min(1e-30), torch.ones_like(along))
    return fitted * scale.clamp_max(MOST)[:, None, None, None]


def squared_effects(node: Node, x: Tensor, gradient: Tensor, errors: Mapping[Width, Tensor]) -> dict[Width, float]:
    """sum g^2 D^2 by width, for one image: x (1, chi, h, w) the layer's input, gradient (1, cho, h', w') of its output.

    The error's mean over an output channel is left out (the gradient is centred), as CDSb will correct it."""
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    shape = next(iter(errors.values())).shape
    g = conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"])
    squares = g.flatten().square()
    return {width: float(squares @ error.flatten().square()) for width, error in errors.items()}
