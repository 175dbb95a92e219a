"""What networks newer than YOLOv5 have between their convolutions: ReLU as a limit of a grid, products of maps, pooling
by means, and choices of channels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from torch.nn import functional as F

from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.ir import Node, Shape

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder


def relu(node: Node, inputs: list[Tensor]) -> Tensor:
    """Values from 0 on, and up to `top` where that is no 0."""
    return inputs[0].clamp(0, node.attrs["top"] or None)


def relu_integer(node: Node, inputs: list[Tensor], source: list[QParams], target: QParams) -> Tensor:
    """On the grid of its input: the integers of 0 and of `top` are the limits."""
    high = round(node.attrs["top"] / target.scale) + target.zero_point if node.attrs["top"] else QMAX
    return inputs[0].clamp(target.zero_point, min(high, QMAX))


def relu_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    if not node.attrs["top"]:
        return b.node("Relu", inputs, output)
    return b.node("Clip", [*inputs, b.scalar(0.0), b.scalar(float(node.attrs["top"]))], output)


def is_limit(node: Node, grid: QParams) -> bool:
    """Whether the ends of the grid that a relu reads are its limits already: then its integers are those it reads."""
    top = node.attrs["top"] or np.inf
    return grid.zero_point == 0 and QMAX * grid.scale <= top * (1 + 1e-6)


def product_shape(node: Node, inputs: list[Shape]) -> Shape:
    """Of two maps of one shape, or of a map and one number a channel."""
    (c, h, w), other = inputs
    if other not in ((c, h, w), (c, 1, 1)):
        raise ValueError(f"shapes at {node.name}")
    return c, h, w


def product_integer(node: Node, inputs: list[Tensor], source: list[QParams], target: QParams) -> Tensor:
    """(a - za) (b - zb) sa sb / st, in the order of ONNX Runtime's QLinearMul."""
    a, b = (q - grid.zero_point for q, grid in zip(inputs, source, strict=True))
    ratio = float(np.float32(source[0].scale) * np.float32(source[1].scale) / np.float32(target.scale))
    return (a * b).mul_(ratio).round_().add_(target.zero_point).clamp_(0, QMAX)


def times_integer(node: Node, inputs: list[Tensor], source: list[QParams], target: QParams) -> Tensor:
    """The same integers, on a grid that is as many times as wide."""
    if is_relabelled(node, source[0], target):
        return inputs[0]
    return target.quantize(source[0].dequantize(inputs[0]) * node.attrs["by"])


def is_relabelled(node: Node, source: QParams, target: QParams) -> bool:
    """Whether multiplying needs no arithmetic, as the grid behind has the factor in its scale."""
    return source == before_times(node, target)


def before_times(node: Node, target: QParams) -> QParams:
    """The grid of what is multiplied that makes the product the same integers on its own grid."""
    return QParams(float(np.float32(target.scale / node.attrs["by"])), target.zero_point)


def mean_pool(node: Node, inputs: list[Tensor]) -> Tensor:
    """Means over windows; of those at the edge over what lies inside, or with `padded` 1 over zeros too."""
    a = node.attrs
    return F.avg_pool2d(inputs[0], a["kernel"], a["stride"], a["padding"], count_include_pad=bool(a["padded"]))


def mean_pool_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    a = node.attrs
    return b.node(
        "AveragePool", inputs, output, kernel_shape=[a["kernel"]] * 2, strides=[a["stride"]] * 2,
        pads=[a["padding"]] * 4, count_include_pad=a["padded"],
    )  # fmt: skip


def select(node: Node, inputs: list[Tensor]) -> Tensor:
    """The channels of these numbers, in this order."""
    return inputs[0][:, list(node.attrs["channels"])]


def select_shape(node: Node, inputs: list[Shape]) -> Shape:
    (c, h, w), chosen = inputs[0], node.attrs["channels"]
    if not chosen or min(chosen) < 0 or max(chosen) >= c:
        raise ValueError(f"channels of {node.name}")
    return len(chosen), h, w


def select_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    """A Slice where they lie side by side, else a Gather."""
    chosen = list(node.attrs["channels"])
    if chosen == list(range(chosen[0], chosen[0] + len(chosen))):
        ends = [b.shape(chosen[0]), b.shape(chosen[0] + len(chosen)), b.shape(1)]
        return b.node("Slice", [*inputs, *ends], output)
    return b.node("Gather", [*inputs, b.constant(np.array(chosen, np.int32))], output, axis=1)


def resize(node: Node, inputs: list[Tensor]) -> Tensor:
    """So many times larger, with linear interpolation between the centres of pixels."""
    return F.interpolate(inputs[0], scale_factor=float(node.attrs["scale"]), mode="bilinear", align_corners=False)


def resize_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    scales = b.constant(np.array([1, 1, node.attrs["scale"], node.attrs["scale"]], np.float32))
    return b.node("Resize", [inputs[0], "", scales], output, mode="linear", coordinate_transformation_mode="half_pixel")
