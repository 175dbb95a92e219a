"""How VQK along a trellis (see `dsconv.codes.trellis`) are spelled in ONNX.

Strings of bits are stored as they are, the first bit highest: a row, which shares an m, is some whole bytes. Two or
four VQK that follow one another hang on 11 to 14 bits: these, and m, make a number, and what stands there in a table of
all numbers are m times the VQK, int8 already.

What takes the time is looking numbers up, and filling memory. So there is one lookup for several VQK, and all is bytes
up to the numbers, which one MatMulInteger makes of a row: of the row itself, of the last byte of the row before (0
where an output channel begins), of remainders of these where a number takes but some bits of a byte, and of m. Bits
that come first are the lowest of a number: so weights are 64 at most, and no CPU's way of adding products of bytes
saturates. Numbers that divide bytes differently have tables of their own, next to each other in one.
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
BITS = 8  # of a byte
MOST = 64  # weight of a byte
ONE = 128  # the byte that stands for 1 where numbers of several tables are told apart
MEMBERS = {1: 4, 2: 4, 3: 2, 4: 2}  # bits -> VQK of a number


class Piece(NamedTuple):
    """Bits `first` to `last` (excluded) of a byte, the highest being 0; byte -1 is the last one of the row before."""

    byte: int
    first: int
    last: int

    @property
    def length(self) -> int:
        """How many they are."""
        return self.last - self.first


@dataclass(frozen=True)
class Rows:
    """The rows of a weight: of how many output channels, how many each has, of how many VQK."""

    channels: int
    each: int
    size: int

    @staticmethod
    def of(weight: Weight) -> Rows:
        """Those of a weight."""
        return Rows(len(weight.m), weight.m[0].numel(), min(weight.block_size, weight.vqk.shape[1]))


def bytes_of(weight: Weight) -> NDArray[np.uint8]:
    """A weight's code as bytes (rows, bytes of a row)."""
    symbols = strings(weight.stored, weight.block_size).numpy().reshape(-1, 1)
    return np.packbits(np.unpackbits(symbols, axis=1)[:, -weight.bits :]).reshape(weight.m.numel(), -1)


