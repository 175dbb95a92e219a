"""The activations by name: real, between grids, and as training has them."""

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


class _SiluOnGrid(torch.autograd.Function):
    """x times its sigmoid on the engines' grid of 1/255; the gradient is SiLU's but for that rounding."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        s = x.sigmoid()
        rounded = (s / SIGMOID.scale).round_().mul_(SIGMOID.scale)
        ctx.save_for_backward((s - s * s).mul_(x).add_(rounded))
        return rounded * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0] * ctx.saved_tensors[0]


def as_engines(kind: str, values: Tensor) -> Tensor:
    """An activation of real values, with SiLU's sigmoid on its grid, as integer engines have it. `activation_table` is
    its rounding to a grid, in the engines' own order."""
    made: Tensor = _SiluOnGrid.apply(values) if kind == "SiLU" else ACTIVATIONS[kind](values)
    return made


def activation_table(kind: str, source: QParams, target: QParams) -> NDArray[np.uint8]:
    """The activation of each of the 256 possible inputs. SiLU is x * sigmoid(x), the sigmoid on its grid."""
    q = np.arange(256, dtype=np.float32)
    x = (q - np.float32(source.zero_point)) * np.float32(source.scale)
    if kind != "SiLU":
        y = ACTIVATIONS[kind](torch.from_numpy(x)).numpy()
        return _quantize_np(y / np.float32(target.scale), target.zero_point)
    s = _quantize_np(torch.from_numpy(x).sigmoid().numpy() / np.float32(SIGMOID.scale), SIGMOID.zero_point)
    ratio = np.float32(source.scale) * np.float32(SIGMOID.scale) / np.float32(target.scale)
    product = (q - source.zero_point) * (s.astype(np.float32) - SIGMOID.zero_point)
    return _quantize_np(product * ratio, target.zero_point)


def _quantize_np(x: NDArray[np.floating[Any]], zero_point: int) -> NDArray[np.uint8]:
    return np.clip(np.rint(x) + zero_point, 0, QMAX).astype(np.uint8)
