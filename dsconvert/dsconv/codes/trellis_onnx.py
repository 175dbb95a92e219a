"""Write VQK along a trellis in ONNX, and decode them with few nodes (see `dsconv.codes.trellis`).

A row is the VQK that share an m: one block at one tap. Its bits are stored as whole bytes, the first bit highest. Each
VQK depends on 8 bits, so two or four neighbours depend on 11 to 14 bits. These bits and m form an index, called a
number here, into a table. The table's entries are m times the VQK, int8, so one lookup decodes several VQK.

Most time goes into lookups and into filling memory. So all values stay bytes until one MatMulInteger computes all
numbers of a row. It multiplies these bytes:

    the last byte of the row before, as the first number needs its bits (0 at the start of an output channel)
    the bytes of the row
    remainders of these bytes, for numbers that need only some bits of a byte
    m

Bits `first` to `last` of a byte x are (x mod 2^(8 - first) - x mod 2^(8 - last)) / 2^(8 - last). Bits that come first
are the lowest of a number. So no factor of the product exceeds 64, and engines that add products of bytes in 16 bits do
not saturate. Numbers that divide bytes in different ways have a table each; these are joined to one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.codes.rows import BYTE, weight_of_rows
from dsconvert.dsconv.codes.trellis_table import WINDOW, strings, table
from dsconvert.dsconv.format import Weight

if TYPE_CHECKING:
    from dsconvert.dsconv.format import Joint, JointLayer

INT8, INT32, UINT8 = TensorProto.INT8, TensorProto.INT32, TensorProto.UINT8
BITS = 8  # in a byte
MOST = 64  # largest factor of a byte in the product
ONE = 128  # the byte that stands for 1 in the column that chooses between several tables
MEMBERS = {1: 4, 2: 4, 3: 2, 4: 2}  # bits of a VQK -> VQK in a number


class Piece(NamedTuple):
    """Bits `first` up to but not including `last` of a byte, where bit 0 is the highest.

    Byte -1 is the last byte of the row before.
    """

    byte: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """Number of bits."""
        return self.last - self.first


@dataclass(frozen=True)
class Rows:
    """The rows of a weight.

    channels: output channels.
    each: rows of an output channel.
    size: VQK of a row.
    """

    channels: int
    each: int
    size: int

    @staticmethod
    def of(weight: Weight) -> Rows:
        """Return the rows of a weight."""
        return Rows(len(weight.m), weight.m[0].numel(), min(weight.block_size, weight.vqk.shape[1]))


def bytes_of(weight: Weight) -> NDArray[np.uint8]:
    """Return a weight's stored bits as bytes (rows, bytes of a row)."""
    symbols = strings(weight.stored, weight.block_size).numpy().reshape(-1, 1)
    return np.packbits(np.unpackbits(symbols, axis=1)[:, -weight.bits :]).reshape(weight.m.numel(), -1)


