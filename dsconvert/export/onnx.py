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
from dsconvert.export.decode import add_decode, box_count
from dsconvert.export.fused import fuse
from dsconvert.export.inputs import BYTES, INPUT_TYPES, add_real_image
from dsconvert.export.layouts import LAYOUT_OPSET, add_int8_weight
from dsconvert.export.nms import Nms, add_nms
from dsconvert.export.quickconv import by_twos, kernel_by_twos, more_channels
from dsconvert.export.real import add_real_weight, check_layout
from dsconvert.graph.integer import SIGMOID, QParams, grid_of, keeps_grid
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
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
    b = OnnxBuilder(LAYOUT_OPSET[layout])
    if model.activations:
        q = _Quantized(b, model, layout, ends.input_type, side)
        for node in model.graph.nodes:
            q.add(node)
        q.biases.finish()
        raw, grids = [q.uint8[name] for name in model.graph.outputs], [q.grids[name] for name in model.graph.outputs]
    else:
        image = add_real_image(b, ends.input_type)
        for node in model.graph.nodes:
            _weight_only(b, _reading(node, image), model, layout)
        raw, grids = list(model.graph.outputs), None
    return _finish(b, raw, grids, model.head, imgsz, ends, {"dsconvert.layout": layout})


def export_float(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, imgsz: int, ends: Ends = PLAIN
) -> onnx.ModelProto:
    """The float32 network, for comparison."""
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
    return _finish(b, list(graph.outputs), None, head, imgsz, ends, {})


def _reading(node: Node, image: str) -> Node:
    """The node with the image under another name."""
    return replace(node, inputs=tuple(image if name == INPUT else name for name in node.inputs))


def _finish(
    b: OnnxBuilder,
    raw: list[str],
    grids: list[QParams] | None,
    head: Head,
    imgsz: int,
    ends: Ends,
    extra: Mapping[str, str],
) -> onnx.ModelProto:
    """Raw maps (uint8 on grids, or float) -> the model: decoding, NMS if wanted, metadata."""
    if imgsz % head.stride:
        raise InputError(f"The image size {imgsz} is not a multiple of the model's stride {head.stride}.")
    n: int | str = "batch" if ends.dynamic_batch else 1
    # YOLOv5 reads exactly these two keys: int(stride) and the names as a Python dictionary
    metadata = {"stride": str(head.stride), "names": str(dict(enumerate(head.names))), **extra}
    maps = len(raw) - bool(head.nm)
    decoded = add_decode(b, raw[:maps], head, imgsz, grids and grids[:maps])
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
            _prototypes(b, raw[-1], grids[-1] if grids else None)
            output[PROTOTYPES] = (n, head.nm, *[2 * imgsz // head.strides[0]] * 2)
    return b.model({INPUT: (n, 3, imgsz, imgsz)}, output, metadata, INPUT_TYPES[ends.input_type])


def _prototypes(b: OnnxBuilder, raw: str, grid: QParams | None) -> None:
    """The last output, real."""
    if grid is None:
        b.node("Identity", [raw], PROTOTYPES)
    else:
        ends = [b.scalar(grid.scale), b.constant(np.array(grid.zero_point, np.uint8))]
        b.node("DequantizeLinear", [raw, *ends], PROTOTYPES)


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
        self.uint8: dict[str, str] = {}
        self.floats: dict[str, str] = {}
        if input_type == "uint8" and self.grids[INPUT] == BYTES:
            self.uint8[INPUT] = INPUT  # the bytes are the quantized image
        else:
            self._quantize(INPUT, add_real_image(b, input_type))

    def add(self, node: Node) -> None:
        """Emit one node."""
        b = self.b
        same = all(self.grids[x] == self.grids[node.name] for x in node.inputs)
        if keeps_grid(node.op) or (node.op == "concat" and same):
            self.uint8[node.name] = _float_op(b, node, [self.uint8[x] for x in node.inputs], f"{node.name}.q")
            return
        twos = node.op == "conv" and self._takes_twos(node)
        inputs = [] if twos else [self.real(x) for x in node.inputs]
        if node.op == "conv":
            out = self._conv_by_twos(node) if twos else self._conv(node, inputs[0])
        elif node.op == "act" and node.attrs["kind"] == "SiLU":
            gate = b.node("Sigmoid", inputs, f"{node.name}.s")
            gate = self._dq(self._q(gate, f"{node.name}.sq", SIGMOID), f"{node.name}.sd", SIGMOID)
            out = b.node("Mul", [inputs[0], gate], node.name)
        else:
            out = _float_op(b, node, inputs, node.name)
        if node.op == "conv" and self._more(node):
            wide = self._q(out, f"{node.name}.wide", self.grids[node.name])
            cut = [b.shape(0), b.shape(len(self.model.convs[node.name].bias)), b.shape(1)]
            self.uint8[node.name] = b.node("Slice", [wide, *cut], f"{node.name}.q")
        else:
            self._quantize(node.name, out)

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
        weight, cds = _real_weight(self.b, display_name(node), self.model.convs[node.name].weight, self.layout, more)
        return _conv(self.b, node, [x, weight, self._bias(node, cds, more)])

    def _more(self, node: Node) -> int:
        """How many output channels of zeros make the convolution one that ONNX Runtime is fast at (see `quickconv`)."""
        quick = self.side is not None and node.attrs["groups"] == 1
        return more_channels(len(self.model.convs[node.name].bias)) if quick else 0

    def _takes_twos(self, node: Node) -> bool:
        """Whether it convolves every second pixel of an image whose channels no kernel likes (see `quickconv`)."""
        a, channels = node.attrs, self.model.convs[node.name].weight.vqk.shape[1]
        at_image = node.inputs == (INPUT,) and self.side is not None and self.side % 2 == 0
        return at_image and channels % 4 != 0 and (a["stride"], a["dilation"], a["groups"]) == (2, 1, 1)

    def _conv_by_twos(self, node: Node) -> str:
        """The same convolution of two by two pixels as one."""
        assert self.side is not None
        b, name, w = self.b, display_name(node), self.model.convs[node.name].weight
        size, shape = (self.side, self.side), tuple(w.vqk.shape)
        last = by_twos(b, self.uint8[INPUT], (shape[1], *size), INPUT)
        first = b.node("Transpose", [last], f"{INPUT}.first", perm=[0, 3, 1, 2])
        integers = add_int8_weight(b, name, w, self.layout)
        integers, pads = kernel_by_twos(b, integers, shape, [node.attrs["padding"]] * 4, size, name)
        cds = b.tensor(f"{name}.cds", w.cds_w.numpy().astype(np.float32))
        weight = b.node("DequantizeLinear", [integers, cds], f"{name}.w", axis=0)
        real = self._dq(first, f"{INPUT}.first.d", self.grids[INPUT])
        return b.node("Conv", [real, weight, self._bias(node, cds)], node.name, name=name, pads=pads)

    def _bias(self, node: Node, cds: str, more: int = 0) -> str:
        b, name, conv = self.b, display_name(node), self.model.convs[node.name]
        source = self.grids[node.inputs[0]]
        integers = conv.bias_int(source.scale).numpy()
        if self.layout == "int8":
            unit = b.node("Mul", [cds, b.scalar(source.scale)], f"{name}.unit")
            return b.node("DequantizeLinear", [b.tensor(f"{name}.bias", integers), unit], f"{name}.b", axis=0)
        return self.biases.add(name, integers, cds, source.scale, more)
