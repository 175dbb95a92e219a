"""What every operation of the graph means: one entry of `OPS` each, at the end, which all executors look up.

A convolution's weight and bias are no values of the graph: its entry reads them as second and third input. They have
grids of another kind: `graph.integer` and `tune.simulate` tell it from the rest where those count.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base.errors import InputError
from dsconvert.graph import gates
from dsconvert.graph.activations import ACTIVATIONS, activation_table, as_engines
from dsconvert.graph.grids import QMAX, QParams
from dsconvert.graph.ir import Node, Shape, display_name

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder

PLAIN_ACTS = ("Sigmoid", "Tanh")  # which ONNX calls so too
MAX_POOL = 99  # YOLOv5 pools over 13 at most
MOST_PAIRS = 1 << 28  # of pixels that attention compares, over all heads and images: 1 GiB of float32


@dataclass(frozen=True)
class Op:
    """What an operation means. Its gradient is torch's: of `real`, or of `trained` where grids are in the loop."""

    # in float
    real: Callable[[Node, list[Tensor]], Tensor]
    # from the shapes of its inputs, which it refuses with a ValueError, to that of its output
    shape: Callable[[Node, list[Shape]], Shape]
    # in ONNX, on float maps (on uint8 ones, too, where it moves): names of its inputs and of its output -> the latter
    onnx: Callable[[OnnxBuilder, Node, list[str], str], str]
    # how many inputs: least and most
    inputs: tuple[int, int] = (1, 1)
    # the attributes it must have, and what each may be
    attrs: Mapping[str, Container[Any]] = field(default_factory=dict)
    # whether it only moves or selects values, so that it does on integers of one grid what it does on real numbers
    moves: bool = False
    # on integers carried as float32, with the grids of its inputs and of its output; None: by way of `real`, rounded
    integer: Callable[[Node, list[Tensor], list[QParams], QParams], Tensor] | None = None
    # whether its output is on its input's grid though it changes values: a limit, which that grid may end at
    limits: bool = False
    # `real` with what engines round inside of it, and a gradient that passes; None: they round nothing
    trained: Callable[[Node, list[Tensor]], Tensor] | None = None

    @property
    def keeps_grid(self) -> bool:
        """Whether its output is on its input's grid: it has no quantization parameters of its own."""
        return self.limits or (self.moves and self.inputs[1] == 1)

    @property
    def joins(self) -> bool:
        """Whether it only moves values, of several inputs that may have one grid."""
        return self.moves and self.inputs[1] > 1