def pieces(bits: int, number: int) -> list[Piece]:
    """What a row's number is made of."""
    step = MEMBERS[bits] * bits
    first, end = number * step - (WINDOW - bits), (number + 1) * step
    at = range(first // BITS, -(-end // BITS))
    return [Piece(i, max(first - BITS * i, 0), min(end - BITS * i, BITS)) for i in at]


def forms(bits: int) -> list[tuple[int, ...]]:
    """The ways in which a row's numbers divide bytes, in turn: how many bits are of each."""
    turn = np.lcm(BITS, MEMBERS[bits] * bits) // (MEMBERS[bits] * bits)
    return [tuple(p.length for p in pieces(bits, i)) for i in range(turn)]


class Matrix:
    """The weights of what a row's numbers are sums of, and the remainders that these want."""

    def __init__(self, bits: int, width: int) -> None:
        self.bits, self.width, self.numbers = bits, width, BITS * width // (MEMBERS[bits] * bits)
        self.entries: list[tuple[int, int, int, int]] = []  # byte, divisor of which the remainder, number, weight
        for number in range(self.numbers):
            place = 1
            for p in pieces(bits, number):
                rest = BITS - p.last
                self.entries.append((p.byte, BYTE >> p.first, number, place >> rest))
                if rest:
                    self.entries.append((p.byte, 1 << rest, number, -(place >> rest)))
                place <<= p.length

    def divisors(self, byte: int) -> list[int]:
        """Those of a byte's remainders, the largest first; 256 is the byte itself."""
        return sorted({d for at, d, *_ in self.entries if at == byte}, reverse=True)

    def layers(self) -> list[list[int]]:
        """Divisors of all bytes of a row, as many lists as are needed. What a byte does not need has weight 0."""
        wanted = [[d for d in self.divisors(byte) if d < BYTE] for byte in range(self.width)]
        return [[w[min(i, len(w) - 1)] if w else 1 for w in wanted] for i in range(max(map(len, wanted)))]

    def weights(self, step: int, copies: int) -> NDArray[np.int8]:
        """(n, numbers): of the remainders of byte -1, of a row, of its remainders layer by layer, of m's bytes."""
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
    """What all weights of as many bits share. `name` begins the names of its values, `levels` is the largest m."""

    b: OnnxBuilder
    name: str
    bits: int
    levels: int

    @staticmethod
    def of(b: OnnxBuilder, name: str, weights: Sequence[Weight]) -> Tables:
        """Those for weights of as many bits."""
        levels = max(weights[0].format.most_m, *(int(w.m.max()) for w in weights))
        return Tables(b, name, weights[0].bits, levels)

    @property
    def label(self) -> str:
        """A name of its own."""
        return f"{self.name}{self.bits}m{self.levels}"

    @property
    def step(self) -> int:
        """The largest power of two by which every m - 1 is a byte."""
        return 1 << (BYTE // self.levels).bit_length() - 1

    @property
    def copies(self) -> int:
        """How many such bytes a number needs."""
        found = forms(self.bits)
        return max(1, (len(found) << sum(found[0])) // (MOST * self.step))

    @property
    def columns(self) -> int:
        """How many bytes stand for m."""
        return self.copies + (len(forms(self.bits)) > 1)

    def steps(self, m: str, label: str) -> str:
        """UINT8 (..., columns): of m, INT32 (..., 1), what `Matrix.weights` is for."""
        b, one = self.b, [ONE] * (self.columns - self.copies)
        factors = b.constant(np.array([self.step] * self.copies + [0] * len(one), np.int32))
        value = b.node("Mul", [m, factors], f"{label}.steps")
        value = b.node(
            "Add", [value, b.constant(np.array([-self.step] * self.copies + one, np.int32))], f"{label}.less"
        )
        return b.node("Cast", [value], f"{label}.m", to=UINT8)

    def values(self) -> str:
        """INT8 (levels times numbers, VQK of a number): m VQK, for m = 1, 2, ... levels."""
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
        """INT32 (numbers, 1): of numbers of that form, in order, the bits as they follow one another."""
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
    """m VQK of weights in rows of one size, one after another, INT8 (rows, numbers, VQK), from their bytes, UINT8
    (rows, width), and from what `Tables.steps` makes of their m, UINT8 (rows, columns)."""
    b, width = t.b, rows[0].size * t.bits // BITS
    matrix = Matrix(t.bits, width)
    largest, *others = matrix.divisors(-1)
    before = [_before(t, label, stored, width, rows, largest)]
    before += [b.node("Mod", [before[0], _byte(b, d)], f"{label}.before{d}") for d in others]
    rests = []
    for i, divisors in enumerate(matrix.layers()):
        same = len(set(divisors)) == 1
        divisor = _byte(b, *divisors[: 1 if same else width])
        if not same:  # spread out, as ONNX Runtime is slow at a remainder of many short rows
            whole = b.shape(sum(r.channels * r.each for r in rows), width)
            divisor = b.node("Expand", [divisor, whole], f"{label}.divisors{i}")
        rests.append(b.node("Mod", [stored, divisor], f"{label}.rest{i}"))
    row = b.node("Concat", [*before, stored, *rests, m], f"{label}.row", axis=1)
    numbers = b.node("MatMulInteger", [row, b.constant(matrix.weights(t.step, t.copies))], f"{label}.numbers")
    return b.node("Gather", [t.values(), numbers], f"{label}.int8")


def _before(t: Tables, label: str, stored: str, width: int, rows: Sequence[Rows], divisor: int) -> str:
    """UINT8 (rows, 1): of the last byte of the row before the remainder, 0 where an output channel begins."""
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
    """UINT8 (channels * each, 1): 1 where an output channel begins, so that nothing remains."""
    name = f"{t.name}.divisors{divisor}x{channels}x{each}"
    if not t.b.has(name):
        pattern = np.array([1] + [divisor] * (each - 1), np.uint8).reshape(-1, 1)
        t.b.node("Tile", [t.b.constant(pattern), t.b.shape(channels, 1)], name)
    return name


def add_rows(joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
    """INT8 rows of a group, some of all layers of their kind (see `export.weights.joint`)."""
    b, tables = joint.b, Tables.of(joint.b, "joint.trellis", [x.weight for x in layers])
    m = b.node("Gather", [_steps(joint, tables), joint.kds(group, label)], f"{label}.pairs.m")
    m = b.node("Reshape", [m, b.shape(-1, tables.columns)], f"{label}.m")
    stored = [b.tensor(f"{x.name}.vqk", bytes_of(x.weight)) for x in group]
    rows = [Rows.of(x.weight) for x in group]
    return add_values(tables, label, joint.joined(stored, label), m, rows)


def _steps(joint: Joint, tables: Tables) -> str:
    """UINT8 (256, 2, columns): of a byte's two m what `Tables.steps` makes."""
    label = f"{tables.label}.pairs"
    return f"{label}.m" if joint.b.has(f"{label}.m") else tables.steps(joint.pairs(), label)


def add_trellis(b: OnnxBuilder, name: str, weight: Weight) -> str:
    """Nodes and initializers for m * VQK of one weight along a trellis; returns the name of an int8 value (cho, chi,
    kh, kw)."""
    tables, rows = Tables.of(b, "trellis", [weight]), Rows.of(weight)
    kds = b.tensor(f"{name}.kds", weight.m.numpy().reshape(-1, 1).astype(ml_dtypes.uint4))
    m = tables.steps(b.node("Cast", [kds], f"{name}.kds32", to=INT32), f"{name}.kds")
    value = add_values(tables, name, b.tensor(f"{name}.vqk", bytes_of(weight)), m, [rows])
    return weight_of_rows(b, name, value, tuple(weight.vqk.shape), rows.size)


def _number(b: OnnxBuilder, value: int) -> str:
    return b.constant(np.array(value, np.int32))


def _byte(b: OnnxBuilder, *values: int) -> str:
    return b.constant(np.array(values, np.uint8))
