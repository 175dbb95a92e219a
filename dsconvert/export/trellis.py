"""How VQK along a trellis (see `dsconv.trellis`) are spelled in ONNX.

Strings of bits are stored as they are, the first bit highest. A row, which shares an m, is some whole bytes, and every
window of eight bits lies in the byte in which it ends and the one before. So what is needed of the byte before, the
byte itself and m make a number, and what stands there in a table of all numbers are m times the VQK that end in the
byte, int8 already. At 1 bit a byte's eight VQK come from the table by fours. At 3 bits three bytes in turn end 2, 3 and
3 VQK; these bytes are stored apart, so that each kind is in one piece.

What takes the time is looking numbers up, ten times as long as a product: so there is one lookup for all VQK of a byte.
The bytes before are the bytes themselves, one further on, and zero where an output channel begins. That is done while
they are bytes: of memory that INT32 fill, every page costs as well.
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
from dsconvert.dsconv.trellis import WINDOW, strings, table
from dsconvert.export.builder import OnnxBuilder

INT8, INT32 = TensorProto.INT8, TensorProto.INT32
BYTE = 256


@dataclass(frozen=True)
class Part:
    """VQK that are looked up together, by how many bits of the byte in which it ends each has in its window."""

    ends: tuple[int, ...]

    @property
    def before(self) -> int:
        """Bits needed of the byte before."""
        return WINDOW - self.ends[0]

    @property
    def after(self) -> int:
        """Bits of the byte that are not needed."""
        return WINDOW - self.ends[-1]

    @property
    def bits(self) -> int:
        """Of a number."""
        return self.before + self.ends[-1]


PARTS = {
    1: (Part((1, 2, 3, 4)), Part((5, 6, 7, 8))),
    2: (Part((2, 4, 6, 8)),),
    3: (Part((3, 6)), Part((1, 4, 7)), Part((2, 5, 8))),
    4: (Part((4, 8)),),
}
TURNS = {1: 1, 2: 1, 3: 3, 4: 1}  # bits -> after how many bytes VQK end in the same places again


@dataclass(frozen=True)
class Rows:
    """The rows of a weight, or of several: of how many output channels, how many each has, of how many VQK."""

    channels: int
    each: int
    size: int

    @staticmethod
    def of(weight: DSTensor) -> Rows:
        """Those of a weight."""
        return Rows(len(weight.m), weight.m[0].numel(), min(weight.block_size, weight.vqk.shape[1]))


def bytes_of(weight: DSTensor) -> NDArray[np.uint8]:
    """A weight's code as bytes (turns, bytes): row by row the first of every so many bytes, then the second."""
    assert weight.code is not None
    symbols = strings(weight.code, weight.block_size).numpy().reshape(-1, 1)
    packed = np.packbits(np.unpackbits(symbols, axis=1)[:, -weight.bits :])
    return packed.reshape(-1, TURNS[weight.bits]).T


@dataclass(frozen=True)
class Tables:
    """What all weights of as many bits share. `name` begins the names of its values, `levels` is the largest m."""

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
        """INT8 (levels times numbers, VQK of the part): m VQK, for m = 1, 2, ... levels."""
        b, places = self.b, np.array([1 << part.ends[-1] - end for end in part.ends], np.int32)
        key = "".join(str(place) for place in (part.bits, *places))  # at 1 bit both parts are alike
        name = f"{self.name}.{key}"
        if not b.has(name):
            numbers = b.node("Range", [_number(b, n) for n in (0, 1 << part.bits, 1)], f"{name}.numbers")
            numbers = b.node("Reshape", [numbers, b.shape(-1, 1)], f"{name}.column")
            shifted = b.node("Div", [numbers, b.constant(places)], f"{name}.shifted")
            windows = b.node("Mod", [shifted, _number(b, BYTE)], f"{name}.windows")
            value = b.node("Gather", [self._vqk(), windows], f"{name}.vqk")
            m = np.arange(1, self.levels + 1, dtype=np.int32).reshape(-1, 1, 1)
            value = b.node("Cast", [b.node("Mul", [value, b.constant(m)], f"{name}.m")], f"{name}.int8", to=INT8)
            b.node("Reshape", [value, b.shape(-1, len(places))], name)
        return name

    def _vqk(self) -> str:
        """INT32 (256,): `dsconv.trellis.table`, stored in bytes."""
        if not self.b.has(f"{self.name}.vqk"):
            self.b.node("Cast", [self.b.constant(table(self.bits))], f"{self.name}.vqk", to=INT32)
        return f"{self.name}.vqk"


