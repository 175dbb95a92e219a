"""Layout fused, second step: feature maps with channels last, from the first convolution to the decoding.

ONNX Runtime's int8 convolutions work on channels last, and it turns a graph that is channels first around every time it
loads it. Written that way here, every convolution can have the shape its kernels like best (see `quickconv`), and
upsampling becomes two Gathers of whole pixels, where a Resize would look for each byte.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import count
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.quickconv import MICROSOFT, Conv, add_conv, add_first_conv, is_scalar

LAST = ".last"  # suffix of a map's name when its channels are last
# what computes every number from those in its place
PLACEWISE = (
    "QLinearSigmoid", "QLinearMul", "QLinearAdd", "QLinearLeakyRelu", "QuantizeLinear", "DequantizeLinear", "Relu",
    "LeakyRelu", "HardSigmoid", "Sigmoid", "Mul", "Add",
)  # fmt: skip
JOINING = ("QLinearConcat", "Concat")
SHORT = 16  # bytes of a box that a Transpose moves faster than a Split
Shapes = Mapping[str, tuple[int, ...]]


def channels_last(model: onnx.ModelProto, values: Shapes, constants: Shapes) -> None:
    """Turn the graph around, in place. `values` are the shapes of feature maps as they are, channels first (0 where a
    dimension is open), `constants` those of all values that are known before an image is."""
    walk = _Walk(model, values, constants)
    for node in model.graph.node:
        walk.add(node)
    used, nodes = set(walk.outputs), []
    for node in reversed(walk.b.nodes):
        if used & set(node.output):
            used |= set(node.input)
            nodes.append(node)
    kept = [t for t in (*model.graph.initializer, *walk.b.initializers.values()) if t.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(nodes))
    model.graph.initializer.extend(kept)


class _Walk:
    """Copies nodes one by one; `last` knows the maps that have their channels last, by their old names."""

    def __init__(self, model: onnx.ModelProto, values: Shapes, constants: Shapes) -> None:
        self.b = _Builder({t.name for t in model.graph.initializer})
        self.values, self.constants = values, constants
        self.outputs = {v.name for v in model.graph.output}
        self.last: dict[str, str] = {}
        self.wider: dict[str, tuple[str, int]] = {}  # map -> what it is cut out of, and how many channels more
        self.boxes: dict[str, tuple[str, list[int]]] = {}  # value of decoding -> map, (0, na, columns, h, w)
        self.pieces: dict[str, list[str]] = {}  # value of decoding -> one for each anchor, to be joined along axis 1
        self.tensors = {t.name: t for t in model.graph.initializer}

    def add(self, node: onnx.NodeProto) -> None:
        """Emit one node, turned around if it has to do with maps."""
        if node.op_type == "QLinearConv":
            self._conv(node)
        elif not (self._turned(node) or self._decodes(node)):
            for name in node.input:
                self._first(name)
            self.b.nodes.append(node)

    def _turned(self, node: onnx.NodeProto) -> bool:
        """Emit it, channels last, if one of its maps is turned and it is known how."""
        if not any(name in self.last for name in node.input) or self.outputs & set(node.output):
            return False
        if node.op_type in PLACEWISE:
            parts = [name for name in node.input if name and name not in self.last]
            if not all(name in self.constants and is_scalar(self.constants[name]) for name in parts):
                return False
            self._same(node, node.op_type, node.domain)
        elif node.op_type in JOINING and _attribute(node, "axis") == 1:
            self._same(node, node.op_type, node.domain, {"axis": 3}, turn=True)
        elif node.op_type == "MaxPool" and len(node.output) == 1:
            self._same(node, "NhwcMaxPool", MICROSOFT)
        elif node.op_type == "Resize":
            return self._upsample(node)
        else:
            return False
        return True

    def _same(
        self, node: onnx.NodeProto, kind: str, domain: str, changed: Mapping[str, int] | None = None, turn: bool = False
    ) -> None:
        """The same operator on the turned maps; `turn` those that are not yet."""
        inputs = [
            self._turn(name) if turn and name not in self.constants else self.last.get(name, name)
            for name in node.input
        ]
        made = helper.make_node(kind, inputs, [self._named(name) for name in node.output], domain=domain)
        gone = {"storage_order", *(changed or {})}  # an order of indices, which nobody asks for
        made.attribute.extend(a for a in node.attribute if a.name not in gone)
        made.attribute.extend(helper.make_attribute(name, value) for name, value in (changed or {}).items())
        self.b.nodes.append(made)

    def _named(self, name: str) -> str:
        self.last[name] = f"{name}{LAST}"
        return self.last[name]

    def _turn(self, name: str) -> str:
        """The map, channels last."""
        if name not in self.last:
            self.b.node("Transpose", [name], self._named(name), perm=[0, 2, 3, 1])
        return self.last[name]

    def _first(self, name: str) -> None:
        """Make the map under its old name, channels first, if it is wanted so."""
        if name in self.last and not self.b.has(name):
            self.b.node("Transpose", [self.last[name]], name, perm=[0, 3, 1, 2])

    def _conv(self, node: onnx.NodeProto) -> None:
        conv, source = Conv(node, self.constants[node.input[3]]), node.input[0]
        output = f"{node.output[0]}{LAST}"
        size = self.values.get(source, ())[2:]
        known = source not in self.last and len(size) == 2 and all(size)
        if not (known and add_first_conv(self.b, conv, source, (size[0], size[1]), output)):
            self.wider[node.output[0]] = add_conv(self.b, conv, self._turn(source), output)
        self.last[node.output[0]] = output

    def _upsample(self, node: onnx.NodeProto) -> bool:
        """Whole multiples of the nearest pixel: every pixel so many times, along one side after the other."""
        before, after = (self.values.get(name, ())[2:] for name in (node.input[0], node.output[0]))
        wanted = {"mode": b"nearest", "nearest_mode": b"floor", "coordinate_transformation_mode": b"asymmetric"}
        plain = all(_attribute(node, name) == value for name, value in wanted.items())
        if not (plain and len(before) == len(after) == 2 and all(before) and all(after)):
            return False
        if any(a % s for s, a in zip(before, after, strict=True)):
            return False
        rows, columns = (
            self.b.constant(np.repeat(np.arange(s, dtype=np.int32), a // s)) for s, a in zip(before, after, strict=True)
        )
        source, output = self.last[node.input[0]], self._named(node.output[0])
        wide = self.b.node("Gather", [source, columns], f"{output}.wide", axis=2)
        self.b.node("Gather", [wide, rows], output, axis=1)
        return True

    def _decodes(self, node: onnx.NodeProto) -> bool:
        """The four nodes with which `decode` makes a table of a map: (n, na * columns, h, w) -> Reshape (n, na,
        columns, h, w) -> Transpose (n, na, h, w, columns) -> Reshape to runs of boxes -> Concat of all levels."""
        source, output = node.input[0], node.output[0]
        if node.op_type == "Reshape" and node.input[1] in self.tensors:
            shape = numpy_helper.to_array(self.tensors[node.input[1]]).tolist()
            if source in self.last and len(shape) == 5 and shape[0] == 0:
                self.boxes[output] = source, shape
                return True
            if source in self.boxes:
                self._rows(*self.boxes[source], shape, output)
                return True
        if node.op_type == "Transpose" and source in self.boxes:
            self.boxes[output] = self.boxes[source]
            return True
        if node.op_type == "Concat" and source in self.pieces:
            self.b.node("Concat", [p for name in node.input for p in self.pieces[name]], output, axis=1)
            return True
        return False

    def _rows(self, source: str, split: list[int], runs: list[int], output: str) -> None:
        """From channels last that is one Transpose too; or, quicker where each box has many bytes, an anchor's columns
        are cut out, and joined when the levels are."""
        b, (_, na, columns, high, wide) = self.b, split
        if columns <= SHORT:
            apart = b.node("Reshape", [self.last[source], b.shape(0, high, wide, na, columns)], f"{output}.apart")
            turned = b.node("Transpose", [apart], f"{output}.turned", perm=[0, 3, 1, 2, 4])
            self.pieces[output] = [b.node("Reshape", [turned, b.shape(*runs)], output)]
            return
        whole, more = self.wider.get(source, (self.last[source], 0))
        parts = [f"{output}.{i}" for i in range(na)]
        sizes = [columns] * na + ([more] if more else [])
        ends = [f"{part}.columns" for part in parts] + ([f"{output}.rest"] if more else [])
        b.nodes.append(helper.make_node("Split", [whole, b.shape(*sizes)], ends, axis=3))
        shape = b.shape(0, runs[1] // na, runs[2])
        self.pieces[output] = [b.node("Reshape", [f"{part}.columns", shape], part) for part in parts]


class _Builder(OnnxBuilder):
    """New constants under names nobody has."""

    def __init__(self, taken: Iterable[str]) -> None:
        super().__init__(21)
        there = set(taken)
        self._free = (name for name in map("last{}".format, count()) if name not in there)

    def constant(self, value: NDArray[Any]) -> str:
        """An initializer shared by every user of the same value."""
        key = (str(value.dtype), value.shape, value.tobytes())
        if key not in self._shared:
            self._shared[key] = self.tensor(next(self._free), value)
        return self._shared[key]


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), None)
