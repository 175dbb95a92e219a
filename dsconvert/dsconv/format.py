"""How finely a weight is stored, and what the bits stand for.

A `WeightFormat` is the field's name for it: bits, group size, and a code. The code is an object that the fit is handed,
as QTIP hands its code book to the rounding (arXiv 2406.11235): it knows what stored bits mean, how a target is rounded
to them, how they are packed into a file, and how ONNX spells them. `dsconvert.dsconv.codes` lists the codes there are;
a new one is a file there and a line in that list.
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

M_MAX = 15  # the integer multiplier fits four bits
INT8_MAX = 127  # symmetric: -128 is never used, so that negation is safe on every engine
# x86 CPUs without VNNI add the uint8 * int8 products of two neighbouring channels in saturating 16 bits:
# 255 (w1 + w2) <= 32767 holds for every input only while |w1 + w2| <= 128
PAIR_MAX = 128

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class WeightFormat:
    """How finely a weight is stored."""

    bits: int  # of a VQK in storage, 1 to 8
    block_size: int  # input channels that share a KDS
    code: Code  # what the bits of VQK stand for

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest VQK."""
        return self.code.limits(self.bits)

    @property
    def most_m(self) -> int:
        """Largest m for which no two m * VQK can exceed PAIR_MAX together."""
        return self.code.most_m(self.bits)

    @property
    def is_plain(self) -> bool:
        """Whether this is ordinary int8 per channel: 8 bits leave no room for an m."""
        return self.bits == 8 and not self.code.real

    @property
    def kds_bits(self) -> int:
        """Bits of a stored KDS."""
        return 32 if self.code.real else 0 if self.is_plain else 4

    @property
    def integers(self) -> WeightFormat:
        """The format whose VQK are looked for: of real KDS the same VQK with integer ones."""
        return replace(self, code=self.code.integers)

    def values(self, stored: Tensor) -> Tensor:
        """Stored bits (cho, chi, kh, kw) -> VQK int8. Raises ValueError where they cannot be."""
        return self.code.values(stored, self)

    def size(self, chi: int) -> int:
        """Channels of a layer's largest block."""
        return min(self.block_size, chi)

    def spelled(self) -> tuple[int, int, str]:
        """Bits, block size and the code's name, for JSON; `codes.format_of` is the inverse."""
        return self.bits, self.block_size, self.code.name


class Parts(NamedTuple):
    """What makes a weight of a format: see `tensor.DSTensor`."""

    stored: Tensor  # (cho, chi, kh, kw)
    m: Tensor  # (cho, nblk, kh, kw)
    cds_w: Tensor  # (cho,)


