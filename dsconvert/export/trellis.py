"""How VQK along a trellis (see `dsconv.trellis`) are spelled in ONNX.

Strings of bits are stored as they are, the first bit highest. A row, which shares an m, is some whole bytes, and every
window of eight bits lies in the byte in which it ends and the one before. So a byte and what is needed of the byte
before make a number, and what stands there in a table of all numbers times all m are the VQK that end in the byte, int8
already. At 1 bit a byte's eight VQK come from two tables. At 3 bits three bytes in turn end 2, 3 and 3 VQK, and of a
row the first bytes of all threes are stored before the second and the third ones.

The byte before a row's first is the last one of the row above it, or zero where an output channel begins. It is put in
front of the row while all are bytes still: what costs time is the memory that INT32 fill.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto, helper

from dsconvert.dsconv.tensor import DSTensor, max_multiplier
from dsconvert.dsconv.trellis import WINDOW, largest, strings, table
from dsconvert.export.builder import OnnxBuilder

INT8, INT32 = TensorProto.INT8, TensorProto.INT32
BYTE = 256


@dataclass(frozen=True)
class Part:
    """VQK that end in the same byte of those in turn, and are looked up together: how many of its bits each needs."""

    byte: int
    ends: tuple[int, ...]

    @property
    def before(self) -> int:
        """Bits needed of the byte before."""
        return WINDOW - self.ends[0]

    @property
    def bits(self) -> int:
        """Of its number."""
        return self.before + self.ends[-1]


PARTS = {
    1: (Part(0, (1, 2, 3, 4)), Part(0, (5, 6, 7, 8))),
    2: (Part(0, (2, 4, 6, 8)),),
    3: (Part(0, (3, 6)), Part(1, (1, 4, 7)), Part(2, (2, 5, 8))),
    4: (Part(0, (4, 8)),),
}


@dataclass(frozen=True)
class Rows:
    """Rows in a group: of how many output channels, and how many each has."""

    channels: int
    each: int

    @staticmethod
    def of(weight: DSTensor) -> Rows:
        """Those of a weight."""
        return Rows(len(weight.m), weight.m[0].numel())


def turns(bits: int) -> int:
    """After how many bytes VQK end in the same places again."""
    return 1 + PARTS[bits][-1].byte


def bytes_of(weight: DSTensor) -> NDArray[np.uint8]:
    """A weight's code as bytes (rows, bytes of a row)."""
    assert weight.code is not None
    rows = strings(weight.code, weight.block_size).numpy().reshape(weight.m.numel(), -1, 1)
    packed = np.packbits(np.unpackbits(rows, axis=2)[:, :, -weight.bits :].reshape(len(rows), -1), axis=1)
    return packed.reshape(len(rows), -1, turns(weight.bits)).swapaxes(1, 2).reshape(len(rows), -1)


@dataclass(frozen=True)
class Tables:
    """What all weights of as many bits share: a table for every part, and what comes before it. `name` begins the names
    of its values, `levels` is the largest m."""

    b: OnnxBuilder
    name: str
    bits: int
    levels: int

    @staticmethod
    def of(b: OnnxBuilder, name: str, weights: Sequence[DSTensor]) -> Tables:
        """Those for weights of as many bits."""
        bits = weights[0].bits
        levels = max(max_multiplier(bits, True), *(int(w.m.max()) for w in weights))
        return Tables(b, f"{name}{bits}m{levels}", bits, levels)

    def values(self, part: Part) -> str:
        """INT8 (numbers times levels, VQK of the part): m VQK, for m = 1, 2, ... levels."""
        b, name = self.b, f"{self.name}.{_label(part)}"
        if not b.has(name):
            numbers = b.node("Reshape", [self._range(1 << part.bits), b.shape(-1, 1)], f"{name}.column")
            places = np.array([1 << part.ends[-1] - end for end in part.ends], np.int32)
            shifted = b.node("Div", [numbers, b.constant(places)], f"{name}.shifted")
            windows = b.node("Mod", [shifted, _number(b, BYTE)], f"{name}.windows")
            value = b.node("Gather", [self._products(), windows], f"{name}.levels", axis=1)
            b.node("Reshape", [value, b.shape(-1, len(part.ends))], name)
        return name

    def before(self, part: Part) -> str:
        """INT32 (256,): what the byte before adds to a number."""
        b, name = self.b, f"{self.name}.{_label(part)}.before"
        if not b.has(name):
            needed = b.node("Mod", [self._range(BYTE), _number(b, 1 << part.before)], f"{name}.bits")
            b.node("Mul", [needed, _number(b, 1 << part.ends[-1])], name)
        return name

    def own(self, part: Part) -> str:
        """INT32 (256,): the bits of the byte itself."""
        name = f"{self.name}.{_label(part)}.own"
        if not self.b.has(name):
            self.b.node("Div", [self._range(BYTE), _number(self.b, 1 << WINDOW - part.ends[-1])], name)
        return name

    def _products(self) -> str:
        """INT8 (levels, 256): m times `dsconv.trellis.table`, stored above its lowest: see `layouts`."""
        b, name, bottom = self.b, f"{self.name}.products", -largest(self.bits)
        if not b.has(name):
            stored = b.constant((table(self.bits).astype(np.int32) - bottom).astype(np.uint8))
            value = b.node("Cast", [stored], f"{name}.stored", to=INT32)
            value = b.node("Add", [value, _number(b, bottom)], f"{name}.vqk")
            m = np.arange(1, self.levels + 1, dtype=np.int32).reshape(-1, 1)
            b.node("Cast", [b.node("Mul", [value, b.constant(m)], f"{name}.m")], name, to=INT8)
        return name

    def _range(self, end: int) -> str:
        name = f"{self.name}.below{end}"
        if not self.b.has(name):
            self.b.node("Range", [_number(self.b, n) for n in (0, end, 1)], name)
        return name


