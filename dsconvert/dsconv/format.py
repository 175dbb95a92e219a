"""The storage format of a quantized weight: bits, block size, and the code that gives the bits a meaning.

A `WeightFormat` is bits and group size, as in other tools, together with a code. A code is an object with three parts:
which integers (VQK) the stored bits stand for, how a target is rounded to them, and how they are packed into files. The
fit takes the code as an argument, as QTIP's rounding takes its code book (arXiv 2406.11235).

`dsconvert.dsconv.codes` lists all codes. To add one, add a file there and a line to that list.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

if TYPE_CHECKING:
    from dsconvert.base.builder import OnnxBuilder

M_MAX = 15  # largest m, the integer multiplier of a block (KDS); it fits four bits
INT8_MAX = 127  # largest |m VQK|; -128 is never used, so that an engine can negate every weight
# x86 CPUs without VNNI add uint8 * int8 products of two neighbouring channels in 16 bits that saturate. The sum 255 (w1
# + w2) stays within 32767 for every input only while |w1 + w2| <= 128.
PAIR_MAX = 128

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightFormat:
    """The format in which a weight is stored."""

    bits: int  # stored for each VQK, 1 to 8
    block_size: int  # input channels that share an m (KDS)
    code: Code  # what the stored bits stand for

    @property
    def limits(self) -> tuple[int, int]:
        """The smallest and the largest VQK."""
        return self.code.limits(self.bits)

    @property
    def most_m(self) -> int:
        """The largest m at which two neighbouring m * VQK never exceed PAIR_MAX together."""
        return self.code.most_m(self.bits)

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary per-channel int8. At 8 bits there is no room for an m."""
        return self.bits == 8 and not self.code.real

    @property
    def kds_bits(self) -> int:
        """Bits of one stored KDS."""
        return 32 if self.code.real else 0 if self.is_plain else 4

    @property
    def integers(self) -> WeightFormat:
        """The format whose VQK the fit looks for: itself, or its counterpart with integer KDS if its KDS are real."""
        return replace(self, code=self.code.integers)

    def values(self, stored: Tensor) -> Tensor:
        """Turn stored bits (cho, chi, kh, kw) into VQK, int8. Raises ValueError for bits that are not valid."""
        return self.code.values(stored, self)

    def size(self, chi: int) -> int:
        """Return the number of channels in the largest block of a layer with chi input channels."""
        return min(self.block_size, chi)

    def spelled(self) -> tuple[int, int, str]:
        """Return bits, block size and the code's name, for JSON; `codes.format_of` is the inverse."""
        return self.bits, self.block_size, self.code.name


class Parts(NamedTuple):
    """The parts of a quantized weight: see `tensor.DSTensor`."""

    stored: Tensor  # (cho, chi, kh, kw)
    m: Tensor  # (cho, nblk, kh, kw)
    cds_w: Tensor  # (cho,)


class Weight(Protocol):
    """A quantized weight as codes see it; the class is `tensor.DSTensor`."""

    @property
    def stored(self) -> Tensor: ...
    @property
    def m(self) -> Tensor: ...
    @property
    def cds_w(self) -> Tensor: ...
    @property
    def format(self) -> WeightFormat: ...
    @property
    def vqk(self) -> Tensor: ...
    @property
    def bits(self) -> int: ...
    @property
    def block_size(self) -> int: ...


