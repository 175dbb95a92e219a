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


KINDS = [*(Kind(bits, True) for bits in (1, 2, 3)), *(Kind(bits, False) for bits in (4, 5, 6))]


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
    return whole and weight.z is None and weight.alpha is None and Kind(weight.bits, weight.runs) in KINDS


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
            for kind in KINDS
            if any(x.kind == kind for x in self.found)
        }
        m = self._m(kinds, unit)
        for kind, layers in kinds.items():
            vqk = self._runs(kind, layers, unit) if kind.runs else self._plain(kind, layers, unit)
            value = self.b.node("Mul", [vqk, m[kind]], f"{_label(kind)}.scaled")
            counts = [x.weight.vqk.numel() // unit for x in layers]
            for x, part in zip(layers, self._split(value, counts, f"{_label(kind)}.scaled"), strict=True):
                self._weight(part, x)
        self.b.nodes += before

    def _m(self, kinds: dict[Kind, list[_Layer]], unit: int) -> dict[Kind, str]:
        """m of every row, INT8 (rows, 1, 1, 1), by kind: a block's is repeated where it is several rows."""
        b, parts = self.b, dict[Kind, list[str]]()
        for size in sorted({x.size for x in self.found}):
            here = {kind: [x for x in layers if x.size == size] for kind, layers in kinds.items()}
            here = {kind: layers for kind, layers in here.items() if layers}
            stored = [b.tensor(f"{x.name}.kds", _pairs(x)) for layers in here.values() for x in layers]
            joined = b.node("Cast", [self._joined(stored, f"kds{size}")], f"kds{size}.i", to=INT32)
            table = b.constant(np.repeat(_pieces(2).astype(np.int8), size // unit, axis=1))
            value = b.node("Gather", [table, joined], f"kds{size}.m")
            value = b.node("Reshape", [value, b.shape(-1, 1, 1, 1)], f"kds{size}.rows")
            counts = [sum(x.weight.vqk.numel() for x in layers) // unit for layers in here.values()]
            for kind, part in zip(here, self._split(value, counts, f"kds{size}.rows"), strict=True):
                parts.setdefault(kind, []).append(part)
        return {kind: self._joined(names, f"{_label(kind)}.m") for kind, names in parts.items()}

    def _plain(self, kind: Kind, layers: Sequence[_Layer], unit: int) -> str:
        """VQK, INT8 (rows, 1, bytes, VQK of a byte): 4 bits as they are, of more the lower 4 and a byte's worth of those
        above looked up."""
        b, label, above = self.b, _label(kind), kind.bits - 4
        group = 8 // above if above else unit
        rows = [x.rows(unit).reshape(-1, 1, unit // group, group) for x in layers]
        if not above:
            names = [b.tensor(f"{x.name}.vqk", r.astype(ml_dtypes.int4)) for x, r in zip(layers, rows, strict=True)]
            return self._joined([b.node("Cast", [n], f"{n}.i", to=INT8) for n in names], label)
        low, high = [], []
        for x, r in zip(layers, rows, strict=True):
            low.append(b.tensor(f"{x.name}.vqk0", (r & 15).astype(ml_dtypes.uint4)))
            high.append(b.tensor(f"{x.name}.vqk4", _bytes((r >> 4) + (1 << above - 1), above)))
        table = _pieces(group).astype(np.int8) * 16 - (1 << kind.bits - 1)
        number = b.node("Cast", [self._joined(high, f"{label}.high")], f"{label}.bytes", to=INT32)
        taken = b.node("Gather", [b.constant(table.astype(np.int8)), number], f"{label}.above")
        nibbles = self._joined([b.node("Cast", [n], f"{n}.i", to=INT8) for n in low], label)
        return b.node("Add", [nibbles, taken], f"{label}.vqk")

    def _runs(self, kind: Kind, layers: Sequence[_Layer], unit: int) -> str:
        """VQK in runs, INT8 of four axes, rows first."""
        b, label = self.b, _label(kind)
        numbers = [_numbers(x.rows(unit), kind.bits) for x in layers]
        low = [b.tensor(f"{x.name}.vqk", (n % BYTE).astype(np.uint8)) for x, n in zip(layers, numbers, strict=True)]
        value = b.node("Cast", [self._joined(low, label)], f"{label}.low", to=INT32)
        if kind.bits == 3:
            high = [b.tensor(f"{x.name}.vqk.high", _bytes(n >> 8, 4)) for x, n in zip(layers, numbers, strict=True)]
            number = b.node("Cast", [self._joined(high, f"{label}.high")], f"{label}.bytes", to=INT32)
            places = b.node("Cast", [b.constant(_pieces(2).astype(ml_dtypes.uint4))], f"{label}.pieces", to=INT32)
            places = b.node("Mul", [places, b.constant(np.array(BYTE, np.int32))], f"{label}.places")
            taken = b.node("Gather", [places, number], f"{label}.above")
            value = b.node("Add", [value, taken], f"{label}.number")
        return b.node("Gather", [self._book(kind.bits), value], f"{label}.vqk")

    def _book(self, bits: int) -> str:
        """INT8 (numbers, VQK): the runs (see `dsconv.runs.vectors`). Half is stored: the other half are their
        opposites, last to first."""
        b, book = self.b, vectors(bits)
        if bits == 1:
            return b.constant(book[_pieces(2)].reshape(BYTE, 2 * RUN))
        stored = b.constant(book[: len(book) // 2].astype(ml_dtypes.int4))
        first = b.node("Cast", [stored], f"runs{bits}.first", to=INT8)
        ends = b.shape(-1), b.shape(-1 - len(book) // 2), b.shape(0), b.shape(-1)
        turned = b.node("Slice", [first, *ends], f"runs{bits}.turned")
        return b.node("Concat", [first, b.node("Neg", [turned], f"runs{bits}.last")], f"runs{bits}", axis=0)

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


def _numbers(rows: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """VQK (rows, unit) in runs -> numbers: at 1 bit of two runs each, at 3 bits by twos, whose upper 4 bits are a byte."""
    found = run_rows(rows.reshape(len(rows), 1, -1, RUN), bits)
    if bits == 1:
        return _bytes(found.reshape(len(rows), 1, -1, 2), 4).astype(np.int32)
    return found.reshape(len(rows), -1, 2) if bits == 3 else found


def _pieces(count: int) -> NDArray[np.int64]:
    """(256, count): every byte's pieces, the lowest first."""
    width = 8 // count
    pieces: NDArray[np.int64] = np.arange(BYTE)[:, None] >> np.arange(count) * width & (1 << width) - 1
    return pieces


def _bytes(pieces: NDArray[np.integer], width: int) -> NDArray[np.uint8]:
    """(..., n) unsigned integers of so many bits -> (...) bytes, the first lowest."""
    places = np.arange(pieces.shape[-1]) * width
    return (pieces.astype(np.int32) << places).sum(-1).astype(np.uint8)