def conv(node: Node, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The node's convolution with any weight."""
    a = node.attrs
    return F.conv2d(x, weight, bias, a["stride"], a["padding"], a["dilation"], a["groups"])


def _conv_shape(node: Node, inputs: list[Shape]) -> Shape:
    (c, h, w), (cho, chi, kh, kw), a = *inputs, node.attrs
    if chi * a["groups"] != c or cho % a["groups"]:
        raise ValueError(f"channels of {node.name}")
    return cho, _span(node, h, kh, a["dilation"]), _span(node, w, kw, a["dilation"])


def _conv_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    a = node.attrs
    given = {
        "strides": [a["stride"]] * 2, "pads": [a["padding"]] * 4, "dilations": [a["dilation"]] * 2,
        "group": a["groups"],
    }  # fmt: skip
    usual = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    attributes = {key: value for key, value in given.items() if value != usual[key]}
    return b.node("Conv", inputs, output, name=display_name(node), **attributes)


def _act_integer(node: Node, inputs: list[Tensor], source: list[QParams], target: QParams) -> Tensor:
    table = torch.from_numpy(activation_table(node.attrs["kind"], source[0], target))
    return table.to(inputs[0]).index_select(0, inputs[0].flatten().int()).view(inputs[0].shape)


def _act_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    kind, (x,) = node.attrs["kind"], inputs
    if kind == "ReLU":
        return b.node("Relu", [x], output)
    if kind == "LeakyReLU":
        return b.node("LeakyRelu", [x], output, alpha=0.1)
    if kind == "SiLU":
        return b.node("Mul", [x, b.node("Sigmoid", [x], f"{output}.s")], output)
    if kind in PLAIN_ACTS:
        return b.node(kind, [x], output)
    if kind == "HardSigmoid":
        return b.node("HardSigmoid", [x], output, alpha=1 / 6, beta=0.5)
    if kind == "Mish":
        return b.node("Mul", [x, b.node("Tanh", [b.node("Softplus", [x], f"{output}.p")], f"{output}.s")], output)
    if kind == "GELU":
        bent = b.node("Erf", [b.node("Mul", [x, b.scalar(0.5**0.5)], f"{output}.r")], f"{output}.e")
        half = b.node("Mul", [x, b.scalar(0.5)], f"{output}.h")
        return b.node("Mul", [half, b.node("Add", [bent, b.scalar(1.0)], f"{output}.s")], output)
    # x * relu6(x + 3) / 6, spelled out: HardSwish itself needs opset 14
    gate = b.node("HardSigmoid", [x], f"{output}.s", alpha=1 / 6, beta=0.5)
    return b.node("Mul", [x, gate], output)


def _add_integer(node: Node, inputs: list[Tensor], source: list[QParams], target: QParams) -> Tensor:
    """a * sa / st + b * sb / st on integers, in the fused multiply-adds of ONNX Runtime's QLinearAdd.

    A fused multiply-add rounds once; float64 arithmetic rounded to float32 gives the same result.
    """
    (a, b), (ga, gb) = inputs, source
    ra, rb = (np.float32(g.scale) / np.float32(target.scale) for g in (ga, gb))
    inner = np.float32(float(ra) * ga.zero_point + float(rb * np.float32(gb.zero_point)))
    fixed = np.float32(target.zero_point) - inner
    total = b.double().mul_(float(rb)).add_(float(fixed)).float()
    return a.double().mul_(float(ra)).add_(total).float().round_().clamp_(0, QMAX)


def _concat_shape(node: Node, inputs: list[Shape]) -> Shape:
    _same_shape(node, [(1, *shape[1:]) for shape in inputs])
    return sum(shape[0] for shape in inputs), *inputs[0][1:]


def _maxpool(node: Node, inputs: list[Tensor]) -> Tensor:
    a = node.attrs
    last = inputs[0].contiguous(memory_format=torch.channels_last)  # ten times as fast, turning around included
    return F.max_pool2d(last, a["kernel"], a["stride"], a["padding"]).contiguous()


def _maxpool_shape(node: Node, inputs: list[Shape]) -> Shape:
    ((c, h, w),), a = inputs, node.attrs
    if a["padding"] > a["kernel"] // 2:
        raise ValueError(f"padding of {node.name}")
    return c, _span(node, h, a["kernel"], 1), _span(node, w, a["kernel"], 1)


def _maxpool_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    kernel, stride, padding = (node.attrs[key] for key in ("kernel", "stride", "padding"))
    return b.node("MaxPool", inputs, output, kernel_shape=[kernel] * 2, strides=[stride] * 2, pads=[padding] * 4)


def _upsample_shape(node: Node, inputs: list[Shape]) -> Shape:
    (c, h, w), scale = inputs[0], node.attrs["scale"]
    return c, h * scale, w * scale


def _upsample_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    scales = b.constant(np.array([1, 1, node.attrs["scale"], node.attrs["scale"]], np.float32))
    return b.node(
        "Resize", [inputs[0], "", scales], output, mode="nearest", nearest_mode="floor",
        coordinate_transformation_mode="asymmetric",
    )  # fmt: skip


def space_to_depth(x: Tensor) -> Tensor:
    """(n, c, h, w) -> (n, 4c, h/2, w/2): the four pixel phases, row phase running fastest (YOLOv5's Focus)."""
    return torch.cat((x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]), 1)


def _space_to_depth_shape(node: Node, inputs: list[Shape]) -> Shape:
    c, h, w = inputs[0]
    if h % 2 or w % 2:
        raise ValueError(f"odd image of {node.name}")
    return 4 * c, h // 2, w // 2


