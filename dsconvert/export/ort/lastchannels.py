"""Layout fused, second step: feature maps with channels last, from the first convolution to the decoding.

ONNX Runtime's int8 convolutions need channels last, and it transposes a graph with channels first whenever it loads it.
Here this is done once, and pairs of Transpose that cancel are removed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import onnx
from onnx import helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.onnxfile.operators import DOMAIN, LOOKUP
from dsconvert.onnxfile.source import attribute

LAST = ".last"  # suffix of a map's name when its channels are last
MICROSOFT = "com.microsoft"
TO_LAST, TO_FIRST = [0, 2, 3, 1], [0, 3, 1, 2]
# operators whose output at a place depends only on the inputs at that place
PLACEWISE = (
    "QLinearSigmoid", "QLinearMul", "QLinearAdd", "QLinearLeakyRelu", "QuantizeLinear", "DequantizeLinear", "Relu",
    "LeakyRelu", "HardSigmoid", "Sigmoid", "Mul", "Add",
)  # fmt: skip
JOINING = ("QLinearConcat", "Concat")
Shapes = Mapping[str, tuple[int, ...]]


def channels_last(model: onnx.ModelProto, constants: Shapes) -> dict[str, str]:
    """Turn the model's feature maps to channels last, in place.

    constants: shapes of all values that are known before an image is.

    Returns the new names of maps that have their channels last now, by their old names.
    """
    walk = _Walk(model, constants)
    for node in model.graph.node:
        walk.add(node)
    used, nodes = set(walk.outputs), []
    for node in reversed(walk.b.nodes):
        if used & set(node.output):
            used |= set(node.input)
            nodes.append(node)
    kept = [t for t in model.graph.initializer if t.name in used]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(reversed(nodes))
    model.graph.initializer.extend(kept)
    return walk.last


class _Walk:
    """Copies nodes one by one, with channels last where possible.

    last: names of the maps with channels last, by the names that the maps had.
    same: names of values that are such a map under another name.
    """

    def __init__(self, model: onnx.ModelProto, constants: Shapes) -> None:
        self.b, self.constants = OnnxBuilder(21), constants
        self.outputs = {v.name for v in model.graph.output}
        self.last: dict[str, str] = {}
        self.same: dict[str, str] = {}

    def add(self, node: onnx.NodeProto) -> None:
        """Emit one node, with channels last if it reads feature maps."""
        if node.op_type == "QLinearConv":
            self._conv(node)
        elif not (self._cancels(node) or self._turned(node)):
            for name in node.input:
                self._first(name)
            made = onnx.NodeProto()
            made.CopyFrom(node)
            made.input[:] = [self.same.get(name, name) for name in node.input]
            self.b.nodes.append(made)

    def _cancels(self, node: onnx.NodeProto) -> bool:
        """Return whether a Transpose gives a map that exists already; then the node is left out."""
        if node.op_type != "Transpose" or node.output[0] in self.outputs:
            return False
        source, order = node.input[0], attribute(node, "perm")
        if order == TO_LAST and source in self.last:
            self.same[node.output[0]] = self.last[source]
        elif order == TO_FIRST:
            self.last[node.output[0]] = self.same.get(source, source)
        else:
            return False
        return True

    def _turned(self, node: onnx.NodeProto) -> bool:
        """Emit a node with channels last, and return True, if it reads such a map and its form for channels last is
        known.
        """
        if not any(name in self.last for name in node.input) or self.outputs & set(node.output):
            return False
        if node.domain == DOMAIN and node.op_type == LOOKUP:
            self._same(node, LOOKUP, DOMAIN)
        elif node.op_type in PLACEWISE:
            parts = [name for name in node.input if name and name not in self.last]
            if not all(name in self.constants and math.prod(self.constants[name]) == 1 for name in parts):
                return False
            self._same(node, node.op_type, node.domain)
        elif node.op_type in JOINING and attribute(node, "axis") == 1:
            self._same(node, node.op_type, node.domain, {"axis": 3}, turn=True)
        elif node.op_type == "MaxPool" and len(node.output) == 1:
            self._same(node, "NhwcMaxPool", MICROSOFT)
        else:
            return False
        return True

    def _same(
        self, node: onnx.NodeProto, kind: str, domain: str, changed: Mapping[str, int] | None = None, turn: bool = False
    ) -> None:
        """Emit the same operator on maps with channels last; `turn` transposes inputs that are not so yet."""
        inputs = [
            self._turn(name) if turn and name not in self.constants else self.last.get(name, name)
            for name in node.input
        ]
        made = helper.make_node(kind, inputs, [self._named(name) for name in node.output], domain=domain)
        gone = {"storage_order", *(changed or {})}  # storage_order only affects indices, which nothing reads
        made.attribute.extend(a for a in node.attribute if a.name not in gone)
        made.attribute.extend(helper.make_attribute(name, value) for name, value in (changed or {}).items())
        self.b.nodes.append(made)

    def _named(self, name: str) -> str:
        self.last[name] = f"{name}{LAST}"
        return self.last[name]

    def _turn(self, name: str) -> str:
        """Return the name of the map with channels last."""
        if name not in self.last:
            self.b.node("Transpose", [name], self._named(name), perm=TO_LAST)
        return self.last[name]

    def _first(self, name: str) -> None:
        """Transpose the map back to channels first, under its old name, if a node needs it so."""
        if name in self.last and not self.b.has(name):
            self.b.node("Transpose", [self.last[name]], name, perm=TO_FIRST)

    def _conv(self, node: onnx.NodeProto) -> None:
        inputs = [self._turn(node.input[0]), *node.input[1:]]
        made = helper.make_node("QLinearConv", inputs, [self._named(node.output[0])], name=node.name, domain=MICROSOFT)
        made.attribute.extend(node.attribute)
        made.attribute.append(helper.make_attribute("channels_last", 1))
        self.b.nodes.append(made)
