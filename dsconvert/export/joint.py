"""Layout packed: the weights of all layers decoded together. What a file costs to load is the nodes that are folded, and
above all the memory that they fill: every result stays until all are there, and a new page costs as much as 10 kB copied.

Every layer keeps initializers under its own name (`.vqk` or its pieces, and `.kds`, two m a byte), but VQK stand in rows
that share an m, block by block and tap by tap, each row `unit` VQK long, the largest number that divides every block.
All layers of a kind (bits, in runs or not) are then one value of int8, multiplied at once: |m * VQK| <= 127. Nibbles are
cast, layer by layer, as no node joins nibbles; bits above them, eight or four VQK a byte, and runs are looked up.

Rows of a 1x1 convolution are its weight; of larger ones taps are put last.
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

    def rows(self, unit: int) -> NDArray[np.int8]:
        """VQK (rows, unit)."""
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, self.taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, unit)


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
        unit = math.gcd(*(x.size for x in self.found))
        kinds = {
            kind: sorted((x for x in self.found if x.kind == kind), key=lambda x: x.size)
            for kind in MEMBERS
            if any(x.kind == kind for x in self.found)
        }
        m = self._m(kinds, unit)
        for kind, layers in kinds.items():
            levels = 1 + max(int(x.weight.m.max()) for x in layers)
            places = self._places(kind, layers, unit, m[kind], levels)
            value = self.b.node("Gather", [self._table(kind, levels), places], f"{_label(kind)}.scaled")
            counts = [x.weight.vqk.numel() // unit for x in layers]
            for x, part in zip(layers, self._split(value, counts, f"{_label(kind)}.scaled"), strict=True):
                self._weight(part, x)
        self.b.nodes += before

    def _m(self, kinds: dict[Kind, list[_Layer]], unit: int) -> dict[Kind, str]:
        """256 m of every row, INT32 (rows, 1), by kind: a block's is repeated where it is several rows."""
        b, parts = self.b, dict[Kind, list[str]]()
        for size in sorted({x.size for x in self.found}):
            here = {kind: [x for x in layers if x.size == size] for kind, layers in kinds.items()}
            here = {kind: layers for kind, layers in here.items() if layers}
            stored = [b.tensor(f"{x.name}.kds", _pairs(x)) for layers in here.values() for x in layers]
            joined = b.node("Cast", [self._joined(stored, f"kds{size}")], f"kds{size}.i", to=INT32)
            places = b.constant(np.repeat(np.arange(2, dtype=np.int32), size // unit))
            table = b.node("Gather", [self._pieces(2), places], f"kds{size}.pieces", axis=1)
            table = b.node("Mul", [table, self._number(BYTE)], f"kds{size}.table")
            value = b.node("Gather", [table, joined], f"kds{size}.m")
            value = b.node("Reshape", [value, b.shape(-1, 1)], f"kds{size}.rows")
            counts = [sum(x.weight.vqk.numel() for x in layers) // unit for layers in here.values()]
            for kind, part in zip(here, self._split(value, counts, f"kds{size}.rows"), strict=True):
                parts.setdefault(kind, []).append(part)
        return {kind: self._joined(names, f"{_label(kind)}.m") for kind, names in parts.items()}

    def _places(self, kind: Kind, layers: Sequence[_Layer], unit: int, m: str, levels: int) -> str:
        """Where in the table the words stand, INT32, rows first."""
        b, label, high = self.b, _label(kind), HIGH[kind]
        words = [_words(x, unit) for x in layers]
        low = [b.tensor(f"{x.name}.vqk", w[0]) for x, w in zip(layers, words, strict=True)]
        value = b.node("Cast", [self._joined(low, label)], f"{label}.low", to=INT32)
        if not high:
            return b.node("Add", [value, m], f"{label}.places")
        above = [b.tensor(f"{x.name}.vqk.high", w[1]) for x, w in zip(layers, words, strict=True)]
        number = b.node("Cast", [self._joined(above, f"{label}.high")], f"{label}.bytes", to=INT32)
        number = b.node("Add", [number, m], f"{label}.bytes.m")
        taken = b.node("Gather", [self._above(kind, levels), number], f"{label}.above")
        return b.node("Add", [value, taken], f"{label}.places")

    def _above(self, kind: Kind, levels: int) -> str:
        """INT32 (256 levels, words of a byte): what a byte and m add to the low bytes of the words they belong to."""
        b, label, count = self.b, _label(kind), 8 // HIGH[kind]
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
        Half is stored: the other half are their opposites, last to first."""
        b, book = self.b, vectors(bits)
        if bits == 1:
            return b.node("Gather", [b.constant(book.astype(np.int32)), self._pieces(2)], "signs")
        first = b.node("Cast", [b.constant(book[: len(book) // 2].astype(ml_dtypes.int4))], f"runs{bits}.h", to=INT32)
        ends = b.shape(-1), b.shape(-1 - len(book) // 2), b.shape(0), b.shape(-1)
        turned = b.node("Slice", [first, *ends], f"runs{bits}.turned")
        halves = [first, b.node("Neg", [turned], f"runs{bits}.last")]
        unused = (BYTE << HIGH[Kind(bits, True)]) - len(book)
        if unused:
            halves.append(b.constant(np.zeros((unused, RUN), np.int32)))
        return b.node("Concat", halves, f"runs{bits}", axis=0)

    def _pieces(self, count: int) -> str:
        """INT32 (256, count): every byte's pieces, the lowest first."""
        name, width = f"pieces{count}", 8 // count
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

    def _split(self, value: str, counts: list[int], label: str) -> list[str]:
        """The value's parts along its first axis."""
        if len(counts) == 1:
            return [value]
        names = [f"{label}.{i}" for i in range(len(counts))]
        self.b.nodes.append(helper.make_node("Split", [value, self.b.shape(*counts)], names, axis=0))
        return names


def _label(kind: Kind) -> str:
    return f"{'runs' if kind.runs else 'bits'}{kind.bits}"


def _pairs(layer: _Layer) -> NDArray[np.uint8]:
    """m, two a byte."""
    return _bytes(layer.weight.m.numpy().reshape(-1, 2), 4)


def _words(layer: _Layer, unit: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The low bytes of VQK's words (rows, words), and bytes (rows, n) of what is above; where there is any, the former
    are (rows, n, words of a byte)."""
    rows, kind = layer.rows(unit), layer.kind
    members, high = MEMBERS[kind], HIGH[kind]
    if kind.runs:
        words = run_rows(rows.reshape(len(rows), -1, RUN), kind.bits)
        words = _bytes(words.reshape(len(rows), -1, 2), 4).astype(np.int32) if kind.bits == 1 else words
    else:
        unsigned = rows.reshape(len(rows), -1, members).astype(np.int32) + (1 << kind.bits - 1)
        words = _bytes(unsigned & 15, 4) + BYTE * _bytes(unsigned >> 4, high // members).astype(np.int32)
    if high:
        words = words.reshape(len(rows), -1, 8 // high)
    return (words % BYTE).astype(np.uint8), _bytes(words // BYTE, high)


def _bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """(..., n) unsigned integers of so many bits -> (...) bytes, the first lowest."""
    places = np.arange(pieces.shape[-1]) * width
    return (pieces.astype(np.int32) << places).sum(-1).astype(np.uint8)
