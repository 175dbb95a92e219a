"""Write the quantized network in QDQ form, from which engines build their int8 kernels.

Every convolution reads DequantizeLinear values, and a QuantizeLinear follows it. Max-pooling, upsampling and
concatenation of maps on one grid work on the uint8 values directly.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.biases import Biases
from dsconvert.export.ends.inputs import BYTES, add_real_image
from dsconvert.export.halves import join_scales
from dsconvert.export.operators import real_weight
from dsconvert.export.weights.layouts import Layout
from dsconvert.export.weights.weights import Weights
from dsconvert.export.written import Place
from dsconvert.graph.activations import GATES, THREE, activation_table
from dsconvert.graph.gates import is_limit, is_relabelled
from dsconvert.graph.grids import SIGMOID, QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import INPUT, Node, display_name
from dsconvert.graph.ops import OPS
from dsconvert.model.model import Converted
from dsconvert.onnxfile.operators import DOMAIN, LOOKUP

INTEGERS = "integers"  # an input type: the file's image has the graph's own integers


class PlainForm:
    """Walks the graph and keeps the name of the uint8 value of every map.

    Each reader gets a DequantizeLinear of its own. ONNX Runtime would copy a shared one for each reader at load, and
    then optimise the whole graph once more.
    """

    def __init__(self, b: OnnxBuilder, model: Converted, layout: Layout, input_type: str) -> None:
        self.b, self.model, self.layout = b, model, layout
        self.weights, self.biases = Weights(b, layout), Biases(b, layout.lean)
        self.grids = grid_of(model.graph, model.activations)
        self.uint8: dict[str, str] = {}
        self.floats: dict[str, str] = {}  # names of values that have no grid and stay float
        self.readers: Counter[str] = Counter()
        if input_type == INTEGERS or (input_type == "uint8" and self.grids[INPUT] == BYTES):
            self.uint8[INPUT] = INPUT  # the bytes are the quantized image
        else:
            self._quantize(INPUT, add_real_image(b, input_type))

    def add(self, node: Node) -> None:
        """Write the ONNX nodes of one graph node."""
        op = OPS[node.op]
        if node.op == "conv" and node.name not in self.grids:
            self.floats[node.name] = self._conv(node)
        elif node.op == "conv":
            self._add_conv(node)
        elif self._keeps_integers(node):
            self.uint8[node.name] = self.uint8[node.inputs[0]]
        elif op.moves and all(self.grids[x] == self.grids[node.name] for x in node.inputs):
            self.uint8[node.name] = self._moved(node)
        elif self.layout.tables and node.op == "act" and node.inputs[0] in self.uint8:
            self.uint8[node.name] = self._looked_up(node)
        elif node.op == "act" and node.attrs["kind"] in GATES and node.inputs[0] in self.uint8:
            gate = self._dq(self._gate(node), f"{node.name}.sd", SIGMOID)
            self._quantize(node.name, self.b.node("Mul", [self.real(node.inputs[0]), gate], node.name))
        else:
            self._quantize(node.name, op.onnx(self.b, node, [self.real(x) for x in node.inputs], node.name))

    def _keeps_integers(self, node: Node) -> bool:
        """Whether the node's integers are those that it reads."""
        if node.op == "relu":
            return is_limit(node, self.grids[node.name])
        return node.op == "times" and is_relabelled(node, self.grids[node.inputs[0]], self.grids[node.name])

    def _looked_up(self, node: Node) -> str:
        """An activation as a table: that of the integer reference, so that every layout has the same integers."""
        x = node.inputs[0]
        table = self.b.constant(activation_table(node.attrs["kind"], self.grids[x], self.grids[node.name]))
        return self.b.node(LOOKUP, [table, self.uint8[x]], f"{node.name}.q", domain=DOMAIN)

    def _gate(self, node: Node) -> str:
        """Write the factor that an activation multiplies its input by (its gate), quantized in steps of 1/255."""
        x, name = self.real(node.inputs[0]), node.name
        if node.attrs["kind"] == "SiLU":
            return self._q(self.b.node("Sigmoid", [x], f"{name}.s"), f"{name}.sq", SIGMOID)
        # Hardswish's gate is relu6(x + 3) / 6. The uint8 grid ends at 0 and 6, so quantizing clamps as relu6 does.
        # Dividing by
        # 6 changes no integer: only the step becomes a sixth.
        three = self._dq(self.b.constant(np.array(1, np.uint8)), f"{name}.three", THREE)
        return self._q(self.b.node("Add", [x, three], f"{name}.s"), f"{name}.sq", QParams(6 * SIGMOID.scale, 0))

    def finish(self) -> None:
        """Add the nodes that make biases and weights, in front of all others. Call it after the last node."""
        self.biases.finish()
        self.weights.finish()
        if self.layout.lean:
            join_scales(self.b)

    def places(self) -> dict[str, Place]:
        """Return where the file has each of the graph's values, except values without a grid."""
        return {value: Place(name, self.grids[value]) for value, name in self.uint8.items()}

    def raw(self, value: str) -> Place:
        """Return where decoding finds an output of the graph."""
        return self.place(value)

    def place(self, value: str) -> Place:
        """Return where the file has a value of the graph."""
        return Place(self.uint8[value], self.grids[value])

    def real(self, value: str) -> str:
        """Return the name of a value in float: of a new DequantizeLinear, or of the value itself if it has no grid."""
        return self.floats[value] if value in self.floats else self._read(value, self.uint8[value], self.grids[value])

    def _moved(self, node: Node) -> str:
        """Write an operation that only moves values, on uint8."""
        return OPS[node.op].onnx(self.b, node, [self.uint8[x] for x in node.inputs], f"{node.name}.q")

    def _add_conv(self, node: Node) -> None:
        """Write a convolution and the quantization of its result."""
        self._quantize(node.name, self._conv(node))

    def _conv(self, node: Node) -> str:
        """Write a convolution and return the name of its float result."""
        b, name = self.b, display_name(node)
        weight, cds = real_weight(b, name, self.model.convs[node.name].weight, self.weights)
        bias, x = self._bias(node, cds), self.real(node.inputs[0])
        real = b.node("DequantizeLinear", list(bias), f"{name}.b", axis=0)
        return OPS[node.op].onnx(b, node, [x, weight, real], node.name)

    def _bias(self, node: Node, cds: str, more: int = 0) -> tuple[str, str]:
        """Return the names of the bias's integers (cho,) and of their units (cho + more,).

        A unit is the layer's input scale * CDSw.
        """
        b, name, conv = self.b, display_name(node), self.model.convs[node.name]
        source = self.grids[node.inputs[0]]
        integers = conv.bias_int(source.scale).numpy()
        if self.layout.bias_vector:
            return self.biases.add(name, integers, cds, source.scale, more)
        unit = b.node("Mul", [cds, b.scalar(source.scale)], f"{name}.unit")
        return b.tensor(f"{name}.bias", integers), unit

    def _read(self, value: str, integers: str, grid: QParams) -> str:
        self.readers[value] += 1
        return self._dq(integers, f"{value}.d{self.readers[value]}", grid)

    def _quantize(self, value: str, real: str) -> None:
        self.uint8[value] = self._q(real, f"{value}.q", self.grids[value])

    def _grid(self, p: QParams) -> list[str]:
        return [self.b.scalar(p.scale), self.b.constant(np.array(p.zero_point, np.uint8))]

    def _q(self, x: str, out: str, p: QParams) -> str:
        return self.b.node("QuantizeLinear", [x, *self._grid(p)], out)

    def _dq(self, x: str, out: str, p: QParams) -> str:
        return self.b.node("DequantizeLinear", [x, *self._grid(p)], out)
