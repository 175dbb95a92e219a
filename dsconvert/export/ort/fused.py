"""Layout fused: the packed file after ONNX Runtime's own optimiser, its weights still packed.

ONNX Runtime turns quantize and dequantize pairs around float operators into operators of its own (QLinearConv,
QLinearSigmoid, ...) every time it loads a packed file, which is most of the loading. Here that is done once, at export.
What the optimiser also folds, weights above all, is put back as the constants it was folded from: the file stays as
small, loads in about half the time and gives the same integers, in ONNX Runtime alone (operators of `com.microsoft`).
Then it is turned around to channels last (see `lastchannels`), as ONNX Runtime would at every load too.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import onnx
import onnxruntime as ort

from dsconvert.base.files import needs_room, scratch_folder
from dsconvert.export.ort.lastchannels import channels_last
from dsconvert.export.written import Written
from dsconvert.onnxfile.operators import with_operators

UNPACKED = 8  # times the packed file's bytes: weights of 1 bit as int8


def fuse(written: Written) -> Written:
    """The packed model as ONNX Runtime would run it on any CPU, constants as they were."""
    packed = written.model
    optimised = _optimised(packed)
    stored = {t.name: t for t in packed.graph.initializer}
    makers = _constant_makers(packed, set(stored))
    new = {t.name: t for t in optimised.graph.initializer if t.name not in makers and t.name not in stored}
    made = onnx.ModelProto()
    made.CopyFrom(packed)
    del made.graph.node[:], made.graph.initializer[:], made.graph.value_info[:], made.opset_import[:]
    needed = dict.fromkeys(_needed(optimised, makers, stored))
    decoding = {makers[name].output[0]: makers[name] for name in needed if name in makers}
    made.graph.node.extend(decoding.values())
    made.graph.node.extend(optimised.graph.node)
    made.graph.initializer.extend(stored[name] for name in needed if name in stored)
    made.graph.initializer.extend(new[name] for name in needed if name in new)
    turned = channels_last(made, {t.name: tuple(t.dims) for t in optimised.graph.initializer})
    used = {node.domain for node in made.graph.node}
    # the optimiser lists every domain it knows
    made.opset_import.extend(o for o in optimised.opset_import if o.domain in used)
    _plain_names(made, set(new))
    places = {
        value: replace(place, name=turned[place.name], last=True) if place.name in turned else place
        for value, place in written.places.items()
    }
    return Written(made, places, written.weights)


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    options = with_operators(ort.SessionOptions())
    # one step further are layouts of memory that suit this CPU alone
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.log_severity_level = 4  # it warns that the file is for this machine, which holds for the last level
    data = model.SerializeToString()
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        # what the file turns around stays where it is: `lastchannels` needs it there
        kept = ["TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider"]
        try:
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=kept)
            return onnx.load(path)
        except Exception:  # both raise many kinds, and one may leave half a file
            size = UNPACKED * len(data)
            if shutil.disk_usage(folder).free < size:
                raise needs_room(folder, size, OSError()) from None
            raise


def _constant_makers(model: onnx.ModelProto, stored: set[str]) -> dict[str, onnx.NodeProto]:
    """Values made from initializers alone, and their nodes. (A map's shape is folded too, but not made from them.)"""
    makers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if node.input and all(not name or name in stored or name in makers for name in node.input):
            makers |= dict.fromkeys(node.output, node)
    return makers


def _needed(
    optimised: onnx.ModelProto, makers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]
) -> Iterator[str]:
    """Names of all values behind what the optimiser folded, before those that are made from them."""
    folded = {t.name for t in optimised.graph.initializer}

    def behind(name: str) -> Iterator[str]:
        if name not in stored and name in makers:
            for source in makers[name].input:
                if source:
                    yield from behind(source)
        yield name

    for node in optimised.graph.node:
        for name in node.input:
            if name in folded:
                yield from behind(name)


def _plain_names(model: onnx.ModelProto, constants: set[str]) -> None:
    """The optimiser's own names hold random numbers: the same model would be other bytes every time."""
    found = [t.name for t in model.graph.initializer if t.name in constants]
    names = {name: f"constant{number}" for number, name in enumerate(found)}
    for tensor in model.graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    for node in model.graph.node:
        node.input[:] = [names.get(name, name) for name in node.input]
        node.name = node.name if "Conv" in node.op_type else ""
        node.doc_string = ""
