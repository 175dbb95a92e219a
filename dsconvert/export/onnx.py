"""The ONNX file: input `images` (n, 3, h, w) float 0..1, output `output0` (n, boxes, 5 + nc), as YOLOv5 exports it.

A segmentation network's `output0` has its mask coefficients behind, and `output1` (n, nm, h / 4, w / 4) the prototypes.

On request the input is float16 or the raw bytes (see `inputs`), and the output `detections` (k, 7), see `nms`.

The quantized file is in QDQ form (see `quantized`). Decoding is float.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import TypeVar

import numpy as np
import onnx

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.export.ends.decode import add_decode, box_count
from dsconvert.export.ends.inputs import INPUT_TYPES, add_real_image
from dsconvert.export.ends.nms import Nms, add_nms
from dsconvert.export.ends.opensize import add_open_decode
from dsconvert.export.operators import real_weight
from dsconvert.export.ort.fused import fuse
from dsconvert.export.ort.joined import join_by_tables
from dsconvert.export.ort.quickform import QuickForm
from dsconvert.export.quantized import PlainForm
from dsconvert.export.weights.layouts import Layout, check_layout
from dsconvert.export.weights.real import add_real_weight
from dsconvert.export.weights.weights import Weights
from dsconvert.export.written import Place, Written, float_places
from dsconvert.graph.integer import real_between
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node, display_name
from dsconvert.graph.ops import OPS
from dsconvert.model.model import Converted, DSModel
from dsconvert.onnxfile.operators import need_operators
from dsconvert.yolo.network import Head

OUTPUT, PROTOTYPES, DETECTIONS = "output0", "output1", "detections"
LAYOUT_KEY = "dsconvert.layout"  # of the metadata
FLOAT_OPSET = 13
Model = TypeVar("Model", bound=Converted)


@dataclass(frozen=True)
class Ends:
    """How a file begins and ends: batch size open or 1, one of INPUT_TYPES, with or without NMS; height and width open,
    and the batch size with them, or fixed."""

    dynamic_batch: bool = False
    input_type: str = "float32"
    nms: Nms | None = None
    open_size: bool = False


PLAIN = Ends()


def export_quantized(model: DSModel, layout: Layout, imgsz: SizeLike, ends: Ends = PLAIN) -> onnx.ModelProto:
    """The converted network with integer weights in the given layout (see `layouts`)."""
    return write_quantized(model, layout, imgsz, ends).model


def write_quantized(model: DSModel, layout: Layout, imgsz: SizeLike, ends: Ends = PLAIN) -> Written:
    """The same, and what its names are."""
    check_layout(model, layout)
    # ONNX Runtime optimises for one size, and OpenVINO's integer convolutions of open sizes are wrong
    if ends.open_size and (layout.fused or not layout.rounds_between):
        raise InputError.naming(
            "{layout} {} needs one image size; leave out {dynamic}, or choose another.", layout.name
        )
    if layout.tables:
        need_operators(f"Layout {layout.name}")
    model = in_layout(model, layout)
    made = _written(model, layout, Size.of(imgsz), ends)
    made = fuse(made) if layout.fused else made
    return join_by_tables(made) if layout.tables else made


def in_layout(model: Model, layout: Layout) -> Model:
    """The model whose arithmetic a file of that layout has: the model's own, where all is rounded."""
    if layout.rounds_between:
        return model
    return replace(model, activations=real_between(model.graph, model.activations))


def _written(model: DSModel, layout: Layout, imgsz: Size, ends: Ends) -> Written:
    """The file operator by operator."""
    _check_size(imgsz, model.head)
    b = OnnxBuilder(layout.opset)
    if model.activations:
        q = (
            QuickForm(b, model, layout, ends.input_type, imgsz.image)
            if layout.quick and not ends.open_size
            else PlainForm(b, model, layout, ends.input_type)
        )
        for node in model.graph.nodes:
            q.add(node)
        q.finish()
        raw, places, weights = [q.raw(name) for name in model.graph.outputs], q.places(), q.weights
    else:
        image, weights = add_real_image(b, ends.input_type), Weights(b, layout)
        for node in model.graph.nodes:
            _weight_only(b, _reading(node, image), model, weights)
        weights.finish()
        places = float_places(model.graph)
        raw = [places[name] for name in model.graph.outputs]
    return Written(_finish(b, raw, model.head, imgsz, ends, {LAYOUT_KEY: layout.name}), places, weights.made)


