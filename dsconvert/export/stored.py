"""Check that an exported file holds the model's numbers, bit by bit and without running an image.

1. The file's own nodes unpack the stored bytes. The result must be the int8 weight, scale and bias of each layer.
2. The stored bytes must be the same as when the model is written once more. This also finds a flipped bit that changes
   no weight, such as one in the shift m of a block of zeros.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import numpy_helper

from dsconvert.base.builder import is_constant
from dsconvert.base.errors import CheckError
from dsconvert.export.biases import VECTOR
from dsconvert.export.reference import Reference
from dsconvert.export.written import Written
from dsconvert.graph.ir import display_name
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.operators import quiet_options

Array = NDArray[Any]
DETECT = "Detect"
SCALE = 4  # index of the weight's scale among a QLinearConv's inputs


def wrong_layer(data: bytes, named: bytes | None, reference: Reference, again: Written) -> str | None:
    """Return the first layer of which the file holds other numbers than the model, or None.

    data: the file's bytes.
    named: the same file with the names of all its values, where `data` has lost some.
    again: the file, written once more.
    """
    model = onnx.load_from_string(named or data)
    found = _other_bytes(model, again.model, reference) or _other_numbers(model, reference, again.weights)
    if found is None and named is not None and data != named and not _is_compacted(data, model):
        return _other_bytes(onnx.load_from_string(data), compact(again.model), reference) or DETECT
    return found


def _is_compacted(data: bytes, named: onnx.ModelProto) -> bool:
    """Return whether the bytes are the named file with only its names shortened."""
    return bool(data == compact(named).SerializeToString(deterministic=True))


def _other_numbers(model: onnx.ModelProto, reference: Reference, weights: Mapping[str, str]) -> str | None:
    """Return the first layer whose weight, scale or bias is not the model's, as the file's own nodes unpack it.

    weights: layer name -> name of the value that its weight is unpacked to.
    """
    convs = reference.graph.convs()
    known = {t.name for t in model.graph.initializer} | {out for node in model.graph.node for out in node.output}
    wanted = {node.name: reference.numbers(node) for node in convs}
    # ONNX Runtime's optimiser keeps equal scales once, under the name of one of them
    scales = {node.name: node.input[SCALE] for node in model.graph.node if node.op_type == "QLinearConv"}
    names: dict[str, list[str]] = {}
    for node in convs:  # names of tensors are promised in docs/compatibility.md
        name = display_name(node)
        cds = f"{name}.cds" if f"{name}.cds" in known else scales.get(name, "")
        names[node.name] = [weights[name], f"{name}.bias", *([] if wanted[node.name].cds is None else [cds])]
    if missing := next((node for node in convs if not known.issuperset(names[node.name])), None):
        return display_name(missing)
    values = _constants(model, sorted({name for found in names.values() for name in found}))
    for node in convs:
        w = wanted[node.name]
        parts = [part for part in (w.weight, w.bias, w.cds) if part is not None]
        for name, part in zip(names[node.name], parts, strict=True):
            value = values[name]
            value = value[: len(part)] if part.ndim == 1 else value  # padding may follow: see `quickconv`
            if value.dtype != part.dtype or value.shape != part.shape or value.tobytes() != part.tobytes():
                return display_name(node)
    return None


def _constants(model: onnx.ModelProto, names: Sequence[str]) -> dict[str, Array]:
    """Compute values that depend on stored tensors alone, by running only their nodes in ONNX Runtime."""
    stored = {t.name: t for t in model.graph.initializer}
    makers = {out: i for i, node in enumerate(model.graph.node) for out in node.output}
    values = {name: numpy_helper.to_array(stored[name]) for name in names if name in stored}
    left, needed = [name for name in names if name not in stored], set()
    while left:
        index = makers.get(left.pop())
        if index is not None and index not in needed:
            needed.add(index)
            left += [x for x in model.graph.node[index].input if x not in stored]
    if not needed:
        return values
    nodes = [model.graph.node[i] for i in sorted(needed)]
    reads = {x for node in nodes for x in node.input}
    made = [name for name in names if name not in stored]
    outputs = [onnx.ValueInfoProto(name=name) for name in made]
    graph = onnx.helper.make_graph(nodes, "stored", [], outputs, [t for n, t in stored.items() if n in reads])
    part = onnx.helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    try:
        running = ort.InferenceSession(part.SerializeToString(), quiet_options(), providers=["CPUExecutionProvider"])
        return values | dict(zip(made, running.run(made, {}), strict=True))
    except Exception:  # onnxruntime raises many kinds
        raise CheckError("ONNX Runtime cannot unpack the exported file's weights, so it was not written.") from None


def _other_bytes(model: onnx.ModelProto, again: onnx.ModelProto, reference: Reference) -> str | None:
    """Return the layer of the first stored tensor that only one of the two files has; None if they agree."""
    found, wanted = Counter(map(_key, model.graph.initializer)), Counter(map(_key, again.graph.initializer))
    for file, missing in ((model, found - wanted), (again, wanted - found)):
        for tensor in file.graph.initializer:
            if _key(tensor) in missing:
                return _layer_of(tensor, file, again, reference)
    return None


def _key(tensor: onnx.TensorProto) -> bytes:
    """Return a tensor's bytes, without its name if it is a shared constant.

    These are numbered in the order of writing.
    """
    copied = onnx.TensorProto()
    copied.CopyFrom(tensor)
    copied.name = "" if is_constant(tensor) else tensor.name
    return bytes(copied.SerializeToString(deterministic=True))


def _layer_of(tensor: onnx.TensorProto, file: onnx.ModelProto, again: onnx.ModelProto, reference: Reference) -> str:
    """Return the name of the layer that a tensor belongs to.

    Its own name begins with the layer's, as docs/compatibility.md promises. A part of the bias vector is known by its
    position, and any other tensor by the node that reads it.
    """
    nodes = sorted(reference.graph.nodes, key=lambda node: -len(display_name(node)))
    if tensor.name.startswith(VECTOR):
        return _owner_of_bias(tensor, again, reference)
    readers = (out for node in file.graph.node if tensor.name in node.input for out in node.output)
    for name in (tensor.name, *readers):
        for node in nodes:
            if name == node.name or name.startswith((f"{node.name}.", f"{display_name(node)}.")):
                return display_name(node)
    return DETECT


def _owner_of_bias(tensor: onnx.TensorProto, again: onnx.ModelProto, reference: Reference) -> str:
    """Return the layer of the first integer that differs in the bias vector.

    The vector holds the biases of all layers in the graph's order.
    """
    convs = reference.graph.convs()
    right = next((t for t in again.graph.initializer if t.name == tensor.name), None)
    if right is None or right.dims != tensor.dims:
        return display_name(convs[0])
    one, other = (numpy_helper.to_array(t).astype(np.int64) for t in (tensor, right))
    place = int(np.argmax(one != other))
    ends = np.cumsum([len(reference.numbers(node).bias) for node in convs])
    return display_name(convs[min(int(np.searchsorted(ends, place, "right")), len(convs) - 1)])
