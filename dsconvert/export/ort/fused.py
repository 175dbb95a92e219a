"""Layout fused: the packed file after ONNX Runtime's own optimiser, with its weights still packed.

Whenever ONNX Runtime loads a packed file, it replaces quantize and dequantize pairs around float operators by operators
of its own (QLinearConv, QLinearSigmoid, ...). This takes most of the loading time, so here it is done once, at export.

The optimiser also folds constants, above all the weights. These are put back as the constants that they were folded
from, so the file stays as small. It loads in about half the time and gives the same integers. It runs only in ONNX
Runtime, as its operators are in the domain `com.microsoft`. At last, feature maps get channels last (see
`lastchannels`), which ONNX Runtime would also do at every load.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import onnx
import onnxruntime as ort

from dsconvert.base.builder import rename_values
from dsconvert.base.files import needs_room, scratch_folder
from dsconvert.export.ort.joined import join_by_tables
from dsconvert.export.ort.lastchannels import channels_last
from dsconvert.export.weights.layouts import Layout, check_library
from dsconvert.export.written import Written
from dsconvert.onnxfile.operators import quiet_options

UNPACKED = 8  # most bytes of the optimised file per byte of the packed one: weights of 1 bit become int8


def fuse(written: Written) -> Written:
    """Return the packed model with ONNX Runtime's operators for any CPU, and with the constants of the packed file."""
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
    # the optimiser lists every domain that it knows
    made.opset_import.extend(o for o in optimised.opset_import if o.domain in used)
    _plain_names(made, set(new))
    places = {
        value: replace(place, name=turned[place.name], last=True) if place.name in turned else place
        for value, place in written.places.items()
    }
    return Written(made, places, written.weights)


def for_onnx_runtime(written: Written, layout: Layout) -> Written:
    """Return a file in the operators that the layout has of ONNX Runtime's own, or of dsconvert-ops.

    Raises InputError where the layout needs the library, which is not there.
    """
    check_library(layout)
    if layout.fused:
        written = fuse(written)
    return join_by_tables(written) if layout.tables else written


def _optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    options = quiet_options()  # a warning that the file is for this machine is true only of the highest level
    # the next level would add memory layouts that suit only this CPU
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    data = model.SerializeToString()
    with scratch_folder() as folder:
        path = folder / "optimised.onnx"
        options.optimized_model_filepath = str(path)
        # `lastchannels` needs every Transpose where it is
        kept = ["TransposeOptimizer", "TransposeOptimizer_CPUExecutionProvider"]
        try:
            ort.InferenceSession(data, options, providers=["CPUExecutionProvider"], disabled_optimizers=kept)
            return onnx.load(path)
        except Exception:  # both calls raise many kinds, and may leave half a file
            size = UNPACKED * len(data)
            if shutil.disk_usage(folder).free < size:
                raise needs_room(folder, size, OSError()) from None
            raise


def _constant_makers(model: onnx.ModelProto, stored: set[str]) -> dict[str, onnx.NodeProto]:
    """Return the values that are computed from initializers alone, with their nodes.

    A feature map's shape may be folded too, but it is not computed from initializers.
    """
    makers: dict[str, onnx.NodeProto] = {}
    for node in model.graph.node:
        if node.input and all(not name or name in stored or name in makers for name in node.input):
            makers |= dict.fromkeys(node.output, node)
    return makers


def _needed(
    optimised: onnx.ModelProto, makers: dict[str, onnx.NodeProto], stored: dict[str, onnx.TensorProto]
) -> Iterator[str]:
    """Yield the names of all values that a folded constant is computed from, each before the values that need it."""
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
    """Rename constants by number, as the optimiser's own names are random and equal models would give different
    bytes.
    """
    found = [t.name for t in model.graph.initializer if t.name in constants]
    names = {name: f"constant{number}" for number, name in enumerate(found)}
    rename_values(model.graph.node, model.graph.initializer, names)
    for node in model.graph.node:
        node.name = node.name if "Conv" in node.op_type else ""
        node.doc_string = ""
