"""Layout packed: the weights of many layers decoded together. What a file costs to load is the nodes that are folded,
above all the memory they fill: every result stays until all are there, and a new page costs as much as copying 10 kB.

Layers of as many bits, along a trellis or not, in blocks of one size, are a group. Each keeps initializers under its
own name, as bytes that a node can join: `.kds`, two m a byte, and `.vqk`: strings of bits along a trellis (see
`trellis`), else words of a byte, or of 10 or 12 bits, what is above the byte together in `.vqk.high`. VQK stand in rows
that share an m: block by block, and tap by tap. To a word 256 times its m (or more) is added, and what stands there in
a table of all words times all m is int8 already: no number of 32 bits is made of a single VQK. OpenVINO folds all of
this; products of int8, or of what was just cast from 4 bits, it would not.
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

from dsconvert.dsconv.codes import TRELLIS
from dsconvert.dsconv.packing import numbers_of
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export import trellis
from dsconvert.export.builder import OnnxBuilder

INT8, INT32 = TensorProto.INT8, TensorProto.INT32
BYTE = 256
ROW = 8  # a row is a multiple of so many VQK, so that bytes are whole


class Kind(NamedTuple):
    """Layers that are decoded alike."""

    bits: int
    trellis: bool


KINDS = [*(Kind(bits, True) for bits in trellis.MEMBERS), *(Kind(bits, False) for bits in (4, 5, 6))]
MEMBERS = 2  # VQK of a word
HIGH = {4: 0, 5: 2, 6: 4}  # bits of a word above a byte


@dataclass(frozen=True)
class _Layer:
    name: str
    weight: DSTensor

    @property
    def kind(self) -> Kind:
        return Kind(self.weight.bits, self.weight.format.code is TRELLIS)

    @property
    def size(self) -> int:
        return min(self.weight.block_size, self.weight.vqk.shape[1])

    @property
    def each(self) -> int:
        """Rows of an output channel."""
        return self.weight.m[0].numel()

    def rows(self) -> NDArray[np.int8]:
        """VQK (rows, size): what shares an m."""
        taps = math.prod(self.weight.vqk.shape[2:])
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, self.size)


def joins(weight: DSTensor) -> bool:
    """Whether it is one of those decoded together: whole blocks of whole bytes, an even number of m."""
    size = min(weight.block_size, weight.vqk.shape[1])
    whole = size % ROW == 0 and weight.vqk.shape[1] % size == 0 and weight.m.numel() % 2 == 0
    return whole and Kind(weight.bits, weight.format.code is TRELLIS) in KINDS


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
        for kind in KINDS:
            layers = [x for x in self.found if x.kind == kind]
            for size in sorted({x.size for x in layers}):
                # those whose output channels have as many rows next to each other: see `trellis`
                group = sorted((x for x in layers if x.size == size), key=lambda x: x.each)
                made = self._along_trellis if kind.trellis else self._plain
                value = made(group, layers, f"{_label(kind)}x{size}")
                for x, part in zip(group, self._split(value, group), strict=True):
                    trellis.add_weight(self.b, x.name, part, tuple(x.weight.vqk.shape), size)
        self.b.nodes += before

    def _along_trellis(self, group: Sequence[_Layer], layers: Sequence[_Layer], label: str) -> str:
        """INT8 rows of a group, some of all layers of its kind."""
        b, tables = self.b, trellis.Tables.of(self.b, "joint.trellis", [x.weight for x in layers])
        m = b.node("Gather", [self._steps(tables), self._kds(group, label)], f"{label}.pairs.m")
        m = b.node("Reshape", [m, b.shape(-1, tables.columns)], f"{label}.m")
        stored = [b.tensor(f"{x.name}.vqk", trellis.bytes_of(x.weight)) for x in group]
        rows = [trellis.Rows.of(x.weight) for x in group]
        return trellis.add_values(tables, label, self._joined(stored, label), m, rows)

    def _plain(self, group: Sequence[_Layer], layers: Sequence[_Layer], label: str) -> str:
        """INT8 rows of a group, some of all layers of its kind."""
        levels = 1 + max(int(x.weight.m.max()) for x in layers)
        places = self._places(group, levels, label)
        return self.b.node("Gather", [self._table(group[0].kind, levels), places], f"{label}.int8")

    def _kds(self, group: Sequence[_Layer], label: str) -> str:
        """INT32: bytes of two m."""
        stored = [self.b.tensor(f"{x.name}.kds", _bytes(x.weight.m.numpy().reshape(-1, 2), 4)) for x in group]
        return self.b.node("Cast", [self._joined(stored, f"{label}.kds")], f"{label}.pairs", to=INT32)

    def _steps(self, tables: trellis.Tables) -> str:
        """UINT8 (256, 2, columns): what `trellis` needs for a byte's two m."""
        label = f"{tables.label}.pairs"
        return f"{label}.m" if self.b.has(f"{label}.m") else tables.steps(self._pairs(), label)

    def _places(self, group: Sequence[_Layer], levels: int, label: str) -> str:
        """Where in the table the words of layers in equal blocks stand: INT32, by pairs of rows."""
        b, bits = self.b, group[0].weight.bits
        pairs = self._kds(group, label)
        m = b.node("Gather", [self._shifts(), pairs], f"{label}.m")
        words = [_words(x) for x in group]
        low = [b.tensor(f"{x.name}.vqk", w[0]) for x, w in zip(group, words, strict=True)]
        value = b.node("Cast", [self._joined(low, label)], f"{label}.low", to=INT32)
        if not HIGH[bits]:
            return b.node("Add", [value, m], f"{label}.places")
        above = [b.tensor(f"{x.name}.vqk.high", w[1]) for x, w in zip(group, words, strict=True)]
        number = b.node("Cast", [self._joined(above, f"{label}.high")], f"{label}.bytes", to=INT32)
        number = b.node("Add", [number, m], f"{label}.bytes.m")
        taken = b.node("Gather", [self._above(group[0].kind, levels), number], f"{label}.above")
        return b.node("Add", [value, taken], f"{label}.places")

    def _shifts(self) -> str:
        """INT32 (256, 2, 1): 256 times a byte's two m."""
        if not self.b.has("joint.shifts"):
            self.b.node("Mul", [self._pairs(), self._number(BYTE)], "joint.shifts")
        return "joint.shifts"

    def _pairs(self) -> str:
        """INT32 (256, 2, 1): a byte's two m."""
        if not self.b.has("joint.pairs"):
            both = self.b.constant(np.array([[0], [1]], np.int32))
            self.b.node("Gather", [self._pieces(2), both], "joint.pairs", axis=1)
        return "joint.pairs"

    def _above(self, kind: Kind, levels: int) -> str:
        """INT32 (256 levels, words of a byte): what a byte and m add to the low bytes of the words they belong to."""
        b, label, high = self.b, _label(kind), HIGH[kind.bits]
        count = 8 // high
        if b.has(f"{label}.shift"):
            return f"{label}.shift"
        m = (np.arange(levels, dtype=np.int32) << high).reshape(-1, 1, 1)
        value = b.node("Add", [self._pieces(count), b.constant(m)], f"{label}.digits")
        value = b.node("Mul", [value, self._number(BYTE)], f"{label}.shifts")
        return b.node("Reshape", [value, b.shape(-1, count)], f"{label}.shift")

    def _table(self, kind: Kind, levels: int) -> str:
        """INT8 (words times levels, VQK of a word): m times every word, m = 0, 1, ..., levels - 1."""
        b, label = self.b, _label(kind)
        if b.has(f"{label}.table"):
            return f"{label}.table"
        m = np.arange(levels, dtype=np.int32).reshape(-1, 1, 1, 1)
        value = b.node("Mul", [self._all_words(kind), b.constant(m)], f"{label}.products")
        value = b.node("Cast", [value], f"{label}.products8", to=INT8)
        return b.node("Reshape", [value, b.shape(-1, MEMBERS)], f"{label}.table")

    def _all_words(self, kind: Kind) -> str:
        """INT32 (what is above a byte, 256, VQK of a word): the integers of every word."""
        high = HIGH[kind.bits]
        above = np.arange(1 << high)[:, None, None] >> np.arange(MEMBERS) * (high // MEMBERS)
        offset = ((above & (1 << high // MEMBERS) - 1) << 4) - (1 << kind.bits - 1)
        return self.b.node(
            "Add", [self._pieces(MEMBERS), self.b.constant(offset.astype(np.int32))], f"{_label(kind)}.words"
        )

    def _pieces(self, count: int) -> str:
        """INT32 (256, count): every byte's pieces, the lowest first."""
        name, width = f"joint.pieces{count}", 8 // count
        if not self.b.has(name):
            pieces = np.arange(BYTE)[:, None] >> np.arange(count) * width & (1 << width) - 1
            self.b.node("Cast", [self.b.constant(pieces.astype(ml_dtypes.uint4))], name, to=INT32)
        return name

    def _number(self, value: int) -> str:
        return self.b.constant(np.array(value, np.int32))

    def _joined(self, names: list[str], label: str) -> str:
        return names[0] if len(names) == 1 else self.b.node("Concat", names, f"{label}.joined", axis=0)

    def _split(self, value: str, layers: Sequence[_Layer]) -> list[str]:
        """Each layer's rows."""
        if len(layers) == 1:
            return [value]
        names, rows = [f"{x.name}.rows" for x in layers], [x.weight.m.numel() for x in layers]
        if layers[0].weight.format.code is not TRELLIS:
            rows = [count // 2 for count in rows]  # in pairs
        self.b.nodes.append(helper.make_node("Split", [value, self.b.shape(*rows)], names, axis=0))
        return names


def _label(kind: Kind) -> str:
    return f"joint.{'trellis' if kind.trellis else 'bits'}{kind.bits}"


def _words(layer: _Layer) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The low bytes of VQK's words (pairs of rows, 2, words), and bytes (pairs, 2, n) of what is above; where there is
    any, the former are (pairs, 2, n, words of such a byte)."""
    rows, bits = layer.rows(), layer.weight.bits
    high = HIGH[bits]
    unsigned = rows.reshape(len(rows), -1, MEMBERS).astype(np.int32) + (1 << bits - 1)
    words = _bytes(unsigned & 15, 4) + BYTE * _bytes(unsigned >> 4, high // MEMBERS).astype(np.int32)
    words = words.reshape(len(rows) // 2, 2, -1, *([8 // high] if high else []))
    return (words % BYTE).astype(np.uint8), _bytes(words // BYTE, high)


def _bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """(..., n) unsigned integers of so many bits -> (...) bytes, the first lowest."""
    return numbers_of(pieces, width).astype(np.uint8)