def _space_to_depth_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    """The Focus slices: four strided slices joined along the channels."""
    parts = []
    for column in (0, 1):
        for row in (0, 1):
            ends, axes, steps = b.shape(1 << 30, 1 << 30), b.shape(2, 3), b.shape(2, 2)
            starts = b.shape(row, column)
            parts.append(b.node("Slice", [inputs[0], starts, ends, axes, steps], f"{output}.{column}{row}"))
    return b.node("Concat", parts, output, axis=1)


def attention(node: Node, inputs: list[Tensor]) -> Tensor:
    """Of the maps q and k (n, heads * size, h, w) and v (n, heads * its own size, h, w), with pixels as tokens:
    softmax(q . k / sqrt(size)) v, of v's shape. Raises InputError where the map is too large for that."""
    heads, size = node.attrs["heads"], node.attrs["size"]
    n, _, high, wide = inputs[0].shape
    if n * heads * (high * wide) ** 2 > MOST_PAIRS:
        raise InputError(
            f"The attention of layer {node.name} is over {wide} by {high} pixels, which takes too much memory."
        )
    q, k, v = (x.reshape(n, heads, -1, high * wide) for x in inputs)
    scores = (k.transpose(2, 3) @ q) / math.sqrt(size)  # keys in rows, queries in columns
    return (v @ scores.softmax(2)).reshape(inputs[2].shape)


def _attention_shape(node: Node, inputs: list[Shape]) -> Shape:
    a, (q, k, v) = node.attrs, inputs
    _same_shape(node, [(a["heads"] * a["size"], *q[1:]), q, k])
    return _same_shape(node, [(a["heads"] * a.get("value", a["size"]), *q[1:]), v])