def pieces(bits: int, number: int) -> list[Piece]:
    """Return the pieces of bytes that make up the bits of one number of a row, first bits first."""
    step = MEMBERS[bits] * bits
    first, end = number * step - (WINDOW - bits), (number + 1) * step
    at = range(first // BITS, -(-end // BITS))
    return [Piece(i, max(first - BITS * i, 0), min(end - BITS * i, BITS)) for i in at]


def forms(bits: int) -> list[tuple[int, ...]]:
    """Return the ways in which a row's numbers divide bytes, in order, each as the lengths of its pieces in bits."""
    turn = np.lcm(BITS, MEMBERS[bits] * bits) // (MEMBERS[bits] * bits)
    return [tuple(p.length for p in pieces(bits, i)) for i in range(turn)]


class Matrix:
    """The factors with which the bytes of a row, and their remainders, add up to its numbers.

    bits: of a VQK.
    width: bytes of a row.
    """

    def __init__(self, bits: int, width: int) -> None:
        self.bits, self.width, self.numbers = bits, width, BITS * width // (MEMBERS[bits] * bits)
        self.entries: list[tuple[int, int, int, int]] = []  # byte, divisor of its remainder, number, factor
        for number in range(self.numbers):
            place = 1
            for p in pieces(bits, number):
                rest = BITS - p.last
                # the bits of a piece, as a difference of two remainders; `place` is the piece's lowest bit in the
                # number
                self.entries.append((p.byte, BYTE >> p.first, number, place >> rest))
                if rest:
                    self.entries.append((p.byte, 1 << rest, number, -(place >> rest)))
                place <<= p.length

    def divisors(self, byte: int) -> list[int]:
        """Return the divisors of a byte's remainders, the largest first; 256 leaves the byte as it is."""
        return sorted({d for at, d, *_ in self.entries if at == byte}, reverse=True)

    def layers(self) -> list[list[int]]:
        """Return lists of divisors, one for each byte of a row, as many lists as some byte needs remainders.

        A remainder that a byte does not need has factor 0.
        """
        wanted = [[d for d in self.divisors(byte) if d < BYTE] for byte in range(self.width)]
        return [[w[min(i, len(w) - 1)] if w else 1 for w in wanted] for i in range(max(map(len, wanted)))]

    def weights(self, step: int, copies: int) -> NDArray[np.int8]:
        """Return the factors (n, numbers), int8.

        The rows stand for byte -1's remainders, the row's bytes, their remainders layer by layer, and m's bytes.

        step, copies: see `Tables`.
        """
        before, layers, turn = self.divisors(-1), self.layers(), len(forms(self.bits))
        made = np.zeros((len(before) + self.width * (1 + len(layers)), self.numbers), np.int64)
        for byte, divisor, number, weight in self.entries:
            if byte < 0:
                at = before.index(divisor)
            else:
                layer = 0 if divisor == BYTE else 1 + [x[byte] for x in layers].index(divisor)
                at = len(before) + layer * self.width + byte
            made[at, number] += weight
        of_table = 1 << sum(forms(self.bits)[0])
        m = np.full((copies, self.numbers), turn * of_table // (step * copies))
        which = np.arange(self.numbers)[None] % turn * (of_table // ONE)
        return np.concatenate([made, m, *([which] if turn > 1 else [])]).astype(np.int8)


@dataclass(frozen=True)
class Tables:
    """The tables that all weights with the same number of bits share.

    name: the names of its values begin with it.
    levels: the largest m.
    """

    b: OnnxBuilder
    name: str
    bits: int
    levels: int

    @staticmethod
    def of(b: OnnxBuilder, name: str, weights: Sequence[Weight]) -> Tables:
        """Return the tables for weights with the same number of bits."""
        levels = max(weights[0].format.most_m, *(int(w.m.max()) for w in weights))
        return Tables(b, name, weights[0].bits, levels)

    @property
    def label(self) -> str:
        """A name that is unique to these bits and levels."""
        return f"{self.name}{self.bits}m{self.levels}"

    @property
    def step(self) -> int:
        """The largest power of two such that step * (m - 1) is a byte for every m."""
        return 1 << (BYTE // self.levels).bit_length() - 1

    @property
    def copies(self) -> int:
        """How many bytes stand for m, so that no factor exceeds MOST."""
        found = forms(self.bits)
        return max(1, (len(found) << sum(found[0])) // (MOST * self.step))

    @property
    def columns(self) -> int:
        """How many bytes stand for m and, if there are several tables, for their number."""
        return self.copies + (len(forms(self.bits)) > 1)

    def steps(self, m: str, label: str) -> str:
        """Turn m, INT32 (..., 1), into the bytes for `Matrix.weights`, UINT8 (..., columns)."""
        b, one = self.b, [ONE] * (self.columns - self.copies)
        factors = b.constant(np.array([self.step] * self.copies + [0] * len(one), np.int32))
        value = b.node("Mul", [m, factors], f"{label}.steps")
        value = b.node(
            "Add", [value, b.constant(np.array([-self.step] * self.copies + one, np.int32))], f"{label}.less"
        )
        return b.node("Cast", [value], f"{label}.m", to=UINT8)

    def values(self) -> str:
        """Return the name of the table, INT8 (levels * numbers, VQK of a number): m VQK for m = 1, 2, ..., levels."""
        b, name, members = self.b, f"{self.label}.values", MEMBERS[self.bits]
        if not b.has(name):
            found = [self._strings(form) for form in forms(self.bits)]
            column = found[0] if len(found) == 1 else b.node("Concat", found, f"{name}.strings", axis=0)
            places = 1 << np.arange(members - 1, -1, -1, dtype=np.int32) * self.bits
            shifted = b.node("Div", [column, b.constant(places)], f"{name}.shifted")
            windows = b.node("Mod", [shifted, _number(b, BYTE)], f"{name}.windows")
            vqk = b.node("Cast", [b.constant(table(self.bits))], f"{name}.stored", to=INT32)
            value = b.node("Gather", [vqk, windows], f"{name}.vqk")
            m = np.arange(1, self.levels + 1, dtype=np.int32).reshape(-1, 1, 1)
            value = b.node("Cast", [b.node("Mul", [value, b.constant(m)], f"{name}.m")], f"{name}.int8", to=INT8)
            b.node("Reshape", [value, b.shape(-1, members)], name)
        return name

    def _strings(self, form: Sequence[int]) -> str:
        """Return the name of INT32 (numbers, 1): for every number of a form, its bits in the order of the string."""
        b, name = self.b, f"{self.name}.bits{'x'.join(map(str, form))}"
        if not b.has(name):
            every = f"{self.name}.below{sum(form)}"
            if not b.has(every):
                b.node("Range", [_number(b, n) for n in (0, 1 << sum(form), 1)], every)
            sides = b.node("Reshape", [every, b.shape(*(1 << n for n in form))], f"{name}.sides")
            turned = b.node("Transpose", [sides], f"{name}.turned", perm=[*reversed(range(len(form)))])
            b.node("Reshape", [turned, b.shape(-1, 1)], name)
        return name


def add_values(t: Tables, label: str, stored: str, m: str, rows: Sequence[Rows]) -> str:
    """Write m VQK of weights whose rows have one size; return the name of INT8 (rows, numbers, VQK of a number).

    stored: the rows' bytes, UINT8 (rows, width).
    m: what `Tables.steps` makes of their m, UINT8 (rows, columns).
    rows: the rows of each weight.
    """
    b, width = t.b, rows[0].size * t.bits // BITS
    matrix = Matrix(t.bits, width)
    largest, *others = matrix.divisors(-1)
    before = [_before(t, label, stored, width, rows, largest)]
    before += [b.node("Mod", [before[0], _byte(b, d)], f"{label}.before{d}") for d in others]
    rests = []
    for i, divisors in enumerate(matrix.layers()):
        same = len(set(divisors)) == 1
        divisor = _byte(b, *divisors[: 1 if same else width])
        if not same:  # expanded, as ONNX Runtime is slow at a remainder that broadcasts over many short rows
            whole = b.shape(sum(r.channels * r.each for r in rows), width)
            divisor = b.node("Expand", [divisor, whole], f"{label}.divisors{i}")
        rests.append(b.node("Mod", [stored, divisor], f"{label}.rest{i}"))
    row = b.node("Concat", [*before, stored, *rests, m], f"{label}.row", axis=1)
    numbers = b.node("MatMulInteger", [row, b.constant(matrix.weights(t.step, t.copies))], f"{label}.numbers")
    return b.node("Gather", [t.values(), numbers], f"{label}.int8")


def _before(t: Tables, label: str, stored: str, width: int, rows: Sequence[Rows], divisor: int) -> str:
    """Return the name of UINT8 (rows, 1): the last byte of the row before, modulo `divisor`.

    It is 0 where an output channel starts.
    """
    b = t.b
    alike = [(sum(r.channels for r in some), each) for each, some in groupby(rows, lambda r: r.each)]
    if all(each == 1 for _, each in alike):
        return b.node("Tile", [b.constant(np.zeros((1, 1), np.uint8)), b.shape(alike[0][0], 1)], f"{label}.before")
    last = b.node("Slice", [stored, b.shape(0, -1), b.shape(-1, width), b.shape(0, 1)], f"{label}.last")
    above = b.node("Pad", [last, b.shape(1, 0, 0, 0)], f"{label}.above")
    found = [_divisors(t, divisor, *x) for x in alike]
    divisors = found[0] if len(found) == 1 else b.node("Concat", found, f"{label}.divisors", axis=0)
    return b.node("Mod", [above, divisors], f"{label}.before")


def _divisors(t: Tables, divisor: int, channels: int, each: int) -> str:
    """Return the name of UINT8 (channels * each, 1): 1 where an output channel starts, so that the remainder is 0."""
    name = f"{t.name}.divisors{divisor}x{channels}x{each}"
    if not t.b.has(name):
        pattern = np.array([1] + [divisor] * (each - 1), np.uint8).reshape(-1, 1)
        t.b.node("Tile", [t.b.constant(pattern), t.b.shape(channels, 1)], name)
    return name


def add_rows(joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
    """Write m * VQK of a group's rows, INT8 (see `export.weights.joint`).

    layers: all layers of the group's kind; they share a table.
    """
    b, tables = joint.b, Tables.of(joint.b, "joint.trellis", [x.weight for x in layers])
    m = b.node("Gather", [_steps(joint, tables), joint.kds(group, label)], f"{label}.pairs.m")
    m = b.node("Reshape", [m, b.shape(-1, tables.columns)], f"{label}.m")
    stored = [b.tensor(f"{x.name}.vqk", bytes_of(x.weight)) for x in group]
    rows = [Rows.of(x.weight) for x in group]
    return add_values(tables, label, joint.joined(stored, label), m, rows)


def _steps(joint: Joint, tables: Tables) -> str:
    """Return the name of UINT8 (256, 2, columns): what `Tables.steps` makes of the two m that each byte holds."""
    label = f"{tables.label}.pairs"
    return f"{label}.m" if joint.b.has(f"{label}.m") else tables.steps(joint.pairs(), label)


def add_trellis(b: OnnxBuilder, name: str, weight: Weight) -> str:
    """Write the nodes and initializers of one weight's m * VQK; return the name of an int8 value (cho, chi, kh, kw)."""
    tables, rows = Tables.of(b, "trellis", [weight]), Rows.of(weight)
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(-1, 1).astype(ml_dtypes.uint4))
    m = tables.steps(b.node("Cast", [kds], f"{name}.kds32", to=INT32), f"{name}.kds")
    value = add_values(tables, name, b.tensor(f"{name}.vqk", bytes_of(weight)), m, [rows])
    return weight_of_rows(b, name, value, tuple(weight.vqk.shape), rows.size)


def _number(b: OnnxBuilder, value: int) -> str:
    return b.constant(np.array(value, np.int32))


def _byte(b: OnnxBuilder, *values: int) -> str:
    return b.constant(np.array(values, np.uint8))
