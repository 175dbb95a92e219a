"""The activation functions by name: on real numbers, on integers, and with gradients for training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from dsconvert.graph.grids import QMAX, SIGMOID, QParams

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "SiLU": F.silu,
    "ReLU": F.relu,
    "LeakyReLU": lambda x: F.leaky_relu(x, 0.1),
    "Hardswish": F.hardswish,
    "Sigmoid": torch.sigmoid,
    "HardSigmoid": F.hardsigmoid,
    "Tanh": torch.tanh,
    "GELU": F.gelu,
    "Mish": F.mish,
}


# gates: the factors that multiply x, which integer engines round to a grid of 1/255 first
GATES: dict[str, Callable[[Tensor], Tensor]] = {"SiLU": torch.sigmoid, "Hardswish": F.hardsigmoid}
THREE = QParams(3.0, 0)  # on this grid, the integer 1 stands for 3


class _SiluOnGrid(torch.autograd.Function):
    """x times its sigmoid, rounded to the engines' grid of 1/255.

    The gradient is SiLU's, except for that rounding.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = x.sigmoid()
        rounded = (s / SIGMOID.scale).round_().mul_(SIGMOID.scale)
        # d/dx (x s) = s + x (s - s^2), with the rounded s in the first term
        ctx.save_for_backward((s - s * s).mul_(x).add_(rounded))
        return rounded * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


def as_engines(kind: str, values: Tensor) -> Tensor:
    """Apply an activation to real values with its gate rounded, as integer engines do.

    `activation_table` also rounds the result, in the engines' order of operations.
    """
    if kind == "Hardswish":
        gate = F.hardsigmoid(values)
        rounded = gate + ((gate.detach() / SIGMOID.scale).round() * SIGMOID.scale - gate.detach())
        return values * rounded
    made: Tensor = _SiluOnGrid.apply(values) if kind == "SiLU" else ACTIVATIONS[kind](values)
    return made


def activation_table(kind: str, source: QParams, target: QParams) -> NDArray[np.uint8]:
    """Return the activation of each of the 256 possible inputs, uint8.

    An activation with a gate is x times the rounded gate: sigmoid(x) for SiLU, relu6(x + 3) / 6 for Hardswish.
    """
    q = np.arange(256, dtype=np.float32)
    x = (q - np.float32(source.zero_point)) * np.float32(source.scale)
    if kind not in GATES:
        y = ACTIVATIONS[kind](torch.from_numpy(x)).numpy()
        return _quantize_np(y / np.float32(target.scale), target.zero_point)
    if kind == "SiLU":
        s = _quantize_np(torch.from_numpy(x).sigmoid().numpy() / np.float32(SIGMOID.scale), SIGMOID.zero_point)
    else:
        s = _sum_with_three(q, source)
    ratio = np.float32(source.scale) * np.float32(SIGMOID.scale) / np.float32(target.scale)
    product = (q - source.zero_point) * (s.astype(np.float32) - SIGMOID.zero_point)
    return _quantize_np(product * ratio, target.zero_point)


def _sum_with_three(q: NDArray[np.float32], source: QParams) -> NDArray[np.uint8]:
    """Return x + 3 on a grid from 0 to 6, whose ends clip as relu6 does, in the order of ONNX Runtime's QLinearAdd."""
    ra, rb = (np.float32(s) / np.float32(6 * SIGMOID.scale) for s in (source.scale, THREE.scale))
    inner = np.float32(float(ra) * source.zero_point)
    total = np.float32(float(rb) - float(inner))
    sums = (q.astype(np.float64) * float(ra) + float(total)).astype(np.float32)
    return np.clip(np.rint(sums), 0, QMAX).astype(np.uint8)


def _quantize_np(x: NDArray[np.floating[Any]], zero_point: int) -> NDArray[np.uint8]:
    return np.clip(np.rint(x) + zero_point, 0, QMAX).astype(np.uint8)