def _attention_onnx(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    size, heads, names = node.attrs["size"], node.attrs["heads"], ("query", "key", "value")
    own = node.attrs.get("value", size)
    q, k, v = (
        b.node("Reshape", [x, b.shape(0, heads, each, -1)], f"{output}.{part}")
        for part, x, each in zip(names, inputs, (size, size, own), strict=True)
    )
    keys = b.node("Transpose", [k], f"{output}.keys", perm=[0, 1, 3, 2])
    products = b.node("MatMul", [keys, q], f"{output}.products")
    scores = b.node("Mul", [products, b.scalar(size**-0.5)], f"{output}.scores")
    weighed = b.node("MatMul", [v, b.node("Softmax", [scores], f"{output}.shares", axis=2)], f"{output}.heads")
    return b.node("Reshape", [weighed, b.node("Shape", [inputs[0 if own == size else 2]], f"{output}.shape")], output)


def _same_shape(node: Node, inputs: list[Shape]) -> Shape:
    """The shape that all inputs have. Raises ValueError where there is none."""
    if len(set(inputs)) != 1:
        raise ValueError(f"shapes at {node.name}")
    return inputs[0]


def _span(node: Node, size: int, kernel: int, dilation: int) -> int:
    """Length after a window of `kernel` passed over `size`."""
    found = (size + 2 * int(node.attrs["padding"]) - dilation * (kernel - 1) - 1) // int(node.attrs["stride"]) + 1
    if found < 1:
        raise ValueError(f"nothing left of {node.name}")
    return found


def _to(least: int, most: int) -> range:
    return range(least, most + 1)


OPS: Mapping[str, Op] = {
    "conv": Op(
        real=lambda node, inputs: conv(node, *inputs),
        shape=_conv_shape,
        onnx=_conv_onnx,
        attrs={"stride": _to(1, 64), "padding": _to(0, 256), "dilation": _to(1, 64), "groups": _to(1, 1 << 16)},
    ),
    "act": Op(
        real=lambda node, inputs: ACTIVATIONS[node.attrs["kind"]](inputs[0]),
        shape=_same_shape,
        onnx=_act_onnx,
        attrs={"kind": ACTIVATIONS},
        integer=_act_integer,
        trained=lambda node, inputs: as_engines(node.attrs["kind"], inputs[0]),
    ),
    "add": Op(
        real=lambda node, inputs: inputs[0] + inputs[1],
        shape=_same_shape,
        onnx=lambda b, node, inputs, output: b.node("Add", inputs, output),
        inputs=(2, 2),
        integer=_add_integer,
    ),
    "concat": Op(
        real=lambda node, inputs: torch.cat(inputs, 1),
        shape=_concat_shape,
        onnx=lambda b, node, inputs, output: b.node("Concat", inputs, output, axis=1),
        inputs=(1, 1000),
        moves=True,
    ),
    "maxpool": Op(
        real=_maxpool,
        shape=_maxpool_shape,
        onnx=_maxpool_onnx,
        attrs={"kernel": _to(1, MAX_POOL), "stride": _to(1, 64), "padding": _to(0, MAX_POOL // 2)},
        moves=True,
    ),
    "upsample": Op(
        real=lambda node, inputs: F.interpolate(inputs[0], scale_factor=float(node.attrs["scale"]), mode="nearest"),
        shape=_upsample_shape,
        onnx=_upsample_onnx,
        attrs={"scale": _to(1, 16)},
        moves=True,
    ),
    "space_to_depth": Op(
        real=lambda node, inputs: space_to_depth(inputs[0]),
        shape=_space_to_depth_shape,
        onnx=_space_to_depth_onnx,
        moves=True,
    ),
    "relu": Op(
        real=gates.relu,
        shape=_same_shape,
        onnx=gates.relu_onnx,
        attrs={"top": _to(0, 100)},  # 0: none
        limits=True,
        integer=gates.relu_integer,
    ),
    "product": Op(
        real=lambda node, inputs: inputs[0] * inputs[1],
        shape=gates.product_shape,
        onnx=lambda b, node, inputs, output: b.node("Mul", inputs, output),
        inputs=(2, 2),
        integer=gates.product_integer,
    ),
    "times": Op(
        real=lambda node, inputs: inputs[0] * node.attrs["by"],
        shape=_same_shape,
        onnx=lambda b, node, inputs, output: b.node("Mul", [*inputs, b.scalar(node.attrs["by"])], output),
        attrs={"by": ()},  # a real number, which no model file has
        integer=gates.times_integer,
    ),
    "mean": Op(
        real=lambda node, inputs: inputs[0].mean((2, 3), keepdim=True),
        shape=lambda node, inputs: (inputs[0][0], 1, 1),
        onnx=lambda b, node, inputs, output: b.node("GlobalAveragePool", inputs, output),
    ),
    "mean_pool": Op(
        real=gates.mean_pool,
        shape=_maxpool_shape,
        onnx=gates.mean_pool_onnx,
        attrs={"kernel": _to(1, MAX_POOL), "stride": _to(1, 64), "padding": _to(0, MAX_POOL // 2), "padded": _to(0, 1)},
    ),
    "select": Op(
        real=gates.select,
        shape=gates.select_shape,
        onnx=gates.select_onnx,
        attrs={"channels": ()},  # a list, which no model file has
        moves=True,
    ),
    "resize": Op(
        real=gates.resize,
        shape=_upsample_shape,
        onnx=gates.resize_onnx,
        attrs={"scale": _to(1, 16)},
    ),
    "island": Op(
        real=lambda node, inputs: node.attrs["part"].compute(inputs),
        shape=lambda node, inputs: node.attrs["part"].shape,
        onnx=lambda b, node, inputs, output: node.attrs["part"].emit(b, inputs, output),
        inputs=(1, 1000),
        attrs={"part": ()},  # a piece of an ONNX file, which no model file has
    ),
    "attention": Op(  # engines have no integers for it either
        real=attention,
        shape=_attention_shape,
        onnx=_attention_onnx,
        inputs=(3, 3),
        attrs={"heads": _to(1, 1 << 10), "size": _to(1, 1 << 16)},
    ),
    "uneven_attention": Op(  # whose values have another size than its queries and keys
        real=attention,
        shape=_attention_shape,
        onnx=_attention_onnx,
        inputs=(3, 3),
        attrs={"heads": _to(1, 1 << 10), "size": _to(1, 1 << 16), "value": _to(1, 1 << 16)},
    ),
}
