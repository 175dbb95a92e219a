"""The ONNX file: input `images` (n, 3, s, s) float 0..1, output `output0` (n, boxes, 5 + nc), as YOLOv5 exports it.

A segmentation network's `output0` has its mask coefficients behind, and `output1` (n, nm, s / 4, s / 4) the prototypes.

On request the input is float16 or the raw bytes (see `inputs`), and the output `detections` (k, 7), see `nms`.

The quantized file is in QDQ form: every convolution reads DequantizeLinear values and is followed by
QuantizeLinear, from which engines build their int8 kernels. Max-pool, upsampling and same-grid concatenation
work on the uint8 values directly. Decoding is float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np
import onnx

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.errors import InputError
from dsconvert.export.biases import Biases
from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.decode import RawMap, add_decode, box_count
from dsconvert.export.fused import fuse
from dsconvert.export.inputs import BYTES, INPUT_TYPES, add_real_image
from dsconvert.export.layouts import LAYOUT_OPSET, add_int8_weight
from dsconvert.export.nms import Nms, add_nms
from dsconvert.export.quads import Quads, image_by_quads, kernel_by_quads, outputs_apart, quads_of, twice
from dsconvert.export.quickconv import more_channels
from dsconvert.export.real import add_real_weight, check_layout
from dsconvert.graph.integer import SIGMOID, QParams, grid_of, keeps_grid
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.shapes import value_shapes
from dsconvert.model import DSModel, display_name
from dsconvert.yolo.network import Head

OUTPUT, PROTOTYPES, DETECTIONS = "output0", "output1", "detections"
FLOAT_OPSET = 13


@dataclass(frozen=True)
class Ends:
    """How a file begins and ends: batch size open or 1, one of INPUT_TYPES, with or without NMS."""

    dynamic_batch: bool = False
    input_type: str = "float32"
    nms: Nms | None = None


PLAIN = Ends()


def export_quantized(model: DSModel, layout: str, imgsz: int, ends: Ends = PLAIN) -> onnx.ModelProto:
    """The converted network with integer weights in the given layout (see `layouts`)."""
    check_layout(model, layout)
    if layout == "fused":
        made = fuse(_written(model, "packed", imgsz, ends, None))
        onnx.helper.set_model_props(made, {p.key: p.value for p in made.metadata_props} | {"dsconvert.layout": layout})
        return made
    return _written(model, layout, imgsz, ends, imgsz if layout == "packed" else None)


def _written(model: DSModel, layout: str, imgsz: int, ends: Ends, side: int | None) -> onnx.ModelProto:
    """The file operator by operator; with the image's `side`, its first convolution as ONNX Runtime is fast at it."""
    _check_side(imgsz, model.head)
    b = OnnxBuilder(LAYOUT_OPSET[layout])
    if model.activations:
        q = _Quantized(b, model, layout, ends.input_type, side)
        for node in model.graph.nodes:
            q.add(node)
        q.biases.finish()
        raw = [q.raw(name) for name in model.graph.outputs]
    else:
        image = add_real_image(b, ends.input_type)
        for node in model.graph.nodes:
            _weight_only(b, _reading(node, image), model, layout)
        raw = [RawMap(name) for name in model.graph.outputs]
    return _finish(b, raw, model.head, imgsz, ends, {"dsconvert.layout": layout})


def export_float(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, imgsz: int, ends: Ends = PLAIN
) -> onnx.ModelProto:
    """The float32 network, for comparison."""
    _check_side(imgsz, head)
    b = OnnxBuilder(FLOAT_OPSET)
    image = add_real_image(b, ends.input_type)
    for node in (_reading(n, image) for n in graph.nodes):
        if node.op == "conv":
            p, name = params[node.name], display_name(node)
            weight = b.tensor(f"{name}.weight", p.weight.numpy())
            bias = b.tensor(f"{name}.bias", p.bias.numpy())
            _conv(b, node, [node.inputs[0], weight, bias])
        else:
            _float_op(b, node, list(node.inputs), node.name)
    return _finish(b, [RawMap(name) for name in graph.outputs], head, imgsz, ends, {})


def _check_side(imgsz: int, head: Head) -> None:
    if imgsz % head.stride:
        raise InputError(f"The image size {imgsz} is not a multiple of the model's stride {head.stride}.")


def _reading(node: Node, image: str) -> Node:
    """The node with the image under another name."""
    return replace(node, inputs=tuple(image if name == INPUT else name for name in node.inputs))