class Weight(Protocol):
    """A weight as codes see it: `tensor.DSTensor`."""

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
    """What the bits of a weight stand for. A class is one code; its objects hold no state.

    Methods that are not here raise NotImplementedError in a code that lacks them. Weights are (cho, chi, kh, kw)."""

    name: str  # in files
    stored_as: torch.dtype = torch.int8  # of what is kept in memory of a weight
    part: str = "vqk"  # what the packed bits are called in a model file
    real: bool = False  # KDS are the paper's real alpha in the place of m, so there is no int8 form
    marked: bool = True  # a model file's layer names the code; what has another mark there needs none
    movable: bool = False  # any VQK may take a step by itself, as `finetune --train all` has it
    has_zero: bool = True  # VQK may all be 0

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other)  # a copy of a weight has a copy of its code

    def __hash__(self) -> int:
        return hash(type(self))

    def limits(self, bits: int) -> tuple[int, int]:
        """Smallest and largest VQK. Raises ValueError for bits that the code does not have."""
        raise NotImplementedError

    def most_m(self, bits: int) -> int:
        """Largest m for which no two m * VQK can exceed PAIR_MAX together."""
        return max(1, min(M_MAX, PAIR_MAX // 2 // -self.limits(bits)[0]))

    def fits(self, bits: int, chi: int, block_size: int) -> bool:
        """Whether a layer of chi input channels (per group) can be stored so."""
        raise NotImplementedError

    def values(self, stored: Tensor, format: WeightFormat) -> Tensor:
        """Stored bits (cho, chi, kh, kw) -> VQK int8. Raises ValueError where they cannot be."""
        raise NotImplementedError

    def quiet(self, shape: Sequence[int], format: WeightFormat) -> Tensor:
        """What stands for the smallest VQK there are, of that shape."""
        return torch.zeros(tuple(shape), dtype=self.stored_as)

    # --- the fit (see `fit.gptq`)

    @property
    def integers(self) -> Code:
        """The code whose VQK the fit looks for."""
        return self

    def order(self, shape: Sequence[int], format: WeightFormat, energy: Tensor) -> list[Tensor]:
        """Column indices of every (block, tap), in the order of rounding. energy (K,): of each column's input."""
        raise NotImplementedError

    def start(self, target: Tensor, format: WeightFormat) -> Tensor:
        """CDSw (cho,) float64 to round a target (cho, chi, kh, kw) with."""
        return self.nearest(target, format).cds_w.double()

    def round(
        self, target: Floats, cds: Floats, upper: Floats, lengths: Sequence[int], format: WeightFormat
    ) -> tuple[Tensor, Tensor]:
        """GPTQ's loop over a target (cho, K), columns in the code's order, in groups of those lengths that share an m.

        cds: CDSw (cho,).
        upper: (K, K), the Cholesky factor of H^-1 in that order.
        Returns the stored bits (cho, K) in that order, and m (groups, cho)."""
        raise NotImplementedError

    def settled(self, stored: Tensor, format: WeightFormat) -> Tensor:
        """Stored bits in the weight's own order, with what all engines can add; most codes have nothing to do."""
        return stored

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        """The weight of least squared error, as far as it is found, on CPU."""
        raise NotImplementedError

    def refit(self, fitted: Weight, hessian: Tensor, cross: Tensor, format: WeightFormat) -> Parts:
        """The last step of a fit: other shifts for the VQK found. hessian (K, K), cross (cho, K): see `fit.gptq`."""
        return Parts(fitted.stored, fitted.m, fitted.cds_w)

    def damage(self, weight: Tensor, format: WeightFormat, squares: Tensor) -> float:
        """sum g^2 D^2 for the weight's errors D, and g^2 of its shape (see `measure.damage`)."""
        raise NotImplementedError

    # --- files

    def pack(self, stored: Tensor, format: WeightFormat) -> NDArray[np.uint8]:
        """Stored bits as bytes, for the model file."""
        raise NotImplementedError

    def unpack(self, packed: NDArray[np.uint8], shape: Sequence[int], format: WeightFormat) -> Tensor:
        """Inverse of `pack`. Raises ValueError when the length is wrong."""
        raise NotImplementedError

    # --- ONNX

    joint_bits: tuple[int, ...] = ()  # at which several layers can be decoded together (see `export.weights.joint`)
    rows_together: int = 1  # rows that `spell_rows` gives as one
    label: str = ""  # begins the names of what such layers share

    def spell(self, b: OnnxBuilder, name: str, weight: Weight, by_blocks: bool) -> str:
        """Nodes and initializers for m * VQK; returns the name of an int8 value (cho, chi, kh, kw). by_blocks: with
        ONNX's operator for block scales, where that suits the code."""
        raise NotImplementedError

    def spell_rows(self, joint: Joint, group: Sequence[JointLayer], layers: Sequence[JointLayer], label: str) -> str:
        """The same for a group of layers with blocks of one size, some of all layers of the code and as many bits: an
        INT8 value of all their rows. label begins the names of its values."""
        raise NotImplementedError


@dataclass(frozen=True)
class JointLayer:
    """One of the layers that are decoded together."""

    name: str  # begins the names of its values
    weight: Weight

    @property
    def kind(self) -> tuple[Code, int]:
        """Layers of one kind are decoded alike."""
        return self.weight.format.code, self.weight.bits

    @property
    def size(self) -> int:
        """VQK of a row."""
        return self.weight.format.size(self.weight.vqk.shape[1])

    @property
    def each(self) -> int:
        """Rows of an output channel."""
        return self.weight.m[0].numel()

    def rows(self) -> NDArray[np.int8]:
        """VQK (rows, size): what shares an m."""
        taps = math.prod(self.weight.vqk.shape[2:])
        vqk = self.weight.vqk.numpy().reshape(len(self.weight.vqk), -1, self.size, taps)
        return np.ascontiguousarray(vqk.transpose(0, 1, 3, 2)).reshape(-1, self.size)


class Joint(Protocol):
    """What `spell_rows` makes use of: see `export.weights.joint.JointWeights`."""

    b: OnnxBuilder

    def kds(self, group: Sequence[JointLayer], label: str) -> str: ...
    def pairs(self) -> str: ...
    def pieces(self, count: int) -> str: ...
    def joined(self, names: list[str], label: str) -> str: ...
    def label_of(self, layer: JointLayer) -> str: ...
