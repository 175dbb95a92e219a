"""Find attention over pixels in an ONNX graph: softmax(q . k / sqrt(size)) v.

Candidates are two matrix products with a Softmax between them. A candidate is accepted if it gives the same numbers as
`ops.attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx
import torch

from dsconvert.graph.ir import Node
from dsconvert.graph.ops import attention
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.recognise import MOVING, places
from dsconvert.onnxfile.source import Array

SCALING = frozenset(("Mul", "Div"))
CLOSE = 1e-4  # of the largest number: float32 sums in two orders


@dataclass(frozen=True)
class Heads:
    """An attention in a file, described by channels of the maps that it reads."""

    roots: tuple[str, str, str]  # values that q, k and v are taken from
    channels: tuple[list[int], list[int], list[int]]  # which channels of these, head by head
    heads: int
    size: int  # channels of a query and of a key
    value: int  # channels of a value

    @property
    def attrs(self) -> dict[str, int]:
        """Attributes of the graph's node."""
        return {"heads": self.heads, "size": self.size, "value": self.value}


def find_attention(facts: Facts, output: str, origin: Callable[[str], str | None]) -> Heads | None:
    """Return the attention that makes a map (n, c, h, w), or None.

    origin: returns the one value of our graph whose numbers were moved to a value, or None.
    """
    last = _behind(facts, output, MOVING)
    if last is None or last.op_type != "MatMul":
        return None
    inputs = [_behind(facts, name, MOVING) for name in last.input]
    weighed = [i for i, node in enumerate(inputs) if node is not None and node.op_type == "Softmax"]
    if len(weighed) != 1:
        return None
    softmax, values = inputs[weighed[0]], last.input[1 - weighed[0]]
    assert softmax is not None
    first = _behind(facts, softmax.input[0], MOVING | SCALING)
    if first is None or first.op_type != "MatMul":
        return None
    parts = [_part(facts, name, origin) for name in (*first.input, values)]
    known = [part for part in parts if part is not None]
    if len(known) < 3 or len({len(part[1]) for part in known}) > 1:
        return None
    heads = len(known[0][1])
    for order in ((0, 1), (1, 0)):  # either product input may be the query
        q, k, v = known[order[0]], known[order[1]], known[2]
        roots = (q[0], k[0], v[0])
        found = Heads(roots, (_flat(q[1]), _flat(k[1]), _flat(v[1])), heads, len(q[1][0]), len(v[1][0]))
        if len(q[1][0]) == len(k[1][0]) and _gives(facts, output, found):
            return found
    return None


def _behind(facts: Facts, value: str, kinds: frozenset[str]) -> onnx.NodeProto | None:
    """Return the first node behind a value that is of none of these kinds, if each of them has one varying input."""
    node = facts.maker(value)
    while node is not None and node.op_type in kinds:
        varying = facts.varying(node)
        node = facts.maker(varying[0]) if len(varying) == 1 else None
    return node


def _part(facts: Facts, value: str, origin: Callable[[str], str | None]) -> tuple[str, list[list[int]]] | None:
    """Return the map that a query, key or value comes from, and the channels of each head there.

    A constant factor is ignored here; the comparison of numbers at the end covers it.
    """
    root = origin(value)
    shape = facts.shape(root) if root is not None else ()
    numbers = places(shape) if len(shape) == 4 else None
    if root is None or numbers is None:
        return None
    found, ones = (facts.compute(value, {root: x}) for x in (numbers, np.ones_like(numbers)))
    if found is None or ones is None or found.ndim != 4 or not ones.flat[0]:
        return None
    tokens = shape[2] * shape[3]
    at = np.rint(found[0] / ones.flat[0]).astype(np.int64)
    at = at if at.shape[2] == tokens else at.transpose(0, 2, 1)
    if at.shape[2] != tokens or (at % tokens != np.arange(tokens)).any():
        return None
    return root, [[int(n) for n in head] for head in at[:, :, 0] // tokens]


def _flat(channels: list[list[int]]) -> list[int]:
    return [channel for head in channels for channel in head]


def _gives(facts: Facts, output: str, found: Heads) -> bool:
    """Return whether the graph's attention gives the same result on random maps."""
    rng = np.random.default_rng(0)
    given: dict[str, Array] = {
        root: rng.standard_normal(facts.shape(root), np.float32) for root in dict.fromkeys(found.roots)
    }
    wanted = facts.compute(output, given)
    node = Node("uneven_attention", "attention", (), found.attrs)
    maps = [torch.from_numpy(given[root][:, chosen]) for root, chosen in zip(found.roots, found.channels, strict=True)]
    made = attention(node, maps).numpy()
    return (
        wanted is not None
        and wanted.shape == made.shape
        and bool(np.abs(wanted - made).max() <= CLOSE * max(1.0, float(np.abs(wanted).max())))
    )