def _finish(
    b: OnnxBuilder, raw: list[RawMap], head: Head, imgsz: int, ends: Ends, extra: Mapping[str, str]
) -> onnx.ModelProto:
    """Raw maps -> the model: decoding, NMS if wanted, metadata."""
    n: int | str = "batch" if ends.dynamic_batch else 1
    # YOLOv5 reads exactly these two keys: int(stride) and the names as a Python dictionary
    metadata = {"stride": str(head.stride), "names": str(dict(enumerate(head.names))), **extra}
    maps = len(raw) - bool(head.nm)
    decoded = add_decode(b, raw[:maps], head, imgsz)
    output: dict[str, tuple[int | str, ...]]
    if ends.nms and head.nm:
        raise InputError("--nms is for detectors: a segmentation model's masks need every box's coefficients.")
    if ends.nms:
        add_nms(b, decoded, head.nc, ends.nms, DETECTIONS)
        output = {DETECTIONS: ("detections", 7)}
        metadata["dsconvert.nms"] = str(asdict(ends.nms))
    else:
        b.node("Concat", [decoded.box, decoded.conf, *decoded.masks], OUTPUT, axis=2)
        output = {OUTPUT: (n, box_count(head, imgsz), sum(head.parts))}
        if head.nm:
            _prototypes(b, raw[-1])
            output[PROTOTYPES] = (n, head.nm, *[2 * imgsz // head.strides[0]] * 2)
    return b.model({INPUT: (n, 3, imgsz, imgsz)}, output, metadata, INPUT_TYPES[ends.input_type])


def _prototypes(b: OnnxBuilder, raw: RawMap) -> None:
    """The last output, real."""
    if raw.grid is None:
        b.node("Identity", [raw.name], PROTOTYPES)
    else:
        ends = [b.scalar(raw.grid.scale), b.constant(np.array(raw.grid.zero_point, np.uint8))]
        b.node("DequantizeLinear", [raw.name, *ends], PROTOTYPES)


def _conv(b: OnnxBuilder, node: Node, inputs: list[str]) -> str:
    a = node.attrs
    given = {
        "strides": [a["stride"]] * 2, "pads": [a["padding"]] * 4, "dilations": [a["dilation"]] * 2,
        "group": a["groups"],
    }  # fmt: skip
    usual = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    attributes = {key: value for key, value in given.items() if value != usual[key]}
    return b.node("Conv", inputs, node.name, name=display_name(node), **attributes)


def _real_weight(b: OnnxBuilder, name: str, weight: DSTensor, layout: str, more: int = 0) -> tuple[str, str]:
    """The dequantized weight's name, and that of CDSw, with `more` output channels of zeros: their scales are stored,
    their weights made at load."""
    cds = b.tensor(f"{name}.cds", np.append(weight.cds_w.numpy(), np.ones(more)).astype(np.float32))
    integers = add_int8_weight(b, name, weight, layout)
    if more:
        integers = b.node("Pad", [integers, b.shape(*[0] * 4, more, 0, 0, 0)], f"{name}.all")
    return b.node("DequantizeLinear", [integers, cds], f"{name}.w", axis=0), cds


def _weight_only(b: OnnxBuilder, node: Node, model: DSModel, layout: str) -> None:
    """Integer weights in a float graph."""
    if node.op != "conv":
        _float_op(b, node, list(node.inputs), node.name)
        return
    conv, name = model.convs[node.name], display_name(node)
    if layout == "float":
        weight = add_real_weight(b, name, conv.weight)
    else:
        weight, _ = _real_weight(b, name, conv.weight, layout)
    bias = b.tensor(f"{name}.bias", conv.bias.numpy())
    _conv(b, node, [node.inputs[0], weight, bias])


def _activation(b: OnnxBuilder, kind: str, x: str, output: str) -> str:
    if kind == "ReLU":
        return b.node("Relu", [x], output)
    if kind == "LeakyReLU":
        return b.node("LeakyRelu", [x], output, alpha=0.1)
    if kind == "SiLU":
        return b.node("Mul", [x, b.node("Sigmoid", [x], f"{output}.s")], output)
    # x * relu6(x + 3) / 6, spelled out: HardSwish itself needs opset 14
    gate = b.node("HardSigmoid", [x], f"{output}.s", alpha=1 / 6, beta=0.5)
    return b.node("Mul", [x, gate], output)


def _float_op(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    """Any op but a convolution, on float or (where it only moves values) uint8 inputs."""
    a = node.attrs
    if node.op == "act":
        return _activation(b, a["kind"], inputs[0], output)
    if node.op == "add":
        return b.node("Add", inputs, output)
    if node.op == "concat":
        return b.node("Concat", inputs, output, axis=1)
    if node.op == "maxpool":
        return b.node(
            "MaxPool", inputs, output, kernel_shape=[a["kernel"]] * 2, strides=[a["stride"]] * 2,
            pads=[a["padding"]] * 4,
        )  # fmt: skip
    if node.op == "upsample":
        scales = b.constant(np.array([1, 1, a["scale"], a["scale"]], np.float32))
        return b.node(
            "Resize", [inputs[0], "", scales], output, mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
    if node.op == "space_to_depth":
        return _space_to_depth(b, inputs[0], output)
    raise ValueError(f"unknown op {node.op}")


def _space_to_depth(b: OnnxBuilder, x: str, output: str) -> str:
    """The Focus slices: four strided slices joined along the channels."""
    parts = []
    for column in (0, 1):
        for row in (0, 1):
            ends, axes, steps = b.shape(1 << 30, 1 << 30), b.shape(2, 3), b.shape(2, 2)
            starts = b.shape(row, column)
            parts.append(b.node("Slice", [x, starts, ends, axes, steps], f"{output}.{column}{row}"))
    return b.node("Concat", parts, output, axis=1)


class _Quantized:
    """Walks the graph keeping, for every value, its uint8 name and (made when first asked for) its float name."""

    def __init__(self, b: OnnxBuilder, model: DSModel, layout: str, input_type: str, side: int | None) -> None:
        self.b, self.model, self.layout, self.biases, self.side = b, model, layout, Biases(b), side
        self.grids = grid_of(model.graph, model.activations)
        weights = {name: tuple(conv.weight.vqk.shape) for name, conv in model.convs.items()}
        self.shapes = value_shapes(model.graph, weights, (3, side, side)) if side is not None else {}
        self.uint8: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        self.wide: dict[str, tuple[str, int]] = {}  # raw map -> the map it is the first channels of, and how many more
        if input_type == "uint8" and self.grids[INPUT] == BYTES:
            self.uint8[INPUT] = INPUT  # the bytes are the quantized image
        else:
            self._quantize(INPUT, add_real_image(b, input_type))

    def add(self, node: Node) -> None:
        """Emit one node."""
        b = self.b
        same = all(self.grids[x] == self.grids[node.name] for x in node.inputs)
        if node.op == "upsample" and self.side is not None:
            self.uint8[node.name] = self._upsample(node)
            return
        if keeps_grid(node.op) or (node.op == "concat" and same):
            self.uint8[node.name] = _float_op(b, node, [self.uint8[x] for x in node.inputs], f"{node.name}.q")
            return
        quads = self._quads(node) if node.op == "conv" else None
        if quads:
            self.uint8[node.name] = self._conv_by_quads(node, quads)
            return
        inputs = [self.real(x) for x in node.inputs]
        if node.op == "conv":
            out = self._conv(node, inputs[0])
        elif node.op == "act" and node.attrs["kind"] == "SiLU":
            gate = b.node("Sigmoid", inputs, f"{node.name}.s")
            gate = self._dq(self._q(gate, f"{node.name}.sq", SIGMOID), f"{node.name}.sd", SIGMOID)
            out = b.node("Mul", [inputs[0], gate], node.name)
        else:
            out = _float_op(b, node, inputs, node.name)
        more = self._more(node) if node.op == "conv" else 0
        if more:
            wide = self._q(out, f"{node.name}.wide", self.grids[node.name])
            if node.name in self.model.graph.outputs:
                self.wide[node.name] = wide, more
                return
            cut = [b.shape(0), b.shape(len(self.model.convs[node.name].bias)), b.shape(1)]
            self.uint8[node.name] = b.node("Slice", [wide, *cut], f"{node.name}.q")
        else:
            self._quantize(node.name, out)

    def raw(self, value: str) -> RawMap:
        """An output of the graph, as `decode` shall have it."""
        grid, boxes = (
            self.grids[value],
            self.model.graph.outputs[: len(self.model.graph.outputs) - bool(self.model.head.nm)],
        )
        if self.side is None or value not in boxes:
            return RawMap(self.uint8[value], grid)
        name, more = self.wide.get(value) or (self.uint8[value], 0)
        return RawMap(self.b.node("Transpose", [name], f"{value}.last", perm=[0, 2, 3, 1]), grid, True, more)

    def real(self, value: str) -> str:
        """The dequantized name of a value."""
        if value not in self.floats:
            self.floats[value] = self._dq(self.uint8[value], f"{value}.d", self.grids[value])
        return self.floats[value]

    def _quantize(self, value: str, real: str) -> None:
        self.uint8[value] = self._q(real, f"{value}.q", self.grids[value])

    def _grid(self, p: QParams) -> list[str]:
        return [self.b.scalar(p.scale), self.b.constant(np.array(p.zero_point, np.uint8))]

    def _q(self, x: str, out: str, p: QParams) -> str:
        return self.b.node("QuantizeLinear", [x, *self._grid(p)], out)

    def _dq(self, x: str, out: str, p: QParams) -> str:
        return self.b.node("DequantizeLinear", [x, *self._grid(p)], out)

    def _conv(self, node: Node, x: str) -> str:
        more = self._more(node)
        b, name = self.b, display_name(node)
        weight, cds = _real_weight(b, name, self.model.convs[node.name].weight, self.layout, more)
        bias, unit = self._bias(node, cds, more)
        if more:
            bias = b.node("Pad", [bias, b.shape(0, more)], f"{name}.bias.wide")
        return _conv(b, node, [x, weight, b.node("DequantizeLinear", [bias, unit], f"{name}.b", axis=0)])

    def _more(self, node: Node) -> int:
        """How many output channels of zeros make the convolution one that ONNX Runtime is fast at (see `quickconv`)."""
        quick = self.side is not None and node.attrs["groups"] == 1
        return more_channels(len(self.model.convs[node.name].bias)) if quick else 0

    def _quads(self, node: Node) -> Quads | None:
        """For a convolution of every second pixel of an image whose channels no kernel likes (see `quads`)."""
        a, (_, channels, *kernel) = node.attrs, self.model.convs[node.name].weight.vqk.shape
        if node.inputs != (INPUT,) or self.side is None or channels % 4 == 0:
            return None
        if (a["stride"], a["dilation"], a["groups"]) != (2, 1, 1):
            return None
        return quads_of((kernel[0], kernel[1]), [a["padding"]] * 4, (self.side, self.side))

    def _conv_by_quads(self, node: Node, q: Quads) -> str:
        """The same convolution of two rows of four pixels as one; the quantized result's name."""
        assert self.side is not None
        b, name, w = self.b, display_name(node), self.model.convs[node.name].weight
        cho, chi = w.vqk.shape[:2]
        _, zero = self._grid(self.grids[INPUT])
        last = image_by_quads(b, self.uint8[INPUT], (chi, self.side), q, zero, INPUT)
        first = b.node("Transpose", [last], f"{INPUT}.first", perm=[0, 3, 1, 2])
        integers = kernel_by_quads(b, add_int8_weight(b, name, w, self.layout), tuple(w.vqk.shape), q, name)
        cds = b.tensor(f"{name}.cds", w.cds_w.numpy().astype(np.float32))
        weight = b.node("DequantizeLinear", [integers, twice(b, cds, cds)], f"{name}.w", axis=0)
        real = self._dq(first, f"{INPUT}.first.d", self.grids[INPUT])
        bias = b.node("DequantizeLinear", [twice(b, x, x) for x in self._bias(node, cds)], f"{name}.b", axis=0)
        pads = [q.pads[0], 0, q.pads[1], 0]
        paired = b.node("Conv", [real, weight, bias], f"{node.name}.pairs", name=name, pads=pads)
        paired = self._q(paired, f"{node.name}.paired", self.grids[node.name])
        last = b.node("Transpose", [paired], f"{node.name}.pairs.last", perm=[0, 2, 3, 1])
        apart = outputs_apart(b, last, cho, q, f"{node.name}.last")
        return b.node("Transpose", [apart], f"{node.name}.q", perm=[0, 3, 1, 2])

    def _upsample(self, node: Node) -> str:
        """Every pixel so many times, along one side after the other, channels last: quicker than a Resize."""
        b, name, scale = self.b, node.name, node.attrs["scale"]
        high, wide = self.shapes[node.inputs[0]][1:]
        rows, columns = (b.constant(np.repeat(np.arange(n, dtype=np.int32), scale)) for n in (high, wide))
        last = b.node("Transpose", [self.uint8[node.inputs[0]]], f"{name}.last", perm=[0, 2, 3, 1])
        broad = b.node("Gather", [last, columns], f"{name}.wide", axis=2)
        tall = b.node("Gather", [broad, rows], f"{name}.tall", axis=1)
        return b.node("Transpose", [tall], f"{name}.q", perm=[0, 3, 1, 2])

    def _bias(self, node: Node, cds: str, more: int = 0) -> tuple[str, str]:
        """Names of the bias's integers and of their units; the latter with as many more as CDSw."""
        b, name, conv = self.b, display_name(node), self.model.convs[node.name]
        source = self.grids[node.inputs[0]]
        integers = conv.bias_int(source.scale).numpy()
        if self.layout == "int8":
            unit = b.node("Mul", [cds, b.scalar(source.scale)], f"{name}.unit")
            return b.tensor(f"{name}.bias", integers), unit
        return self.biases.add(name, integers, cds, source.scale, more)
