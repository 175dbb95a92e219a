"""Make an ONNX file smaller by shortening the names of its values.

Names of inputs, outputs, weights and convolutions are kept: Netron, `dsconvert info` and engines' profiles show them.
In a small network the names of weights take 2 % of the file, and are shortened too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from string import ascii_letters, digits

import onnx
from onnx import TensorProto, numpy_helper

from dsconvert.base.builder import is_constant, rename_values


def compact(model: onnx.ModelProto, lean: bool = False) -> onnx.ModelProto:
    """Return a copy with one- and two-letter names for all other values, the shortest for those used most.

    lean: weights get such names too, and small integers take one byte.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    kept = {v.name for v in (*graph.input, *graph.output)}
    kept |= {t.name for t in graph.initializer if not lean and not is_constant(t)}
    uses = Counter(name for node in graph.node for name in (*node.input, *node.output) if name and name not in kept)
    free = (name for name in short_names() if name not in kept)
    names = {old: next(free) for old, _ in uses.most_common()}
    rename_values(graph.node, graph.initializer, names)
    if lean:
        for tensor in graph.initializer:
            _in_few_bytes(tensor)
    return made


def _in_few_bytes(tensor: onnx.TensorProto) -> None:
    """Store sizes, axes and tables as protobuf's varints, a byte for each 7 bits, where that is shorter."""
    if tensor.data_type not in (TensorProto.INT32, TensorProto.INT64):
        return
    made = onnx.TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
    stored = made.int64_data if tensor.data_type == TensorProto.INT64 else made.int32_data
    stored.extend(numpy_helper.to_array(tensor).ravel().tolist())
    if made.ByteSize() < tensor.ByteSize():
        tensor.CopyFrom(made)


def short_names() -> Iterator[str]:
    """Yield identifiers, the short ones first: a, b, ... Z, aa, ab, ... a0, ..."""
    yield from ascii_letters
    for rest in range(1, 4):
        yield from ("".join(p) for p in product(ascii_letters, *[ascii_letters + digits] * rest))
