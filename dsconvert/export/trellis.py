"""How VQK along a trellis (see `dsconv.trellis`) are spelled in ONNX.

Strings of bits are stored as they are, the first bit highest. A row, which shares an m, is some whole bytes, and every
window of eight bits lies in the byte in which it ends and the one before. So what is needed of the byte before, the
byte itself and m make a number, and what stands there in a table of all numbers are m times the VQK that end in the
byte, int8 already. At 1 bit a byte's eight VQK come from tables by fours. At 3 bits three bytes in turn end 2, 3 and
3 VQK; these bytes are stored apart, so that each kind is in one piece.

What takes the time is looking numbers up, and filling memory: so there is one lookup for all VQK of a byte, and all is
bytes up to the numbers, which one MatMulInteger makes of a row. Its weights are 64 at most: then no CPU's way of adding
products of bytes saturates. The bytes before are the bytes themselves, one further on, and zero where an output channel
begins.
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

INT8, INT32, UINT8 = TensorProto.INT8, TensorProto.INT32, TensorProto.UINT8
BYTE = 256
MOST = 64  # weight of a byte


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
        """Of a number: those before are lowest."""
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
    """What all weights of as many bits share. `name` begins the names of its values, `levels` is the largest m. For a
    number, m - 1 comes as `copies` bytes, each `step` times it."""

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

    @property
    def step(self) -> int:
        """The largest power of two by which every m - 1 is a byte."""
        return 1 << (BYTE // self.levels).bit_length() - 1

    @property
    def copies(self) -> int:
        """As many as the largest number needs."""
        return max(1, *((1 << part.bits) // (MOST * self.step) for part in PARTS[self.bits]))

    @property
    def steps(self) -> str:
        """INT32 (copies,): `step`, a factor of m - 1."""
        return self.b.constant(np.full(self.copies, self.step, np.int32))

    def values(self, part: Part) -> str:
        """INT8 (levels times numbers, VQK of the part): m VQK, for m = 1, 2, ... levels."""
        b, name = self.b, f"{self.name}.{_label(part)}"
        if not b.has(name):
            numbers = b.node("Range", [_number(b, n) for n in (0, 1 << part.bits, 1)], f"{name}.strings")
            square = b.node("Reshape", [numbers, b.shape(1 << part.before, -1)], f"{name}.square")
            turned = b.node("Transpose", [square], f"{name}.turned", perm=[1, 0])
            column = b.node("Reshape", [turned, b.shape(-1, 1)], f"{name}.column")
            places = np.array([1 << part.ends[-1] - end for end in part.ends], np.int32)
            shifted = b.node("Div", [column, b.constant(places)], f"{name}.shifted")
            windows = b.node("Mod", [shifted, _number(b, BYTE)], f"{name}.windows")
            value = b.node("Gather", [self._vqk(), windows], f"{name}.vqk")
            m = np.arange(1, self.levels + 1, dtype=np.int32).reshape(-1, 1, 1)
            value = b.node("Cast", [b.node("Mul", [value, b.constant(m)], f"{name}.m")], f"{name}.int8", to=INT8)
            b.node("Reshape", [value, b.shape(-1, len(places))], name)
        return name

    def weights(self, part: Part, width: int) -> NDArray[np.int8]:
        """(n, width): of what `_sources` finds, for every number of a row."""
        eye, own = np.eye(width, dtype=np.int8), 1 << part.before - part.after
        m = np.full((self.copies, width), (1 << part.bits) // (self.step * self.copies))
        return np.concatenate([eye, own * eye, *([-own * eye] if part.after else []), m]).astype(np.int8)

    def _vqk(self) -> str:
        """INT32 (256,): `dsconv.trellis.table`, stored in bytes."""
        if not self.b.has(f"{self.name}.vqk"):
            self.b.node("Cast", [self.b.constant(table(self.bits))], f"{self.name}.vqk", to=INT32)
        return f"{self.name}.vqk"


def add_values(t: Tables, label: str, stored: str, m: str, rows: Sequence[Rows]) -> str:
    """m VQK of weights in rows of one size, one after another, INT8 (1, rows, n, VQK), from their bytes, UINT8 (turns,
    bytes), and those for m - 1, UINT8 (1, rows, copies)."""
    b, parts, turns = t.b, PARTS[t.bits], TURNS[t.bits]
    width = rows[0].size * t.bits // WINDOW // turns
    owns = [b.node("Reshape", [stored, b.shape(turns, -1, width)], f"{label}.bytes")]
    if turns > 1:
        joined, owns = owns[0], [f"{label}.turn{i}" for i in range(turns)]
        b.nodes.append(helper.make_node("Split", [joined], owns, axis=0, num_outputs=turns))
    on = _one_on(b, label, owns[-1], [(r.channels, r.each * width) for r in rows])
    befores = [b.node("Reshape", [on, b.shape(1, -1, width)], f"{label}.before"), *owns]
    found = []
    for i, part in enumerate(parts):
        name, turn = f"{label}.part{i}", i if turns > 1 else 0
        sources = [*_sources(b, name, part, befores[turn], owns[turn]), m]
        row = b.node("Concat", sources, f"{name}.row", axis=2)
        numbers = b.node("MatMulInteger", [row, b.constant(t.weights(part, width))], f"{name}.numbers")
        found.append(b.node("Gather", [t.values(part), numbers], f"{name}.int8"))
    return found[0] if len(found) == 1 else b.node("Concat", found, f"{label}.int8", axis=3)


def _sources(b: OnnxBuilder, name: str, part: Part, before: str, own: str) -> list[str]:
    """What numbers are sums of, besides m: of the byte before what is needed, the byte itself, and what is not needed
    of it."""
    needed = b.node("Mod", [before, b.constant(np.array(1 << part.before, np.uint8))], f"{name}.needed")
    if not part.after:
        return [needed, own]
    return [needed, own, b.node("Mod", [own, b.constant(np.array(1 << part.after, np.uint8))], f"{name}.rest")]


def _one_on(b: OnnxBuilder, label: str, value: str, channels: Sequence[tuple[int, int]]) -> str:
    """UINT8, in any shape: the byte before each, 0 where an output channel begins. For the number of output channels
    in turn and how many bytes each has."""
    alike = [(sum(count for count, _ in some), length) for length, some in groupby(channels, lambda x: x[1])]
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
    tables, rows = Tables.of(b, "trellis", [weight]), Rows.of(weight)
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(1, -1, 1).astype(ml_dtypes.uint4))
    m = b.node("Cast", [kds], f"{name}.kds32", to=INT32)
    m = b.node("Add", [m, _number(b, -1)], f"{name}.kds.less")
    m = b.node("Cast", [b.node("Mul", [m, tables.steps], f"{name}.kds.steps")], f"{name}.m", to=UINT8)
    value = add_values(tables, name, b.tensor(f"{name}.vqk", bytes_of(weight)), m, [rows])
    return add_weight(b, name, value, tuple(weight.vqk.shape), rows.size)


def _label(part: Part) -> str:
    return f"ends{part.ends[0]}"


def _number(b: OnnxBuilder, value: int) -> str:
    return b.constant(np.array(value, np.int32))
