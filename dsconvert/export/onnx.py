"""Write the ONNX file of a float or a converted network.

The file has YOLOv5's own interface by default:

    input  `images`      (n, 3, h, w)              float32, 0..1
    output `output0`     (n, boxes, 5 + nc)        x, y, w, h in pixels, objectness, class scores
    output `output1`     (n, nm, h / 4, w / 4)     mask prototypes, of a segmentation network only

A segmentation network also appends nm mask coefficients to each row of `output0`. On request the input is float16 or
uint8 (see `ends.inputs`). With non-maximum suppression the only output is `detections` (k, 7) (see `ends.nms`).

A converted network is written with QuantizeLinear and DequantizeLinear nodes (see `quantized`). Boxes are decoded in
float.
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
from dsconvert.export.ort.fused import for_onnx_runtime
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
from dsconvert.yolo.network import Head

OUTPUT, PROTOTYPES, DETECTIONS = "output0", "output1", "detections"
LAYOUT_KEY = "dsconvert.layout"  # key of the layout's name in the file's metadata
FLOAT_OPSET = 13
Model = TypeVar("Model", bound=Converted)


@dataclass(frozen=True)
class Ends:
    """The options that decide how a file begins and ends.

    dynamic_batch: leave the batch size open; otherwise it is 1.
    input_type: one of INPUT_TYPES.
    nms: limits of the non-maximum suppression; None leaves it out.
    open_size: leave height, width and batch size open.
    """

    dynamic_batch: bool = False
    input_type: str = "float32"
    nms: Nms | None = None
    open_size: bool = False


PLAIN = Ends()


def export_quantized(model: DSModel, layout: Layout, imgsz: SizeLike, ends: Ends = PLAIN) -> onnx.ModelProto:
    """Return the ONNX model of a converted network, with integer weights in the given layout (see `layouts`)."""
    return write_quantized(model, layout, imgsz, ends).model


def write_quantized(model: DSModel, layout: Layout, imgsz: SizeLike, ends: Ends = PLAIN) -> Written:
    """Write the converted network as `export_quantized` does, and return its names with it.

    Raises InputError when the layout cannot hold the model, the image size or the open size.
    """
    check_layout(model, layout)
    # ONNX Runtime optimises for one size, and OpenVINO's integer convolutions give wrong results at open sizes.
    if ends.open_size and (layout.fused or not layout.rounds_between):
        raise InputError.naming(
            "{layout} {} needs one image size; leave out {dynamic}, or choose another layout.", layout.name
        )
    model = in_layout(model, layout)
    return for_onnx_runtime(_written(model, layout, Size.of(imgsz), ends), layout)


def in_layout(model: Model, layout: Layout) -> Model:
    """Return the model whose arithmetic a file in that layout has.

    This is the model itself, unless the layout does not round between a convolution and its activation: then the grids
    between the two are left out.
    """
    if layout.rounds_between:
        return model
    return replace(model, activations=real_between(model.graph, model.activations))


def _written(model: DSModel, layout: Layout, imgsz: Size, ends: Ends) -> Written:
    """Write the file operator by operator, before ONNX Runtime's optimiser has seen it."""
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
    """Return the ONNX model of the float32 network, for comparison with the converted one."""
    return write_float(graph, params, head, imgsz, ends).model


def write_float(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, imgsz: SizeLike, ends: Ends = PLAIN
) -> Written:
    """Write the float network as `export_float` does, and return its names with it."""
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
    """Return the node with its image input renamed."""
    return replace(node, inputs=tuple(image if name == INPUT else name for name in node.inputs))


def _finish(
    b: OnnxBuilder, raw: list[Place], head: Head, imgsz: Size, ends: Ends, extra: Mapping[str, str]
) -> onnx.ModelProto:
    """Add decoding, the suppression if wanted, and metadata to the raw maps, and return the model."""
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
    """Return the height and width of the mask prototypes, as numbers or as names of open dimensions."""
    if ends.open_size:
        return "mask_height", "mask_width"
    return tuple(2 * side // head.strides[0] for side in imgsz.pair)


def _prototypes(b: OnnxBuilder, raw: Place) -> None:
    """Make the network's last map the prototypes output, in float."""
    if raw.grid is None:
        b.node("Identity", [raw.name], PROTOTYPES)
    else:
        ends = [b.scalar(raw.grid.scale), b.constant(np.array(raw.grid.zero_point, np.uint8))]
        b.node("DequantizeLinear", [raw.name, *ends], PROTOTYPES)


def _weight_only(b: OnnxBuilder, node: Node, model: Converted, weights: Weights) -> None:
    """Add one node of a network with quantized weights and float activations."""
    given = list(node.inputs)
    if node.op == "conv":
        conv, name = model.convs[node.name], display_name(node)
        if weights.layout.real:
            weight = weights.made[name] = add_real_weight(b, name, conv.weight)
        else:
            weight, _ = real_weight(b, name, conv.weight, weights)
        given += [weight, b.tensor(f"{name}.bias", conv.bias.numpy())]
    OPS[node.op].onnx(b, node, given, node.name)
