"""Write the QDQ form in shapes that ONNX Runtime's int8 kernels are fast at, with equal integers (see `quickconv`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.ends.decode import SHORT
from dsconvert.export.operators import real_weight
from dsconvert.export.ort.lastchannels import LAST, TO_FIRST, TO_LAST
from dsconvert.export.ort.quickconv import (
    RUN,
    Quads,
    image_by_quads,
    kernel_by_quads,
    more_channels,
    outputs_apart,
    quads_of,
    twice,
)
from dsconvert.export.quantized import PlainForm
from dsconvert.export.weights.layouts import Layout
from dsconvert.export.written import Place
from dsconvert.graph.ir import INPUT, Node, Shape, display_name
from dsconvert.graph.ops import OPS
from dsconvert.graph.shapes import value_shapes
from dsconvert.model.model import Converted, DSModel


class QuickForm(PlainForm):
    """Writes convolutions, upsampling and outputs in the shapes that ONNX Runtime is fast at.

    Convolutions get padding channels, the image is read in quads, upsampling is a Gather, and decoding gets its maps
    with channels last. All shapes are derived from the image's, (3, h, w).
    """

    def __init__(self, b: OnnxBuilder, model: Converted, layout: Layout, input_type: str, image: Shape) -> None:
        super().__init__(b, model, layout, input_type)
        weights = {name: tuple(conv.weight.vqk.shape) for name, conv in model.convs.items()}
        self.shapes = value_shapes(model.graph, weights, image)
        self.images: dict[tuple[int, ...], str] = {}  # the uint8 image in other shapes
        self.wide: dict[str, Place] = {}  # raw maps that have padding channels

    def places(self) -> dict[str, Place]:
        """Return where the file has each of the graph's values, except values without a grid."""
        return super().places() | self.wide

    def place(self, value: str) -> Place:
        """Return where the file has a value of the graph, perhaps with padding channels."""
        return self.wide.get(value) or super().place(value)

    def raw(self, value: str) -> Place:
        """Return where decoding finds an output of the graph."""
        assert isinstance(self.model, DSModel)  # only a DSModel's outputs are decoded
        place, head = self.place(value), self.model.head
        prototypes = bool(head.nm) and value == self.model.graph.outputs[-1]
        # With few channels, decoding reorders the map itself; ONNX Runtime would merge two Transposes into a slower
        # one.
        few = not self.layout.fused and not place.more and self.shapes[value][0] <= SHORT * head.na
        if prototypes or few:
            return place
        turned = self.b.node("Transpose", [place.name], f"{value}.last", perm=TO_LAST)
        return replace(place, name=turned, last=True)

    def _moved(self, node: Node) -> str:
        return self._upsample(node) if node.op == "upsample" else super()._moved(node)

    def _upsample(self, node: Node) -> str:
        """Repeat every pixel along the width, then along the height.

        A Gather with channels last is faster than a Resize.
        """
        b, name, scale = self.b, node.name, node.attrs["scale"]
        high, wide = self.shapes[node.inputs[0]][1:]
        rows, columns = (b.constant(np.repeat(np.arange(n, dtype=np.int32), scale)) for n in (high, wide))
        last = b.node("Transpose", [self.uint8[node.inputs[0]]], f"{name}.last", perm=TO_LAST)
        broad = b.node("Gather", [last, columns], f"{name}.wide", axis=2)
        tall = b.node("Gather", [broad, rows], f"{name}.q{LAST}", axis=1)
        return b.node("Transpose", [tall], f"{name}.q", perm=TO_FIRST)

    def _add_conv(self, node: Node) -> None:
        """Write a convolution over quads of pixels (see `quickconv`), with padding channels, or as it is."""
        if quads := self._quads(node):
            self.uint8[node.name] = self._conv_by_quads(node, quads)
            return
        more = self._more(node)
        if not more:
            super()._add_conv(node)
            return
        wide = self._q(self._conv(node), f"{node.name}.wide", self.grids[node.name])
        if node.name in self.model.graph.outputs:
            # decoding cuts the padding channels off
            self.wide[node.name] = Place(wide, self.grids[node.name], more=more)
            return
        cut = [self.b.shape(0), self.b.shape(len(self.model.convs[node.name].bias)), self.b.shape(1)]
        self.uint8[node.name] = self.b.node("Slice", [wide, *cut], f"{node.name}.q")

    def _conv(self, node: Node) -> str:
        """Write a convolution with the padding channels that its kernel needs; return the name of its float result."""
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
        """Return how many output channels of zeros the convolution gets."""
        return more_channels(len(self.model.convs[node.name].bias)) if node.attrs["groups"] == 1 else 0

    def _fill(self, node: Node) -> int:
        """Return how many input channels of zeros the convolution gets; only a convolution of the image gets any."""
        return -self.shapes[INPUT][0] % RUN if node.inputs == (INPUT,) and node.attrs["groups"] == 1 else 0

    def _filled_image(self, node: Node, fill: int) -> str:
        """Return a new float name of the image with `fill` channels of zeros added."""
        if (fill,) not in self.images:
            name, (_, zero) = self._image_name(node), self._grid(self.grids[INPUT])
            pads = self.b.shape(*[0] * 5, fill, 0, 0)
            self.images[fill,] = self.b.node("Pad", [self.uint8[INPUT], pads, zero], f"{name}.filled")
        return self._read(self.images[fill,], self.images[fill,], self.grids[INPUT])

    def _image_by_quads(self, node: Node, q: Quads) -> str:
        """Return a new float name of the image in quads."""
        key = (q.left, q.right, q.units)
        if key not in self.images:
            name, (_, zero) = self._image_name(node), self._grid(self.grids[INPUT])
            depth, high, _ = self.shapes[INPUT]
            last = image_by_quads(self.b, self.uint8[INPUT], (depth, high), q, zero, name)
            self.images[key] = self.b.node("Transpose", [last], f"{name}.first", perm=TO_FIRST)
        return self._read(self.images[key], self.images[key], self.grids[INPUT])

    def _image_name(self, node: Node) -> str:
        """Return a name for the image in another shape; a network may need several of them."""
        return f"{node.name}.{INPUT}" if self.images else INPUT

    def _quads(self, node: Node) -> Quads | None:
        """Return the geometry in quads for a stride-2 convolution of an image that lacks channels, else None."""
        a, kernel = node.attrs, self.model.convs[node.name].weight.vqk.shape[2:]
        if not self._fill(node) or (a["stride"], a["dilation"]) != (2, 1):
            return None
        _, high, wide = self.shapes[INPUT]
        return quads_of((kernel[0], kernel[1]), [a["padding"]] * 4, (high, wide))

    def _conv_by_quads(self, node: Node, q: Quads) -> str:
        """Write the convolution over quads and return the name of its quantized result."""
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
