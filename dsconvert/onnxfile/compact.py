"""Make an ONNX file smaller by shortening the names of its values.

Names of inputs, outputs, weights and convolutions are kept: Netron, `dsconvert info` and engines' profiles show them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import product
from string import ascii_letters, digits

import onnx

from dsconvert.base.builder import is_constant, rename_values


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy with one- and two-letter names for all other values, the shortest for those used most."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    graph = made.graph
    kept = {v.name for v in (*graph.input, *graph.output)} | {t.name for t in graph.initializer if not is_constant(t)}
    uses = Counter(name for node in graph.node for name in (*node.input, *node.output) if name and name not in kept)
    free = (name for name in short_names() if name not in kept)
    names = {old: next(free) for old, _ in uses.most_common()}
    rename_values(graph.node, graph.initializer, names)
    return made


def short_names() -> Iterator[str]:
    """Yield identifiers, the short ones first: a, b, ... Z, aa, ab, ... a0, ..."""
    yield from ascii_letters
    for rest in range(1, 4):
        yield from ("".join(p) for p in product(ascii_letters, *[ascii_letters + digits] * rest))
