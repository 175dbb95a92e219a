"""Find the layers of an ONNX graph that DSConv can hold: Conv, Gemm and MatMul with constant float weights.

A Gemm or MatMul counts as a 1x1 convolution.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base.errors import InputError, printable, refusing
from dsconvert.graph.ir import Node
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.source import Array, Source, used

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16)


@dataclass(frozen=True)
class Layer:
    """One node with a constant weight.

    index: of the node in the file.
    value: the name of its input.
    stored: the weight's name in the file.
    weight: (cho, chi / groups, kh, kw), float32; 1x1 for a matrix.
    bias: (cho,), the constant that is added to the result.
    half: whether the file stores float16.
    pads: ONNX's (top, left, bottom, right); None: SAME padding.
    upper: with SAME padding, whether an odd pixel goes to the end.
    adder: index of the Add with a MatMul's bias, or None.
    linear: whether this is a Gemm or MatMul.
    """

    index: int
    name: str
    value: str
    stored: str
    weight: Tensor
    bias: Tensor
    half: bool
    stride: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1
    pads: tuple[int, ...] | None = (0, 0, 0, 0)
    upper: bool = True
    adder: int | None = None
    linear: bool = False

    @property
    def node(self) -> Node:
        """The convolution of what `images` returns, as the fit knows it. Strides and dilations may be pairs."""
        stride, dilation = (v[0] if v[0] == v[1] else v for v in (self.stride, self.dilation))
        attrs = {"stride": stride, "dilation": dilation, "padding": 0, "groups": self.groups}
        return Node("conv", "layer", ("images",), attrs)

    def images(self, x: Array) -> Tensor:
        """Return the input as float32 images (n, chi, h, w), padded.

        The rows of a matrix become positions: (1, chi, rows, 1).
        """
        t = torch.from_numpy(x.astype(np.float32))
        if self.linear:
            return t.reshape(-1, t.shape[-1]).T[None, :, :, None]
        top, left, bottom, right = self.pads_of(t.shape[2:])
        return F.pad(t, (left, right, top, bottom))

    def pads_of(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the padding of a map with these sides: top, left, bottom, right."""
        return self._same(sides) if self.pads is None else self.pads

    def _same(self, sides: Sequence[int]) -> tuple[int, ...]:
        """Return the padding at which the output's sides are ceil(input / stride)."""
        begins, ends = [], []
        for side, s, d, k in zip(sides, self.stride, self.dilation, self.weight.shape[2:], strict=True):
            total = max(0, (math.ceil(side / s) - 1) * s + d * (k - 1) + 1 - side)
            begins.append(total // 2 if self.upper else total - total // 2)
            ends.append(total - begins[-1])
        return (*begins, *ends)


def find_layers(source: Source) -> list[Layer]:
    """Return all layers in the order in which they run. Raises InputError when there are none."""
    uses: dict[str, int] = {}
    for node in source.nodes:
        for name in used(node):
            uses[name] = uses.get(name, 0) + 1
    outputs = {v.name for v in source.model.graph.output}
    wanted = [n.input[1] for n in source.nodes if n.op_type in ("Conv", "Gemm", "MatMul") and len(n.input) > 1]
    biases = [name for n in source.nodes if n.op_type in ("Conv", "Gemm", "Add") for name in n.input if name]
    constants = _constants(source, [v for v in dict.fromkeys([*wanted, *biases]) if source.is_constant(v)])
    found = []
    for index, node in enumerate(source.nodes):
        if node.domain not in ("", "ai.onnx") or index in source.constant or len(node.input) < 2:
            continue
        if node.input[1] not in constants or source.is_constant(node.input[0]):
            continue
        if _integer_made(source, node.input[1], constants[node.input[1]].size):
            continue
        alone = uses.get(node.output[0]) == 1 and node.output[0] not in outputs
        layer = _layer(source, index, constants, alone)
        if layer is not None and layer.weight.numel() and bool(torch.isfinite(layer.weight).all()):
            found.append(layer)
    if not found:
        raise InputError("The file has no convolution and no matrix product with constant float weights to convert.")
    return found


def _constants(source: Source, names: list[str]) -> dict[str, Array]:
    """Return the float arrays of constant values, stored in the file or computed from stored tensors."""
    found = {n: onnx.numpy_helper.to_array(source.initializers[n])
             for n in names if n in source.initializers and source.initializers[n].data_type in FLOATS}  # fmt: skip
    made = [n for n in names if n not in source.initializers]
    if made:
        nodes = [source.nodes[i] for i in source.needed(made)]
        with refusing("ONNX Runtime cannot compute the file's constants."):
            values = session(source.part(nodes, made, {}).SerializeToString(), 1).run(None, {})
        found |= {n: v for n, v in zip(made, values, strict=True) if isinstance(v, np.ndarray) and v.dtype.kind == "f"}
    return found


def _integer_made(source: Source, value: str, count: int) -> bool:
    """Return whether a constant weight is computed from integers of its size, so is quantized already."""
    parts = {name for i in source.needed([value]) for name in used(source.nodes[i])} & source.initializers.keys()
    tensors = [source.initializers[name] for name in parts]
    return any(t.data_type not in FLOATS and math.prod(t.dims) >= count / 8 and math.prod(t.dims) > 8 for t in tensors)


def _layer(source: Source, index: int, constants: Mapping[str, Array], alone: bool) -> Layer | None:
    """Return the layer of a node, or None if DSConv cannot hold it."""
    node = source.nodes[index]
    attrs = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    array = constants[node.input[1]]
    name = printable(node.name or node.output[0], 100)
    common = (index, name, node.input[0], node.input[1])
    half = array.dtype == np.float16
    if node.op_type == "Conv" and array.ndim == 4:
        bias = _row(constants, node.input[2] if len(node.input) > 2 else "", len(array))
        auto = attrs.get("auto_pad", b"NOTSET").decode()
        pads = None if auto.startswith("SAME") else (0,) * 4 if auto == "VALID" else tuple(attrs.get("pads", (0,) * 4))
        if bias is None or (pads is not None and (len(pads) != 4 or min(pads) < 0)):
            return None
        stride, dilation = (tuple(attrs.get(k, (1, 1))) for k in ("strides", "dilations"))
        return Layer(*common, _tensor(array), bias, half, stride, dilation, attrs.get("group", 1), pads,
                     auto == "SAME_UPPER")  # fmt: skip
    if node.op_type == "Gemm" and array.ndim == 2 and not attrs.get("transA", 0):
        matrix = array if attrs.get("transB", 0) else array.T
        bias = _row(constants, node.input[2] if len(node.input) > 2 else "", len(matrix))
        if bias is None:
            return None
        weight = _tensor(matrix)[:, :, None, None] * attrs.get("alpha", 1.0)
        return Layer(*common, weight, bias * attrs.get("beta", 1.0), half, linear=True)
    if node.op_type == "MatMul" and array.ndim == 2:
        bias, adder = torch.zeros(array.shape[1]), None
        following = [i for i, n in enumerate(source.nodes) if alone and node.output[0] in n.input]
        if following and source.nodes[following[0]].op_type == "Add":
            other = [n for n in source.nodes[following[0]].input if n != node.output[0]]
            added = _row(constants, other[0], array.shape[1]) if other and other[0] in constants else None
            if added is not None and constants[other[0]].ndim == 1:
                bias, adder = added, following[0]
        return Layer(*common, _tensor(array.T)[:, :, None, None], bias, half, adder=adder, linear=True)
    return None


def _tensor(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.array(array, np.float32, order="C"))


def _row(constants: Mapping[str, Array], name: str, count: int) -> Tensor | None:
    """Return a bias as (count,): zeros if there is none, None if it is not constant or has another shape."""
    if not name:
        return torch.zeros(count)
    array = constants.get(name)
    if array is None or array.size not in (1, count) or (array.size > 1 and array.shape[-1] != count):
        return None
    return _tensor(np.broadcast_to(array.reshape(-1), (count,)))
