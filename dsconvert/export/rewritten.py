"""An ONNX file of any origin with the converted network in the place of its layers, and its own float nodes behind."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
from onnx import helper

from dsconvert.base.builder import IR_VERSION, OnnxBuilder
from dsconvert.base.version import VERSION
from dsconvert.export.onnx import LAYOUT_KEY, in_layout
from dsconvert.export.ort.fused import for_onnx_runtime
from dsconvert.export.ort.lastchannels import TO_FIRST
from dsconvert.export.ort.quickform import QuickForm
from dsconvert.export.quantized import INTEGERS, PlainForm
from dsconvert.export.weights.layouts import Layout, check_layout
from dsconvert.export.written import Place, Written
from dsconvert.graph.ir import INPUT
from dsconvert.model.model import Converted
from dsconvert.onnxfile.lower import Lowered
from dsconvert.onnxfile.meaning import STEPS, Exit, Maps
from dsconvert.onnxfile.source import Source, made_within, used


def write_rewritten(source: Source, low: Lowered, maps: Maps, model: Converted, layout: Layout) -> Written:
    """The file with integer weights and activations. Its names, metadata, outputs and batch are the source's."""
    check_layout(model, layout)
    model = in_layout(model, layout)
    b, image = OnnxBuilder(source.opset), low.entrance.shape
    final = _begin(b, source, low)
    kind = INTEGERS if low.entrance.keeps_bytes else "float32"
    form = QuickForm(b, model, layout, kind, image) if layout.quick else PlainForm(b, model, layout, kind)
    for node in model.graph.nodes:
        form.add(node)
    integers = {value: _cut(b, value, form, model) for value in (*model.graph.outputs, *low.shapes.values())}

    def tails(name: str) -> str:
        """Our name of a value that the tail reads: we may have given its own to another."""
        final[f"{source.free_prefix}{name}"] = name
        return f"{source.free_prefix}{name}"

    for name, end in zip(low.exits, maps.exits, strict=True):
        _leave(b, integers[end.name], end, tails(name), name in low.flat)
    for name, value in low.shapes.items():
        asked = onnx.NodeProto()
        asked.CopyFrom(source.nodes[source.makers[name]])
        asked.input[:] = [integers[value].name]  # of integers it is the same
        asked.output[:] = [tails(name)]
        b.nodes.append(asked)
    form.finish()
    final |= {name: f"{source.free_prefix}{name}" for name in b.made() & _tails_names(source, low)}
    b.rename(final)
    made = _assembled(source, low, b)
    meta = {p.key: p.value for p in source.model.metadata_props}
    helper.set_model_props(made, {**meta, LAYOUT_KEY: layout.name})
    places = {value: replace(place, name=final.get(place.name, place.name)) for value, place in form.places().items()}
    weights = {layer: final.get(name, name) for layer, name in form.weights.made.items()}
    return for_onnx_runtime(Written(made, places, weights), layout)


def _tails_names(source: Source, low: Lowered) -> set[str]:
    """Every name that the source's own nodes, inputs and outputs have in the written file."""
    own = _own(source, low)
    names = {value.name for value in (*source.model.graph.input, *source.model.graph.output)}
    return names | {name for node in own for name in (*used(node), *made_within(node))}


def _begin(b: OnnxBuilder, source: Source, low: Lowered) -> dict[str, str]:
    """What the graph reads: a value of the file, or its bytes, turned as the graph has them. Returns our name of what
    the file has, and the file's."""
    image, order = source.image, low.entrance.order
    if not low.entrance.keeps_bytes:
        return {INPUT: low.entrance.value}
    turned, chosen = image.channels_last, order != [*range(image.channels)]
    if not turned and not chosen:
        return {INPUT: image.name}
    taken = name = f"{INPUT}.taken"
    if turned:
        name = b.node("Transpose", [name], f"{INPUT}.turned" if chosen else INPUT, perm=TO_FIRST)
    if chosen:
        b.node("Gather", [name, b.shape(*order)], INPUT, axis=1)
    return {taken: image.name}


def _own(source: Source, low: Lowered) -> list[onnx.NodeProto]:
    """The source's own nodes in the written file, before and behind the graph."""
    return [source.nodes[i] for i in (*low.front, *low.tail)]


def _cut(b: OnnxBuilder, value: str, form: PlainForm, model: Converted) -> Place:
    """Where the file has a value of the graph, without channels that the graph does not have."""
    place = form.place(value)
    if not place.more:
        return place
    ends = [b.shape(0), b.shape(len(model.convs[value].bias)), b.shape(1)]
    return replace(place, name=b.node("Slice", [place.name, *ends], f"{value}.cut"), more=0)


def _leave(b: OnnxBuilder, place: Place, end: Exit, name: str, flat: bool) -> None:
    """The value as the tail reads it: float, each channel by its own step."""
    assert place.grid is not None
    scales = (place.grid.scale * end.step.numpy()).astype(np.float32)
    zeros = (end.zero.numpy() - STEPS.zero_point + place.grid.zero_point).round().astype(np.uint8)
    alike = bool((scales == scales[0]).all() and (zeros == zeros[0]).all())
    parts = [b.constant(scales[0] if alike else scales), b.constant(zeros[0] if alike else zeros)]
    real = f"{end.name}.out" if flat else name
    b.node("DequantizeLinear", [place.name, *parts], real, **({} if alike else {"axis": 1}))
    if flat:
        b.node("Flatten", [real], name)


def _assembled(source: Source, low: Lowered, b: OnnxBuilder) -> onnx.ModelProto:
    """The source with its layers' nodes replaced by the builder's, and what only they read left out."""
    made = onnx.ModelProto()
    made.CopyFrom(source.model)
    graph = made.graph
    own, before = _own(source, low), len(low.front)
    read = {name for node in own for name in used(node)}
    fixed = [onnx.numpy_helper.from_array(np.asarray(v), name) for name, v in low.fixed.items() if name in read]
    stored = [t for t in source.model.graph.initializer if t.name in read]
    del graph.node[:], graph.initializer[:], graph.value_info[:]
    graph.node.extend([*own[:before], *b.nodes, *own[before:]])
    graph.initializer.extend([*stored, *fixed, *b.initializers.values()])
    for entry in graph.input:  # the graph is for images of one size
        dims = entry.type.tensor_type.shape.dim
        for dim, size in zip(dims[1:], source.image.sides, strict=True):
            dim.dim_value = size
    made.ir_version = max(made.ir_version, IR_VERSION[21] if source.opset >= 21 else IR_VERSION[13])
    made.producer_name, made.producer_version = "dsconvert", VERSION
    return made
