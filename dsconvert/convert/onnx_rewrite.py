"""Write an ONNX file with new weights in its layers: as float tensors, or as the integers of DSConv."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from dsconvert.base.builder import IR_VERSION, OnnxBuilder
from dsconvert.base.version import VERSION
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.weights import layouts
from dsconvert.graph.integer import QConv
from dsconvert.onnxfile.compact import short_names
from dsconvert.onnxfile.layers import Layer
from dsconvert.onnxfile.source import Source, used

# the layouts in which such a file can be written
LAYOUTS = {name: layout for name, layout in layouts.LAYOUTS.items() if layout.rewrites}
LAYOUT_KEY = "dsconvert.layout"


def replaced(source: Source, layer: Layer, weight: str, bias: str) -> dict[int, list[onnx.NodeProto]]:
    """Return the layer's nodes, reading a new weight and bias, by their index in the file.

    weight: name of (cho, chi, kh, kw), or of (cho, chi) for a matrix.
    bias: name of (cho,).
    """
    node = onnx.NodeProto()
    node.CopyFrom(source.nodes[layer.index])
    if not layer.linear or node.op_type == "Gemm":
        node.input[:] = [layer.value, weight, bias]
        if node.op_type == "Gemm":
            del node.attribute[:]
            node.attribute.append(helper.make_attribute("transB", 1))
        return {layer.index: [node]}
    own = bias.removesuffix(".bias")  # named after this layer, as several layers may read one weight
    turned, plain = f"{own}.turned", node.output[0] if layer.adder is not None else f"{own}.plain"
    made = node.output[0]
    node.input[:], node.output[:] = [layer.value, turned], [plain]
    nodes = [helper.make_node("Transpose", [weight], [turned], perm=[1, 0]), node]
    if layer.adder is None:
        return {layer.index: [*nodes, helper.make_node("Add", [plain, bias], [made])]}
    adder = onnx.NodeProto()
    adder.CopyFrom(source.nodes[layer.adder])
    adder.input[:] = [plain, bias]
    return {layer.index: nodes, layer.adder: [adder]}


def float_tensors(layer: Layer, conv: QConv, name: str) -> list[onnx.TensorProto]:
    """Return W' and its bias as tensors `name` and `name`.bias, in the layer's own type and shape."""
    weight = conv.weight.weight().flatten(1) if layer.linear else conv.weight.weight()
    kind = np.float16 if layer.half else np.float32
    values = {name: weight, f"{name}.bias": conv.bias}
    return [numpy_helper.from_array(v.numpy().astype(kind), n) for n, v in values.items()]


def with_floats(source: Source, layers: Sequence[Layer], fitted: Mapping[int, QConv]) -> onnx.ModelProto:
    """Return the file with W' as float tensors."""
    nodes, tensors = {}, []
    for layer in layers:
        name = f"{source.free_prefix}{layer.index}"
        nodes.update(replaced(source, layer, name, f"{name}.bias"))
        tensors += float_tensors(layer, fitted[layer.index], name)
    return _assembled(source, nodes, [], tensors)


