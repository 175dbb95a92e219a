"""The same graph in fewer bytes: short names for what nobody looks at, and no name twice.

Netron, `dsconvert info` and engines' profiles show the names of inputs, outputs, weights and convolutions; these stay.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from string import ascii_letters, digits

import onnx

from dsconvert.base.builder import is_constant


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy with one- and two-letter names for all values but inputs, outputs and weights, the most used first."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {t.name for t in graph.initializer if not is_constant(t)}
    uses = Counter(name for node in graph.node for name in (*node.input, *node.output) if name and name not in kept)
    free = (name for name in short_names() if name not in kept)
    names = {old: next(free) for old, _ in uses.most_common()}
    for node in graph.node:
        for values in (node.input, node.output):
            values[:] = [names.get(name, name) for name in values]
    for tensor in graph.initializer:
        tensor.name = names.get(tensor.name, tensor.name)
    return made


def short_names() -> Iterator[str]:
    """a, b, ... Z, aa, ab, ... a0, ...: identifiers, the short ones first."""
    yield from ascii_letters
    for rest in range(1, 4):
        yield from ("".join(p) for p in product(ascii_letters, *[ascii_letters + digits] * rest))