class Code:
    """What the stored bits of a weight stand for.

    Each subclass is one code, and its objects hold no state. A method that a code does not have raises
    NotImplementedError. Weights are (cho, chi, kh, kw).
    """

    name: str  # in model files and JSON
    stored_as: torch.dtype = torch.int8  # dtype of the stored bits in memory
    part: str = "vqk"  # name of the packed bits in a model file
    real: bool = False  # KDS are the paper's real alpha instead of the integer m; the weight then has no int8 form
    # whether a model file names the code for each layer; a code that the file shows otherwise needs no name
    marked: bool = True
    movable: bool = False  # whether each VQK may change by itself, as in `finetune --train all`
    has_zero: bool = True  # whether all VQK may be 0

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # copying a weight copies its code's object too

    def __hash__(self) -> int:
        return hash(type(self))

    def limits(self, bits: int) -> tuple[int, int]:
        """Return the smallest and the largest VQK. Raises ValueError for bits that the code does not have."""
        raise NotImplementedError

    def most_m(self, bits: int) -> int:
        """Return the largest m at which two neighbouring m * VQK never exceed PAIR_MAX together."""
        return max(1, min(M_MAX, PAIR_MAX // 2 // -self.limits(bits)[0]))

    def fits(self, bits: int, chi: int, block_size: int) -> bool:
        """Return whether a layer of chi input channels (per group) can be stored in this code."""
        raise NotImplementedError

    def values(self, stored: Tensor, format: WeightFormat) -> Tensor:
        """Turn stored bits (cho, chi, kh, kw) into VQK, int8. Raises ValueError for bits that are not valid."""
        raise NotImplementedError

    def quiet(self, shape: Sequence[int], format: WeightFormat) -> Tensor:
        """Return stored bits of that shape for the smallest VQK there are."""
        return torch.zeros(tuple(shape), dtype=self.stored_as)

    # --- the fit (see `fit.gptq`)

    @property
    def integers(self) -> Code:
        """The code whose VQK the fit looks for."""
        return self

    def order(self, shape: Sequence[int], format: WeightFormat, energy: Tensor) -> list[Tensor]:
        """Return the columns of every (block, tap), in the order in which the fit rounds them.

        energy: (K,), the mean square of each column's input.
        """
        raise NotImplementedError

    def start(self, target: Tensor, format: WeightFormat) -> Tensor:
        """Return the CDSw (cho,), float64, with which the rounding of a target (cho, chi, kh, kw) starts."""
        return self.nearest(target, format).cds_w.double()

    def round(
        self, target: Floats, cds: Floats, upper: Floats, lengths: Sequence[int], format: WeightFormat
    ) -> tuple[Tensor, Tensor]:
        """Round a target column by column, and spread each error over the columns that follow (GPTQ's loop).

        target: (cho, K), with its columns in the code's order.
        cds: CDSw, (cho,).
        upper: (K, K), the upper Cholesky factor of H^-1 in that order.
        lengths: how many columns share an m, for each group in turn.

        Returns the stored bits (cho, K) in that order, and m (groups, cho).
        """
        raise NotImplementedError

    def settled(self, stored: Tensor, format: WeightFormat) -> Tensor:
        """Adjust stored bits (cho, chi, kh, kw) so that no engine's sums saturate. Most codes need nothing."""
        return stored

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        """Return a weight with a squared error as small as the search finds, on CPU."""
        raise NotImplementedError

    def refit(self, fitted: Weight, hessian: Tensor, cross: Tensor, format: WeightFormat) -> Parts:
        """Return a fitted weight with better shifts for its VQK, as the fit's last step.

        hessian, cross: H (K, K) and C (cho, K), see `fit.gptq`.
        """
        return Parts(fitted.stored, fitted.m, fitted.cds_w)

    def damage(self, weight: Tensor, format: WeightFormat, squares: Tensor) -> float:
        """Return sum g^2 D^2, where D is the expected error of each weight (see `measure.damage`).

        squares: g^2, of the weight's shape.
        """
        raise NotImplementedError

    # --- model files

    def pack(self, stored: Tensor, format: WeightFormat) -> NDArray[np.uint8]:
        """Pack stored bits into bytes for the model file."""
        raise NotImplementedError

    def unpack(self, packed: NDArray[np.uint8], shape: Sequence[int], format: WeightFormat) -> Tensor:
        """Undo `pack`. Raises ValueError when the length is wrong."""
        raise NotImplementedError

    # --- ONNX files

    # bits at which several layers can be decoded together (see `export.weights.joint`)
    joint_bits: tuple[int, ...] = ()
    rows_together: int = 1  # how many rows `spell_rows` makes one
    label: str = ""  # the names of values that such layers share begin with it

    def spell(self, b: OnnxBuilder, name: str, weight: Weight, by_blocks: bool) -> str:
        """Write the nodes and initializers of m * VQK; return the name of an int8 value (cho, chi, kh, kw).

        by_blocks: use ONNX's operator for block scales, where it suits the code.
        """
        raise NotImplementedError

    def spell_rows(self, joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
        """Write m * VQK for a group of layers with blocks of one size; return the name of an int8 value of all rows.

        group: the layers to write.
        layers: all layers of this code and these bits; they share tables.
        label: the names of new values begin with it.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class JointLayer:
    """One of several layers that are decoded together."""

    name: str  # the names of its values begin with it
    weight: Weight

    @property
    def kind(self) -> tuple[Code, int]:
        """Code and bits; layers that agree in both are decoded alike."""
        return self.weight.format.code, self.weight.bits

    @property
    def size(self) -> int:
        """VQK in a row."""
        return self.weight.format.size(self.weight.vqk.shape[1])

    @property
    def each(self) -> int:
        """Rows of an output channel."""
        return self.weight.m[0].numel()

    def rows(self) -> NDArray[np.int8]:
        """Return VQK as (rows, size); the VQK of a row share an m."""
        taps = math.prod(self.weight.vqk.shape[2:])
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, self.size)


class Joint(Protocol):
    """What `spell_rows` uses of `export.weights.joint.JointWeights`."""

    b: OnnxBuilder

    def kds(self, group: Sequence[JointLayer], label: str) -> str: ...
    def pairs(self) -> str: ...
    def pieces(self, count: int) -> str: ...
    def joined(self, names: list[str], label: str) -> str: ...
    def label_of(self, layer: JointLayer) -> str: ...
