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

from dsconvert.dsconv.tensor import Width, used_width
from dsconvert.dsconv.trellis import strings
from dsconvert.fit.least_squares import fit_weight
from dsconvert.fit.threads import threads_for
from dsconvert.fit.trellis import starting, suited
from dsconvert.graph.ir import Node

MOST = 4.0  # times as long a fitted channel may become


def widths_of(channels: int, bits: Sequence[int], block_sizes: Sequence[int]) -> list[Width]:
    """What a layer of so many input channels can be stored in: of 8 bits one, as all block sizes are the same there."""
    widths = dict.fromkeys(used_width(b, channels, size) for b in bits for size in block_sizes)
    return [w for w in widths if w.bits > 1 or w.trellis]


def damage_of(weight: Tensor, widths: Sequence[Width], squares: Tensor) -> dict[Width, float]:
    """sum g^2 D^2 by width, for the sum of g^2 over images, of the weight's shape (cho, chi, kh, kw)."""
    return {w: _damage(weight, w, squares) for w in widths}


def _damage(weight: Tensor, width: Width, squares: Tensor) -> float:
    if width.trellis:
        return float((_block_errors(weight, width) * blocks_of(squares, width).sum(-1)).sum())
    return float(squares.flatten() @ weight_error(weight, width).flatten().square())


def _block_errors(weight: Tensor, width: Width) -> Tensor:
    """Mean D^2 of every block and tap, (cho, blocks), along a trellis: what such a block's size lets expect, with the
    output channel as long as it was (see `unshrunk`; the errors of the nearest string are at right angles to it)."""
    blocks = blocks_of(weight, width)
    power = blocks.square().mean(-1)
    rms = power.sqrt().numpy()
    errors = torch.from_numpy(suited(rms, starting(rms, width.bits), width.bits)[1])
    left = 1 - errors.sum(1, keepdim=True) / power.sum(1, keepdim=True).clamp_min(1e-30)
    return errors / left.clamp_min(1 / MOST)


def blocks_of(x: Tensor, width: Width) -> Tensor:
    """(cho, chi, kh, kw) -> float64 (cho, blocks, size): what shares an m."""
    size = min(width.block_size, x.shape[1])
    return strings(x.detach().cpu().double(), width.block_size).unflatten(1, (-1, size))


def weight_error(weight: Tensor, width: Width) -> Tensor:
    """W' - W (cho, chi, kh, kw) of free integers by least squares, from two starting scales; at 8 bits of plain
    per-channel int8."""
    with threads_for(weight.numel()):
        # many bits are best at 1, where nothing is clipped, few at 0.8
        fitted = fit_weight(weight, *width, starts=(1.0, 0.8), rounds=1).weight().to(weight)
        return unshrunk(weight, fitted) - weight


def unshrunk(weight: Tensor, fitted: Tensor) -> Tensor:
    """Fitted (cho, chi, kh, kw), every output channel scaled so that <fitted, W> = <W, W>.

    The nearest weights of few bits are short ones (at 1 bit by 0.4), an error that is no noise: the outputs shrink with
    them. The fit's CDSw, which is for the outputs, leaves noise alone, and that is what is judged here."""
    w, f = weight.flatten(1), fitted.flatten(1)
    along = (w * f).sum(1)
    scale = torch.where(along > 0, w.square().sum(1) / along.clamp_min(1e-30), torch.ones_like(along))
    return fitted * scale.clamp_max(MOST)[:, None, None, None]


def squared_gradient(node: Node, x: Tensor, gradient: Tensor, shape: torch.Size) -> Tensor:
    """g^2 of the weight (cho, chi, kh, kw) for one image: x (1, chi, h, w) the layer's input, gradient (1, cho, h', w')
    of its output.

    A weight error's mean over an output channel is left out (the gradient is centred), as CDSb will correct it."""
    centred = gradient - gradient.mean((2, 3), keepdim=True)
    a = node.attrs
    return conv2d_weight(x, shape, centred, a["stride"], a["padding"], a["dilation"], a["groups"]).square_()