def export_float(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, imgsz: SizeLike, ends: Ends = PLAIN
) -> onnx.ModelProto:
    """The float32 network, for comparison."""
    return write_float(graph, params, head, imgsz, ends).model


def write_float(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, imgsz: SizeLike, ends: Ends = PLAIN
) -> Written:
    """The same, and what its names are."""
    imgsz = Size.of(imgsz)
    _check_size(imgsz, head)
    b, weights, places = OnnxBuilder(FLOAT_OPSET), {}, float_places(graph)
    image = add_real_image(b, ends.input_type)
    for node in (_reading(n, image) for n in graph.nodes):
        given = list(node.inputs)
        if node.op == "conv":
            p, name = params[node.name], display_name(node)
            weights[name] = b.tensor(f"{name}.weight", p.weight.numpy())
            given += [weights[name], b.tensor(f"{name}.bias", p.bias.numpy())]
        OPS[node.op].onnx(b, node, given, node.name)
    made = _finish(b, [places[name] for name in graph.outputs], head, imgsz, ends, {})
    return Written(made, places, weights)


def _check_size(imgsz: Size, head: Head) -> None:
    if not imgsz.fits(head.stride):
        raise InputError(f"The image size {imgsz} is not a multiple of the model's stride {head.stride}.")


def _reading(node: Node, image: str) -> Node:
    """The node with the image under another name."""
    return replace(node, inputs=tuple(image if name == INPUT else name for name in node.inputs))


def _finish(
    b: OnnxBuilder, raw: list[Place], head: Head, imgsz: Size, ends: Ends, extra: Mapping[str, str]
) -> onnx.ModelProto:
    """Raw maps -> the model: decoding, NMS if wanted, metadata."""
    n: int | str = "batch" if ends.dynamic_batch or ends.open_size else 1
    # YOLOv5 reads exactly these two keys: int(stride) and the names as a Python dictionary
    metadata = {"stride": str(head.stride), "names": str(dict(enumerate(head.names))), **extra}
    maps = len(raw) - bool(head.nm)
    decoded = add_open_decode(b, raw[:maps], head) if ends.open_size else add_decode(b, raw[:maps], head, imgsz)
    image: tuple[int | str, ...] = (3, "height", "width") if ends.open_size else imgsz.image
    output: dict[str, tuple[int | str, ...]]
    if ends.nms and head.nm:
        raise InputError.naming("{nms} is for detectors: a segmentation model's masks need every box's coefficients.")
    if ends.nms:
        add_nms(b, decoded, ends.nms, DETECTIONS)
        output = {DETECTIONS: ("detections", 7)}
        metadata["dsconvert.nms"] = str(asdict(ends.nms))
    else:
        b.node("Concat", decoded.all(), OUTPUT, axis=2)
        output = {OUTPUT: (n, "boxes" if ends.open_size else box_count(head, imgsz), sum(head.parts))}
        if head.nm:
            _prototypes(b, raw[-1])
            output[PROTOTYPES] = (n, head.nm, *_prototype_size(head, imgsz, ends))
    return b.model({INPUT: (n, *image)}, output, metadata, INPUT_TYPES[ends.input_type])


def _prototype_size(head: Head, imgsz: Size, ends: Ends) -> tuple[int | str, ...]:
    """Their height and width."""
    if ends.open_size:
        return "mask_height", "mask_width"
    return tuple(2 * side // head.strides[0] for side in imgsz.pair)


def _prototypes(b: OnnxBuilder, raw: Place) -> None:
    """The last output, real."""
    if raw.grid is None:
        b.node("Identity", [raw.name], PROTOTYPES)
    else:
        ends = [b.scalar(raw.grid.scale), b.constant(np.array(raw.grid.zero_point, np.uint8))]
        b.node("DequantizeLinear", [raw.name, *ends], PROTOTYPES)


def _weight_only(b: OnnxBuilder, node: Node, model: Converted, weights: Weights) -> None:
    """Integer weights in a float graph."""
    given = list(node.inputs)
    if node.op == "conv":
        conv, name = model.convs[node.name], display_name(node)
        if weights.layout.real:
            weight = weights.made[name] = add_real_weight(b, name, conv.weight)
        else:
            weight, _ = real_weight(b, name, conv.weight, weights)
        given += [weight, b.tensor(f"{name}.bias", conv.bias.numpy())]
    OPS[node.op].onnx(b, node, given, node.name)
