"""The quantized network in QDQ form: every convolution reads DequantizeLinear values and is followed by QuantizeLinear,
from which engines build their int8 kernels. Max-pool, upsampling and same-grid concatenation work on the uint8 values.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from dsconvert.export.biases import Biases
from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.decode import SHORT, RawMap
from dsconvert.export.inputs import BYTES, add_real_image
from dsconvert.export.lastchannels import LAST, TO_FIRST, TO_LAST
from dsconvert.export.operators import real_weight
from dsconvert.export.quickconv import (
    RUN,
    Quads,
    image_by_quads,
    kernel_by_quads,
    more_channels,
    outputs_apart,
    quads_of,
    twice,
)
from dsconvert.export.weights import Weights
from dsconvert.graph.grids import SIGMOID, QParams
from dsconvert.graph.integer import grid_of
from dsconvert.graph.ir import INPUT, Node, display_name
from dsconvert.graph.ops import OPS
from dsconvert.graph.shapes import value_shapes
from dsconvert.model import DSModel


class Quantized:
    """Walks the graph keeping the uint8 name of every value. Each reader dequantizes it anew: ONNX Runtime would copy
    what readers share, and then look at the whole graph once more.

    Given the image's `side`, it writes what ONNX Runtime is fast at, with equal integers: convolutions in other shapes
    (see `quickconv`), upsampling by Gather, and maps for `decode` with their channels last."""

    def __init__(self, b: OnnxBuilder, model: DSModel, layout: str, input_type: str, side: int | None) -> None:
        self.b, self.model, self.layout, self.biases, self.side = b, model, layout, Biases(b), side
        self.weights = Weights(b, layout)
        self.grids = grid_of(model.graph, model.activations)
        weights = {name: tuple(conv.weight.vqk.shape) for name, conv in model.convs.items()}
        self.shapes = value_shapes(model.graph, weights, (3, side, side)) if side is not None else {}
        self.uint8: dict[str, str] = {}
        self.floats: dict[str, str] = {}  # values without a grid
        self.readers: Counter[str] = Counter()
        self.quick = {} if side is None else {"upsample": self._upsample}  # operation -> its own way here
        self.images: dict[tuple[int, ...], str] = {}  # the image in other shapes, bytes
        self.wide: dict[str, tuple[str, int]] = {}  # raw map -> the map it is the first channels of, and how many more
        if input_type == "uint8" and self.grids[INPUT] == BYTES:
            self.uint8[INPUT] = INPUT  # the bytes are the quantized image
        else:
            self._quantize(INPUT, add_real_image(b, input_type))

    def add(self, node: Node) -> None:
        """Emit one node."""
        b, op = self.b, OPS[node.op]
        if node.op == "conv":
            self._add_conv(node)
        elif quick := self.quick.get(node.op):
            self.uint8[node.name] = quick(node)
        elif op.moves and all(self.grids[x] == self.grids[node.name] for x in node.inputs):
            self.uint8[node.name] = op.onnx(b, node, [self.uint8[x] for x in node.inputs], f"{node.name}.q")
        elif node.op == "act" and node.attrs["kind"] == "SiLU" and node.inputs[0] in self.uint8:
            gate = b.node("Sigmoid", [self.real(node.inputs[0])], f"{node.name}.s")
            gate = self._dq(self._q(gate, f"{node.name}.sq", SIGMOID), f"{node.name}.sd", SIGMOID)
            self._quantize(node.name, b.node("Mul", [self.real(node.inputs[0]), gate], node.name))
        else:
            self._quantize(node.name, op.onnx(b, node, [self.real(x) for x in node.inputs], node.name))

    def _add_conv(self, node: Node) -> None:
        b = self.b
        if node.name not in self.grids:
            self.floats[node.name] = self._conv(node)
            return
        if quads := self._quads(node):
            self.uint8[node.name] = self._conv_by_quads(node, quads)
            return
        out, more = self._conv(node), self._more(node)
        if not more:
            self._quantize(node.name, out)
            return
        wide = self._q(out, f"{node.name}.wide", self.grids[node.name])
        if node.name in self.model.graph.outputs:
            self.wide[node.name] = wide, more
            return
        cut = [b.shape(0), b.shape(len(self.model.convs[node.name].bias)), b.shape(1)]
        self.uint8[node.name] = b.node("Slice", [wide, *cut], f"{node.name}.q")

    def finish(self) -> None:
        """After the last node: put what biases and weights are made of in front."""
        self.biases.finish()
        self.weights.finish()

    def raw(self, value: str) -> RawMap:
        """An output of the graph, as `decode` shall have it."""
        grid, graph = self.grids[value], self.model.graph
        prototypes = bool(self.model.head.nm) and value == graph.outputs[-1]
        if self.side is None or prototypes:
            return RawMap(self.uint8[value], grid)
        name, more = self.wide.get(value) or (self.uint8[value], 0)
        if self.layout == "packed" and not more and self.shapes[value][0] <= SHORT * self.model.head.na:
            # decoding turns it around by itself; ONNX Runtime would make one Transpose of the two
            return RawMap(name, grid)
        return RawMap(self.b.node("Transpose", [name], f"{value}.last", perm=TO_LAST), grid, True, more)

    def real(self, value: str) -> str:
        """A dequantized name of a value, another one every time; of one without a grid its own."""
        return self.floats[value] if value in self.floats else self._read(value, self.uint8[value], self.grids[value])

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

    def _conv(self, node: Node) -> str:
        """In layout packed with zeros for the channels that its kernel lacks (see `quickconv`)."""
        b, name = self.b, display_name(node)
        more, fill = self._more(node), self._fill(node)
        weight, cds = real_weight(b, name, self.model.convs[node.name].weight, self.weights, more, fill)
        bias, unit = self._bias(node, cds, more)
        if more:
            bias = b.node("Pad", [bias, b.shape(0, more)], f"{name}.bias.wide")
        x = self._filled_image(node, fill) if fill else self.real(node.inputs[0])
        real = b.node("DequantizeLinear", [bias, unit], f"{name}.b", axis=0)
        return OPS[node.op].onnx(b, node, [x, weight, real], node.name)

    def _more(self, node: Node) -> int:
        """How many output channels of zeros it shall have."""
        quick = self.side is not None and node.attrs["groups"] == 1
        return more_channels(len(self.model.convs[node.name].bias)) if quick else 0

    def _fill(self, node: Node) -> int:
        """How many input channels of zeros it shall have: those an image lacks."""
        quick = self.side is not None and node.inputs == (INPUT,) and node.attrs["groups"] == 1
        return -self.shapes[INPUT][0] % RUN if quick else 0

    def _filled_image(self, node: Node, fill: int) -> str:
        if (fill,) not in self.images:
            name, (_, zero) = self._image_name(node), self._grid(self.grids[INPUT])
            pads = self.b.shape(*[0] * 5, fill, 0, 0)
            self.images[fill,] = self.b.node("Pad", [self.uint8[INPUT], pads, zero], f"{name}.filled")
        return self._read(self.images[fill,], self.images[fill,], self.grids[INPUT])

    def _image_by_quads(self, node: Node, q: Quads) -> str:
        key = (q.left, q.right, q.units)
        if key not in self.images:
            name, (_, zero) = self._image_name(node), self._grid(self.grids[INPUT])
            depth, high, _ = self.shapes[INPUT]
            last = image_by_quads(self.b, self.uint8[INPUT], (depth, high), q, zero, name)
            self.images[key] = self.b.node("Transpose", [last], f"{name}.first", perm=TO_FIRST)
        return self._read(self.images[key], self.images[key], self.grids[INPUT])

    def _image_name(self, node: Node) -> str:
        """What the image in another shape is called: a network with several convolutions of it may need several."""
        return f"{node.name}.{INPUT}" if self.images else INPUT

    def _quads(self, node: Node) -> Quads | None:
        """For a convolution of every second pixel of an image whose channels no kernel likes (see `quickconv`)."""
        a, kernel = node.attrs, self.model.convs[node.name].weight.vqk.shape[2:]
        if self.side is None or not self._fill(node) or (a["stride"], a["dilation"]) != (2, 1):
            return None
        return quads_of((kernel[0], kernel[1]), [a["padding"]] * 4, (self.side, self.side))

    def _conv_by_quads(self, node: Node, q: Quads) -> str:
        """The same convolution of two rows of four pixels as one; the quantized result's name."""
        b, name, w = self.b, display_name(node), self.model.convs[node.name].weight
        cho = len(w.vqk)
        real = self._image_by_quads(node, q)
        integers = kernel_by_quads(b, self.weights.add(name, w), tuple(w.vqk.shape), q, name)
        cds = b.tensor(f"{name}.cds", w.cds_w.numpy().astype(np.float32))
        weight = b.node("DequantizeLinear", [integers, twice(b, cds, cds)], f"{name}.w", axis=0)
        bias = b.node("DequantizeLinear", [twice(b, x, x) for x in self._bias(node, cds)], f"{name}.b", axis=0)
        pads = [q.pads[0], 0, q.pads[1], 0]
        paired = b.node("Conv", [real, weight, bias], f"{node.name}.pairs", name=name, pads=pads)
        paired = self._q(paired, f"{node.name}.paired", self.grids[node.name])
        last = b.node("Transpose", [paired], f"{node.name}.pairs.last", perm=TO_LAST)
        apart = outputs_apart(b, last, cho, q, f"{node.name}.q{LAST}")
        return b.node("Transpose", [apart], f"{node.name}.q", perm=TO_FIRST)

    def _upsample(self, node: Node) -> str:
        """Every pixel so many times, along one side after the other, channels last: quicker than a Resize."""
        b, name, scale = self.b, node.name, node.attrs["scale"]
        high, wide = self.shapes[node.inputs[0]][1:]
        rows, columns = (b.constant(np.repeat(np.arange(n, dtype=np.int32), scale)) for n in (high, wide))
        last = b.node("Transpose", [self.uint8[node.inputs[0]]], f"{name}.last", perm=TO_LAST)
        broad = b.node("Gather", [last, columns], f"{name}.wide", axis=2)
        tall = b.node("Gather", [broad, rows], f"{name}.q{LAST}", axis=1)
        return b.node("Transpose", [tall], f"{name}.q", perm=TO_FIRST)

    def _bias(self, node: Node, cds: str, more: int = 0) -> tuple[str, str]:
        """Names of the bias's integers and of their units; the latter with as many more as CDSw."""
        b, name, conv = self.b, display_name(node), self.model.convs[node.name]
        source = self.grids[node.inputs[0]]
        integers = conv.bias_int(source.scale).numpy()
        if self.layout == "int8":
            unit = b.node("Mul", [cds, b.scalar(source.scale)], f"{name}.unit")
            return b.tensor(f"{name}.bias", integers), unit
        return self.biases.add(name, integers, cds, source.scale, more)