def with_integers(
    source: Source, layers: Sequence[Layer], fitted: Mapping[int, QConv], layout: layouts.Layout
) -> onnx.ModelProto:
    """Return the file with VQK and shifts, from which nodes compute W' at load.

    W' is a Cast and a Mul, which engines compute once. They would compute a DequantizeLinear again in every inference.
    """
    b = OnnxBuilder(source.opset)
    nodes: dict[int, list[onnx.NodeProto]] = {}
    values: dict[tuple[str, int], str] = {}
    own: list[str] = []
    for layer, name in zip(layers, _names(source, layers), strict=True):
        conv, before = fitted[layer.index], set(b.initializers)
        key = (layer.stored, id(conv.weight))
        if key not in values:
            values[key] = _real_weight(b, name, layer, conv.weight, layout)
        kind = np.float16 if layer.half else np.float32
        bias = b.tensor(f"{name}.bias", conv.bias.numpy().astype(kind))
        own += [n for n in b.initializers if n not in before and n.startswith(f"{name}.")]
        nodes.update(replaced(source, layer, values[key], bias))
    added = [n for some in nodes.values() for n in some]
    taken = set(source.makers) | {source.image.name}
    ours = {out for n in [*b.nodes, *added] for out in n.output if out not in taken} | set(b.initializers)
    free = (f"{source.free_prefix}{n}" for n in short_names())
    renamed = {n: next(free) for n in sorted(ours - set(own))}
    for node in [*b.nodes, *added]:
        for side in (node.input, node.output):
            side[:] = [renamed.get(n, n) for n in side]
    tensors = list(b.initializers.values())
    for tensor in tensors:
        tensor.name = renamed.get(tensor.name, tensor.name)
    made = _assembled(source, nodes, b.nodes, tensors)
    if not layout.merged:
        made.ir_version = max(made.ir_version, IR_VERSION[layout.opset])  # the IR version that introduced INT4
    made.producer_name, made.producer_version = "dsconvert", VERSION
    meta = {p.key: p.value for p in made.metadata_props}
    helper.set_model_props(made, {**meta, LAYOUT_KEY: layout.name})
    return made


def _real_weight(b: OnnxBuilder, name: str, layer: Layer, weight: DSTensor, layout: layouts.Layout) -> str:
    """Write the nodes of W' as the layer reads it."""
    integers = layouts.add_int8_weight(b, name, weight, layout)
    cds = b.tensor(f"{name}.cds", weight.cds_w.numpy()[:, None, None, None])
    value = b.node("Cast", [integers], f"{name}.real", to=TensorProto.FLOAT)
    value = b.node("Mul", [value, cds], f"{name}.w")
    if layer.linear:
        value = b.node("Reshape", [value, b.shape(*weight.vqk.shape[:2])], f"{name}.matrix")
    return b.node("Cast", [value], f"{name}.half", to=TensorProto.FLOAT16) if layer.half else value


def _assembled(
    source: Source, nodes: Mapping[int, list[onnx.NodeProto]], first: Sequence[onnx.NodeProto],
    tensors: Sequence[onnx.TensorProto],
) -> onnx.ModelProto:  # fmt: skip
    """Return the source with some nodes replaced, without constants that no node reads any more."""
    made = onnx.ModelProto()
    made.CopyFrom(source.model)
    graph = made.graph
    kept: list[onnx.NodeProto] = []
    read = {v.name for v in graph.output}
    for i, node in reversed(list(enumerate(source.nodes))):
        if i in source.constant and i not in nodes and read.isdisjoint(node.output):
            continue  # it was computed only for the old weights
        for new in reversed(nodes.get(i, [node])):
            kept.insert(0, new)
            read.update(used(new))
    del graph.node[:]
    graph.node.extend([*first, *kept])
    ours = {t.name for t in tensors}
    stored = [t for t in source.model.graph.initializer if t.name in read and t.name not in ours]
    del graph.initializer[:]
    graph.initializer.extend([*stored, *tensors])
    there = {out for n in graph.node for out in n.output}
    shapes = [v for v in graph.value_info if v.name in there]
    del graph.value_info[:]
    graph.value_info.extend(shapes)
    return made


def _names(source: Source, layers: Sequence[Layer]) -> list[str]:
    """Return a name for each layer's weights: the stored weight's own where it is free."""
    ours = {i for layer in layers for i in (layer.index, layer.adder)}
    taken = {name for i, node in enumerate(source.nodes) if i not in ours for name in used(node)} | {*source.makers}
    found: list[str] = []
    for layer in layers:
        name = layer.stored.removesuffix(".weight")
        if "::" in name:  # a name by torch's exporter, which calls the node /layer1/0/Conv
            name = layer.name.strip("/").rpartition("/")[0].replace("/", ".") or name
        if any(n.startswith(f"{name}.") for n in taken) or any(f"{n}.".startswith(f"{name}.") for n in found):
            name = f"{source.free_prefix}{layer.index}"
        found.append(name)
    return found
