"""Layout packed: the weights of many layers decoded together. What a file costs to load is the nodes that are folded,
above all the memory they fill: every result stays until all are there, and a new page costs as much as copying 10 kB.

Layers of as many bits, in runs or not, in blocks of one size, are a group. Each keeps initializers under its own name,
as bytes that a node can join: `.kds`, two m a byte, and `.vqk`, words of a byte, or of 10 or 12 bits, what is above the
byte together in `.vqk.high`. VQK stand in rows that share an m: block by block, and tap by tap. To a word 256 times its
m (or more) is added, and what stands there in a table of all words times all m is int8 already: no number of 32 bits is
made of a single VQK. OpenVINO folds all of this; products of int8, or of what was just cast from 4 bits, it would not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dsconvert.dsconv.packing import numbers_of
from dsconvert.dsconv.runs import RUN, vectors
from dsconvert.dsconv.runs import rows as run_rows
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.builder import OnnxBuilder

INT8, INT32 = TensorProto.INT8, TensorProto.INT32
BYTE = 256
ROW = 8  # a row is a multiple of so many VQK, so that bytes are whole


class Kind(NamedTuple):
    """Layers that are decoded alike."""

    bits: int
    runs: bool


# how many VQK a word names, and how many bits above a byte it has
MEMBERS = {Kind(1, True): 8, Kind(2, True): 4, Kind(3, True): 4} | {Kind(bits, False): 2 for bits in (4, 5, 6)}
HIGH = {kind: 0 for kind in MEMBERS} | {Kind(3, True): 4, Kind(5, False): 2, Kind(6, False): 4}


@dataclass(frozen=True)
class _Layer:
    name: str
    weight: DSTensor

    @property
    def kind(self) -> Kind:
        return Kind(self.weight.bits, self.weight.runs)

    @property
    def size(self) -> int:
        return min(self.weight.block_size, self.weight.vqk.shape[1])

    @property
    def taps(self) -> int:
        return math.prod(self.weight.vqk.shape[2:])

    def rows(self) -> NDArray[np.int8]:
        """VQK (rows, size): what shares an m."""
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, self.taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, self.size)


def joins(weight: DSTensor) -> bool:
    """Whether it is one of those decoded together: whole blocks of whole bytes, no z, an even number of m."""
    size = min(weight.block_size, weight.vqk.shape[1])
    whole = size % ROW == 0 and weight.vqk.shape[1] % size == 0 and weight.m.numel() % 2 == 0
    return whole and weight.z is None and weight.alpha is None and Kind(weight.bits, weight.runs) in MEMBERS


class JointWeights:
    """Collects weights; `finish` puts what decodes them in front of the nodes that read them."""

    def __init__(self, b: OnnxBuilder) -> None:
        self.b = b
        self.found: list[_Layer] = []

    def add(self, name: str, weight: DSTensor) -> str:
        """The name of its int8 value (cho, chi, kh, kw). The weight `joins`."""
        self.found.append(_Layer(name, weight))
        return f"{name}.weight"

    def finish(self) -> None:
        """Make all weights."""
        if not self.found:
            return
        before, self.b.nodes = self.b.nodes, []
        for kind in MEMBERS:
            layers = [x for x in self.found if x.kind == kind]
            if not layers:
                continue
            levels = 1 + max(int(x.weight.m.max()) for x in layers)
            table = self._table(kind, levels)
            for size in sorted({x.size for x in layers}):
                group = [x for x in layers if x.size == size]
                places = self._places(kind, group, levels)
                value = self.b.node("Gather", [table, places], f"{_label(kind)}x{size}.int8")
                for x, part in zip(group, self._split(value, group), strict=True):
                    self._weight(part, x)
        self.b.nodes += before

    def _places(self, kind: Kind, layers: Sequence[_Layer], levels: int) -> str:
        """Where in the table the words of layers in equal blocks stand: INT32, by pairs of rows."""
        b, label, high = self.b, f"{_label(kind)}x{layers[0].size}", HIGH[kind]
        stored = [b.tensor(f"{x.name}.kds", _bytes(x.weight.m.numpy().reshape(-1, 2), 4)) for x in layers]
        pairs = b.node("Cast", [self._joined(stored, f"{label}.kds")], f"{label}.pairs", to=INT32)
        m = b.node("Gather", [self._shifts(), pairs], f"{label}.m")
        words = [_words(x) for x in layers]
        low = [b.tensor(f"{x.name}.vqk", w[0]) for x, w in zip(layers, words, strict=True)]
        value = b.node("Cast", [self._joined(low, label)], f"{label}.low", to=INT32)
        if not high:
            return b.node("Add", [value, m], f"{label}.places")
        above = [b.tensor(f"{x.name}.vqk.high", w[1]) for x, w in zip(layers, words, strict=True)]
        number = b.node("Cast", [self._joined(above, f"{label}.high")], f"{label}.bytes", to=INT32)
        number = b.node("Add", [number, m], f"{label}.bytes.m")
        taken = b.node("Gather", [self._above(kind, levels), number], f"{label}.above")
        return b.node("Add", [value, taken], f"{label}.places")

    def _shifts(self) -> str:
        """INT32 (256, 2, 1): 256 times a byte's two m."""
        if not self.b.has("joint.shifts"):
            pairs = self.b.node(
                "Gather", [self._pieces(2), self.b.constant(np.array([[0], [1]], np.int32))], "joint.pairs", axis=1
            )
            self.b.node("Mul", [pairs, self._number(BYTE)], "joint.shifts")
        return "joint.shifts"

    def _above(self, kind: Kind, levels: int) -> str:
        """INT32 (256 levels, words of a byte): what a byte and m add to the low bytes of the words they belong to."""
        b, label, count = self.b, _label(kind), 8 // HIGH[kind]
        if b.has(f"{label}.shift"):
            return f"{label}.shift"
        m = (np.arange(levels, dtype=np.int32) << HIGH[kind]).reshape(-1, 1, 1)
        value = b.node("Add", [self._pieces(count), b.constant(m)], f"{label}.digits")
        value = b.node("Mul", [value, self._number(BYTE)], f"{label}.shifts")
        return b.node("Reshape", [value, b.shape(-1, count)], f"{label}.shift")

    def _table(self, kind: Kind, levels: int) -> str:
        """INT8 (words times levels, VQK of a word): m times every word, m = 0, 1, ..., levels - 1."""
        b, label, members = self.b, _label(kind), MEMBERS[kind]
        base = self._book(kind.bits) if kind.runs else self._plain(kind)
        m = np.arange(levels, dtype=np.int32).reshape(-1, 1, 1, 1)
        value = b.node("Mul", [base, b.constant(m)], f"{label}.products")
        value = b.node("Cast", [value], f"{label}.products8", to=INT8)
        return b.node("Reshape", [value, b.shape(-1, members)], f"{label}.table")

    def _plain(self, kind: Kind) -> str:
        """INT32 (what is above a byte, 256, VQK of a word): the integers of every word."""
        members, high = MEMBERS[kind], HIGH[kind]
        above = np.arange(1 << high)[:, None, None] >> np.arange(members) * (high // members)
        offset = ((above & (1 << high // members) - 1) << 4) - (1 << kind.bits - 1)
        return self.b.node(
            "Add", [self._pieces(members), self.b.constant(offset.astype(np.int32))], f"{_label(kind)}.words"
        )

    def _book(self, bits: int) -> str:
        """INT32 (words, VQK of a word), or with an axis of two before the last: the runs (see `dsconv.runs.vectors`).
        Half is stored: the other half are their opposites, last to first. Words that are none stand at both ends."""
        b, book = self.b, vectors(bits)
        if bits == 1:
            return b.node("Gather", [b.constant(book.astype(np.int32)), self._pieces(2)], "joint.signs")
        half = np.pad(book[: len(book) // 2], ((_unused(bits), 0), (0, 0))).astype(ml_dtypes.int4)
        first = b.node("Cast", [b.constant(half)], f"joint.book{bits}.first", to=INT32)
        ends = b.shape(-1), b.shape(-1 - len(half)), b.shape(0), b.shape(-1)
        turned = b.node("Slice", [first, *ends], f"joint.book{bits}.turned")
        last = b.node("Neg", [turned], f"joint.book{bits}.last")
        return b.node("Concat", [first, last], f"joint.book{bits}", axis=0)

    def _pieces(self, count: int) -> str:
        """INT32 (256, count): every byte's pieces, the lowest first."""
        name, width = f"joint.pieces{count}", 8 // count
        if not self.b.has(name):
            pieces = np.arange(BYTE)[:, None] >> np.arange(count) * width & (1 << width) - 1
            self.b.node("Cast", [self.b.constant(pieces.astype(ml_dtypes.uint4))], name, to=INT32)
        return name

    def _number(self, value: int) -> str:
        return self.b.constant(np.array(value, np.int32))

    def _weight(self, value: str, layer: _Layer) -> None:
        """Rows of a layer -> its weight."""
        b, shape = self.b, tuple(layer.weight.vqk.shape)
        if layer.taps > 1:
            value = b.node("Reshape", [value, b.shape(-1, layer.taps, layer.size)], f"{layer.name}.blocks")
            value = b.node("Transpose", [value], f"{layer.name}.taps", perm=[0, 2, 1])
        b.node("Reshape", [value, b.shape(*shape)], f"{layer.name}.weight")

    def _joined(self, names: list[str], label: str) -> str:
        return names[0] if len(names) == 1 else self.b.node("Concat", names, f"{label}.joined", axis=0)

    def _split(self, value: str, layers: Sequence[_Layer]) -> list[str]:
        """Each layer's rows."""
        if len(layers) == 1:
            return [value]
        names, pairs = [f"{x.name}.rows" for x in layers], [x.weight.m.numel() // 2 for x in layers]
        self.b.nodes.append(helper.make_node("Split", [value, self.b.shape(*pairs)], names, axis=0))
        return names


def _label(kind: Kind) -> str:
    return f"joint.{'runs' if kind.runs else 'bits'}{kind.bits}"


def _unused(bits: int) -> int:
    """How many words before the first run, and how many behind the last, name none: at 3 bits 52 of 4096."""
    return 0 if bits == 1 else ((BYTE << HIGH[Kind(bits, True)]) - len(vectors(bits))) // 2


def _words(layer: _Layer) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The low bytes of VQK's words (pairs of rows, 2, words), and bytes (pairs, 2, n) of what is above; where there is
    any, the former are (pairs, 2, n, words of such a byte)."""
    rows, kind = layer.rows(), layer.kind
    members, high = MEMBERS[kind], HIGH[kind]
    if kind.runs:
        words = run_rows(rows.reshape(len(rows), -1, RUN), kind.bits) + _unused(kind.bits)
        words = _bytes(words.reshape(len(rows), -1, 2), 4).astype(np.int32) if kind.bits == 1 else words
    else:
        unsigned = rows.reshape(len(rows), -1, members).astype(np.int32) + (1 << kind.bits - 1)
        words = _bytes(unsigned & 15, 4) + BYTE * _bytes(unsigned >> 4, high // members).astype(np.int32)
    words = words.reshape(len(rows) // 2, 2, -1, *([8 // high] if high else []))
    return (words % BYTE).astype(np.uint8), _bytes(words // BYTE, high)


def _bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """(..., n) unsigned integers of so many bits -> (...) bytes, the first lowest."""
    return numbers_of(pieces, width).astype(np.uint8)