def add_values(t: Tables, label: str, words: str, m: str, width: int, rows: Sequence[Rows]) -> str:
    """m VQK of rows one after another, INT8 (rows, bytes in turn, VQK of such bytes), from their bytes, UINT8 (rows,
    width), and m - 1, INT32 (rows, 1)."""
    b, count = t.b, turns(t.bits)
    names = [f"{label}.turn{i}" for i in range(count)] if count > 1 else [words]
    if count > 1:
        b.nodes.append(helper.make_node("Split", [words], names, axis=1, num_outputs=count))
    before = _before(b, label, names[-1], width // count, rows)
    numbers = [b.node("Cast", [x], f"{label}.number{i}", to=INT32) for i, x in enumerate([before, *names])]
    found, shifts = [], dict[int, str]()
    for part in PARTS[t.bits]:
        name = f"{label}.{_label(part)}"
        own = numbers[part.byte + 1]
        if part.ends[-1] < WINDOW:
            own = b.node("Gather", [t.own(part), own], f"{name}.own")
        above = b.node("Gather", [t.before(part), numbers[part.byte]], f"{name}.before")
        value = b.node("Add", [own, above], f"{name}.numbers")
        if part.bits not in shifts:
            shifts[part.bits] = b.node("Mul", [m, _number(b, 1 << part.bits)], f"{name}.m")
        value = b.node("Add", [value, shifts[part.bits]], f"{name}.places")
        found.append(b.node("Gather", [t.values(part), value], f"{name}.int8"))
    return found[0] if len(found) == 1 else b.node("Concat", found, f"{label}.int8", axis=2)


def _before(b: OnnxBuilder, label: str, last: str, width: int, rows: Sequence[Rows]) -> str:
    """The bytes before those of `last` (rows, width), UINT8: 0 where an output channel begins."""
    zero, alike = b.constant(np.zeros((1, 1), np.uint8)), _alike(rows)
    if all(each == 1 for _, each in alike):
        first = b.node("Tile", [zero, b.shape(alike[0][0], 1)], f"{label}.first")
    else:
        cut = [b.shape(0, -1), b.shape(-1, width), b.shape(0, 1)]
        above = b.node("Slice", [last, *cut], f"{label}.last")
        above = b.node("Pad", [above, b.shape(1, 0, 0, 0)], f"{label}.above")
        inner = [_inner(b, f"{label}.inner.{i}", channels, each) for i, (channels, each) in enumerate(alike)]
        goes_on = inner[0] if len(inner) == 1 else b.node("Concat", inner, f"{label}.inner", axis=0)
        first = b.node("Where", [goes_on, above, zero], f"{label}.first")
    if width == 1:
        return first
    others = b.node("Slice", [last, b.shape(0), b.shape(-1), b.shape(1)], f"{label}.others")
    return b.node("Concat", [first, others], f"{label}.bytes.before", axis=1)


def _inner(b: OnnxBuilder, name: str, channels: int, each: int) -> str:
    """BOOL (channels * each, 1): whether a row is not the first of its output channel."""
    pattern = b.constant(np.arange(each).reshape(-1, 1) > 0)
    return b.node("Tile", [pattern, b.shape(channels, 1)], name)


def _alike(rows: Sequence[Rows]) -> list[tuple[int, int]]:
    """How many output channels in turn have as many rows, and how many these are."""
    found = groupby(rows, lambda r: r.each)
    return [(sum(r.channels for r in some), each) for each, some in found]


def add_weight(b: OnnxBuilder, name: str, value: str, shape: tuple[int, ...], size: int) -> str:
    """Rows of `size` integers -> the weight (cho, chi, kh, kw)."""
    taps = shape[2] * shape[3]
    if taps > 1:
        value = b.node("Reshape", [value, b.shape(-1, taps, size)], f"{name}.blocks")
        value = b.node("Transpose", [value], f"{name}.taps", perm=[0, 2, 1])
    return b.node("Reshape", [value, b.shape(*shape)], f"{name}.weight")


def add_trellis(b: OnnxBuilder, name: str, weight: DSTensor) -> str:
    """Nodes and initializers for m * VQK of one weight along a trellis; returns the name of an int8 value (cho, chi,
    kh, kw)."""
    stored = bytes_of(weight)
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(-1, 1).astype(ml_dtypes.uint4))
    m = b.node("Cast", [kds], f"{name}.kds32", to=INT32)
    m = b.node("Add", [m, _number(b, -1)], f"{name}.m")
    tables = Tables.of(b, "trellis", [weight])
    value = add_values(tables, name, b.tensor(f"{name}.vqk", stored), m, stored.shape[1], [Rows.of(weight)])
    return add_weight(b, name, value, tuple(weight.vqk.shape), min(weight.block_size, weight.vqk.shape[1]))


def _label(part: Part) -> str:
    return f"ends{part.ends[0]}"


def _number(b: OnnxBuilder, value: int) -> str:
    return b.constant(np.array(value, np.int32))