def add_values(t: Tables, label: str, stored: str, m: str, rows: Sequence[Rows]) -> str:
    """m VQK of weights in rows of one size, one after another, INT8 (rows, n, VQK), from their bytes, UINT8 (turns,
    bytes), and m - 1, INT32 (rows, 1)."""
    b, parts, turns = t.b, PARTS[t.bits], TURNS[t.bits]
    width = rows[0].size * t.bits // WINDOW // turns
    shape = b.shape(turns, -1, width)
    before = _before(b, label, stored, [(r.channels, r.each * width) for r in rows], turns)

    def by_part(values: Sequence[int], kind: type[np.generic]) -> str:
        return b.constant(np.array(values, kind).reshape(-1, 1, 1))

    needed = b.node("Mod", [b.node("Reshape", [before, shape], f"{label}.bytes.before"),
                            by_part([1 << p.before for p in parts], np.uint8)], f"{label}.needed")  # fmt: skip
    value = b.node("Cast", [needed], f"{label}.before", to=INT32)
    above = b.node("Mul", [m, by_part([1 << p.before for p in parts], np.int32)], f"{label}.m.above")
    value = b.node("Mul", [b.node("Add", [value, above], f"{label}.above"), _number(b, BYTE)], f"{label}.shifted")
    own = b.node("Cast", [b.node("Reshape", [stored, shape], f"{label}.bytes")], f"{label}.own", to=INT32)
    value = b.node("Add", [value, own], f"{label}.all")
    if any(p.after for p in parts):
        value = b.node("Div", [value, by_part([1 << p.after for p in parts], np.int32)], f"{label}.numbers")
    names = [f"{label}.part{i}" for i in range(len(parts))]
    if len(parts) > 1:
        b.nodes.append(helper.make_node("Split", [value], names, axis=0, num_outputs=len(parts)))
    else:
        names = [value]
    found = [b.node("Gather", [t.values(p), x], f"{x}.int8") for p, x in zip(parts, names, strict=True)]
    return found[0] if len(found) == 1 else b.node("Concat", found, f"{label}.int8", axis=3)


def _before(b: OnnxBuilder, label: str, stored: str, strings: Sequence[tuple[int, int]], turns: int) -> str:
    """UINT8: the byte before each of `stored` (turns, bytes), in that order, for so many output channels of so many
    bytes a turn each."""
    if turns == 1:
        return _one_on(b, label, stored, strings)
    last = b.node("Slice", [stored, b.shape(-1), b.shape(turns), b.shape(0)], f"{label}.last")
    shifted = b.node("Reshape", [_one_on(b, label, last, strings), b.shape(1, -1)], f"{label}.last.before")
    others = b.node("Slice", [stored, b.shape(0), b.shape(-1), b.shape(0)], f"{label}.others")
    return b.node("Concat", [shifted, others], f"{label}.turned", axis=0)


def _one_on(b: OnnxBuilder, label: str, value: str, strings: Sequence[tuple[int, int]]) -> str:
    """UINT8, in any shape: the byte before each, 0 where an output channel begins."""
    alike = [(sum(count for count, _ in some), length) for length, some in groupby(strings, lambda x: x[1])]
    if len(alike) == 1:  # every output channel is a row of as many bytes
        value = b.node("Reshape", [value, b.shape(alike[0][0], -1)], f"{label}.strings")
        value = b.node("Pad", [value, b.shape(0, 1, 0, 0)], f"{label}.longer")
        return b.node("Slice", [value, b.shape(0), b.shape(-1), b.shape(1)], f"{label}.on")
    value = b.node("Reshape", [value, b.shape(-1)], f"{label}.string")
    value = b.node("Pad", [value, b.shape(1, 0)], f"{label}.longer")
    value = b.node("Slice", [value, b.shape(0), b.shape(-1), b.shape(0)], f"{label}.on")
    starts, first = [], 0
    for i, (count, length) in enumerate(alike):
        edges = [_number(b, n) for n in (first, first + count * length, length)]
        starts.append(b.node("Range", edges, f"{label}.starts{i}"))
        first += count * length
    at = b.node("Concat", starts, f"{label}.starts", axis=0)
    zero = b.constant(np.zeros(1, np.uint8))
    zeros = b.node("Expand", [zero, b.shape(sum(count for count, _ in alike))], f"{label}.zeros")
    return b.node("ScatterElements", [value, at, zeros], f"{label}.begun")


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
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(-1, 1).astype(ml_dtypes.uint4))
    m = b.node("Cast", [kds], f"{name}.kds32", to=INT32)
    m = b.node("Add", [m, _number(b, -1)], f"{name}.m")
    stored, rows = b.tensor(f"{name}.vqk", bytes_of(weight)), Rows.of(weight)
    value = add_values(Tables.of(b, "trellis", [weight]), name, stored, m, [rows])
    return add_weight(b, name, value, tuple(weight.vqk.shape), rows.size)


def _number(b: OnnxBuilder, value: int) -> str:
    return b.constant(np.array(value, np.int32))
