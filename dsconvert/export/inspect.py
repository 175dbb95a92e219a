"""What weights an ONNX file holds, whoever made it: each convolution's initializers, found by graph structure."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
from onnx import TensorProto, numpy_helper

NO_WEIGHT = (TensorProto.INT32, TensorProto.INT64)  # shapes, places and tables
BITS: dict[int, int] = {
    TensorProto.FLOAT: 32, TensorProto.FLOAT16: 16, TensorProto.BFLOAT16: 16, TensorProto.INT8: 8,
    TensorProto.UINT8: 8, TensorProto.INT4: 4, TensorProto.UINT4: 4,
}  # fmt: skip


NOTHING = onnx.NodeProto()
LONGEST = 4  # Reshape, Transpose, Reshape and Concat of `export.quickconv`


@dataclass(frozen=True)
class OnnxWeight:
    """A convolution's weight as stored: its largest initializer's shape and type, and all its bits together."""

    name: str
    shape: tuple[int, ...]
    type: str
    bits: int
    count: int


def conv_weights(model: onnx.ModelProto) -> list[OnnxWeight]:
    """One entry for every Conv, ConvInteger or QLinearConv, in graph order. Scalars, shapes and tables are not
    counted.

    Each weight is taken once where several nodes of its chain read it. Raises RecursionError, IndexError or ValueError
    for graphs that are none."""
    tensors = {t.name: t for t in model.graph.initializer}
    makers = {out: node for node in model.graph.node for out in node.output}
    found = []
    for index, node in enumerate(model.graph.node):
        if node.op_type not in ("Conv", "ConvInteger", "QLinearConv"):
            continue
        place = 3 if node.op_type == "QLinearConv" else 1
        if len(node.input) <= place:
            continue
        sources = _sources(node.input[place], makers, tensors, set())
        parts = [t for t in sources if t.dims and t.data_type not in NO_WEIGHT]
        # where all weights are made together, those of the convolution's name are its own
        parts = [t for t in parts if node.name and t.name.startswith(f"{node.name}.")] or parts
        if not parts:
            continue
        # where each weight has a shift of its own, the integers are the weight
        largest = max(parts, key=lambda t: (_count(t), t.data_type != TensorProto.FLOAT))
        bits = sum(_count(t) * BITS.get(t.data_type, 32) for t in parts)
        # one scale a channel is not counted; scales of blocks are shifts, and are
        scales = [t for t in parts if t is not largest and t.data_type == TensorProto.FLOAT and len(t.dims) == 1]
        scale_bits = sum(_count(t) * 32 for t in scales)
        shape = _shape(node.input[place], makers, tensors, set()) or largest.dims
        known = largest.data_type in TensorProto.DataType.values()
        type_name = TensorProto.DataType.Name(largest.data_type).lower() if known else "unknown"
        found.append(
            OnnxWeight(
                node.name or f"conv {index}",
                tuple(shape),
                type_name,
                bits - scale_bits,
                math.prod(shape),
            )
        )
    return found


def _sources(
    value: str, makers: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto], seen: set[str]
) -> list[onnx.TensorProto]:
    """Initializers the value is computed from. `seen` ends the search in files whose nodes go in circles, or double
    their paths at every step."""
    if value in seen:
        return []
    seen.add(value)
    if value in tensors:
        return [tensors[value]]
    node = makers.get(value)
    if node is None:
        return []
    return [t for name in node.input for t in _sources(name, makers, tensors, seen)]


def _shape(
    value: str, makers: dict[str, onnx.NodeProto], tensors: dict[str, onnx.TensorProto], seen: set[str]
) -> tuple[int, ...] | None:
    """The shape a value is brought into on its way to the convolution; None where that cannot be told."""
    if value in seen:
        return None
    seen.add(value)
    if value in tensors:
        return tuple(tensors[value].dims)
    node = makers.get(value)
    if node is None:
        return None
    through = ("DequantizeLinear", "QuantizeLinear", "Cast", "Add", "Mul", "Pad", "Transpose")
    if node.op_type in through or _rearranges(node, makers) or _twice(node, makers):
        return _shape(node.input[0], makers, tensors, seen)
    if node.op_type == "Concat":  # along the input channels
        parts = [_shape(name, makers, tensors, seen) for name in node.input]
        known = [p for p in parts if p is not None and len(p) > 1]
        return (known[0][0], sum(p[1] for p in known), *known[0][2:]) if len(known) == len(parts) else None
    if node.op_type != "Reshape" or node.input[1] not in tensors:
        return None
    shape = tuple(int(n) for n in numpy_helper.to_array(tensors[node.input[1]]))
    return shape if all(n > 0 for n in shape) else None


def _rearranges(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it is part of what `export.quickconv` makes of the first convolution's weight, which is padded first."""
    source, steps = node, 0
    while source.op_type in ("Reshape", "Transpose", "Concat") and source.input and steps < LONGEST:
        source, steps = makers.get(source.input[0], NOTHING), steps + 1
    return node.op_type == "Reshape" and source.op_type == "Pad"


def _twice(node: onnx.NodeProto, makers: dict[str, onnx.NodeProto]) -> bool:
    """Whether it joins one weight with itself, each time between other zeros."""
    padded = [makers.get(name, NOTHING) for name in node.input]
    return (
        node.op_type == "Concat" and all(p.op_type == "Pad" for p in padded) and len({p.input[0] for p in padded}) == 1
    )


def _count(tensor: onnx.TensorProto) -> int:
    return math.prod(max(n, 0) for n in tensor.dims)
