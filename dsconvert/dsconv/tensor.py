"""The DSConv weight as a value (arXiv 1901.01928, section 3), with the two-level integer KDS.

A convolution weight W of shape (cho, chi, kh, kw) is represented as

    W'[o, i, y, x] = CDSw[o] * m[o, i // B, y, x] * VQK[o, i, y, x]

VQK are signed b-bit integers, B is the block size along input channels (chi is per group), m (1..15) is the kernel
distribution shift (KDS) kept as an integer, CDSw (float, one per output channel) is the channel distribution shift.
Because |m * VQK| <= 127 always, W' / CDSw is an int8 tensor: every int8 engine runs it. A plain per-channel int8
weight is the same thing with b = 8 and m = 1.

When chi is no multiple of B the last block is the short one: 48 channels with B = 32 are blocks of 32 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dsconvert.dsconv import trellis as codes

M_MAX = 15  # the integer multiplier fits four bits
INT8_MAX = 127  # symmetric: -128 is never used, so that negation is safe on every engine
# x86 CPUs without VNNI add the uint8 * int8 products of two neighbouring channels in saturating 16 bits:
# 255 (w1 + w2) <= 32767 holds for every input only while |w1 + w2| <= 128
PAIR_MAX = 128


def vqk_limits(bits: int, trellis: bool = False) -> tuple[int, int]:
    """Smallest and largest VQK integer: two's complement, except that 8 bits stop at -127 (see INT8_MAX); along a
    trellis (see `dsconv.trellis`) as far as its table goes."""
    if trellis and codes.exists(bits):
        return -codes.largest(bits), codes.largest(bits)
    if not 2 <= bits <= 8 or trellis:
        raise ValueError(f"bits must be 2 to 8, or 1 to 4 along a trellis, got {bits}")
    return max(-(2 ** (bits - 1)), -INT8_MAX), 2 ** (bits - 1) - 1


def max_multiplier(bits: int, trellis: bool = False) -> int:
    """Largest m for which no two m * VQK of that width can exceed PAIR_MAX together."""
    return max(1, min(M_MAX, PAIR_MAX // 2 // -vqk_limits(bits, trellis)[0]))


def block_count(chi: int, block_size: int) -> int:
    """ceil(chi / block_size)."""
    return math.ceil(chi / block_size)


class Width(NamedTuple):
    """How finely a weight is stored: bits of VQK, how many input channels share a KDS, and whether VQK lie along a
    trellis (see `dsconv.trellis`)."""

    bits: int
    block_size: int
    trellis: bool = False


def used_width(bits: int, chi: int, block_size: int) -> Width:
    """The width a layer of chi input channels is fitted with: at 8 bits one block, which makes it plain int8;
    at 1 to 4 bits along a trellis, where that fits."""
    return Width(bits, block_size if bits < 8 else chi, codes.fits(bits, chi, block_size))


def expand_blocks(kds: Tensor, chi: int, block_size: int) -> Tensor:
    """(cho, nblk, kh, kw) -> (cho, chi, kh, kw): every channel gets its block's value."""
    return kds.repeat_interleave(min(block_size, chi), 1)[:, :chi]


@dataclass(frozen=True)
class DSTensor:
    """One DSConv weight. vqk int8 (cho, chi, kh, kw); m int8 (cho, nblk, kh, kw); cds_w float32 (cho,). alpha float32,
    of the shape of m, is the paper's real multiplier in the place of m (which is 1 then); such a weight has no int8
    form. code uint8, of the shape of vqk, are the bits of VQK that lie along a trellis (`along_trellis` makes such a
    weight); alpha is None then. Raises ValueError when the parts do not fit each other or leave int8."""

    vqk: Tensor
    m: Tensor
    cds_w: Tensor
    bits: int
    block_size: int
    alpha: Tensor | None = None
    code: Tensor | None = None

    @staticmethod
    def along_trellis(code: Tensor, m: Tensor, cds_w: Tensor, bits: int, block_size: int) -> DSTensor:
        """The weight whose VQK have this code, uint8 (cho, chi, kh, kw). Raises ValueError as above."""
        return DSTensor(codes.values(code, bits, block_size), m, cds_w, bits, block_size, code=code)

    def __post_init__(self) -> None:
        cho, chi, kh, kw = self.vqk.shape
        blocks = (cho, block_count(chi, self.block_size), kh, kw)
        if tuple(self.m.shape) != blocks:
            raise ValueError(f"KDS must have shape {blocks}, got {tuple(self.m.shape)}")
        if tuple(self.cds_w.shape) != (cho,):
            raise ValueError(f"CDSw must have shape ({cho},), got {tuple(self.cds_w.shape)}")
        if self.code is not None and (self.code.shape != self.vqk.shape or self.alpha is not None):
            raise ValueError(f"a trellis code must have shape {tuple(self.vqk.shape)} and stand without alpha")
        low, high = vqk_limits(self.bits, self.code is not None)
        if self.vqk.numel() and (int(self.vqk.min()) < low or int(self.vqk.max()) > high):
            raise ValueError(f"VQK leaves {self.bits} bits")
        if self.code is not None and not torch.equal(codes.values(self.code, self.bits, self.block_size), self.vqk):
            raise ValueError("VQK are not those of the trellis code")
        if self.alpha is not None and (self.alpha.shape != blocks or bool((self.m != 1).any())):
            raise ValueError(f"alpha must have shape {blocks} and stand alone")
        if self.m.numel() and (int(self.m.min()) < 1 or int(self.m.max()) > M_MAX):
            raise ValueError(f"m must lie in 1..{M_MAX}")
        if self.vqk.numel() and int(_merge(self).abs().max()) > INT8_MAX:
            raise ValueError("m * VQK leaves int8")

    @staticmethod
    def joined(parts: Sequence[DSTensor]) -> DSTensor:
        """The output channels of all parts, one after another. Raises ValueError where they are stored differently."""
        if len({(p.width, p.alpha is None) for p in parts}) != 1:
            raise ValueError("weights that are stored differently cannot be joined")
        columns = {f: [v for p in parts if (v := getattr(p, f)) is not None] for f in _BY_CHANNEL}
        fields: Any = {f: torch.cat(values) for f, values in columns.items() if values}
        return replace(parts[0], **fields)

    def rows(self, rows: Tensor) -> DSTensor:
        """Some output channels, by index."""
        fields: Any = {f: v[rows] for f in _BY_CHANNEL if (v := getattr(self, f)) is not None}
        return replace(self, **fields)

    @property
    def width(self) -> Width:
        """How finely it is stored."""
        return Width(self.bits, self.block_size, self.code is not None)

    @property
    def weight_bits(self) -> float:
        """Bits per weight in storage: VQK, plus KDS where it says anything (plain int8 stores none)."""
        per_block = 4 if self.alpha is None else 32
        kds = 0 if self.is_plain_int8 else self.m.numel() * per_block
        return self.bits + kds / self.vqk.numel()

    @property
    def is_plain_int8(self) -> bool:
        """True when this is an ordinary per-channel int8 weight (not DSConv)."""
        return self.alpha is None and self.bits == 8 and bool((self.m == 1).all())

    def merged(self) -> Tensor:
        """W' / CDSw = m * VQK, int8 (cho, chi, kh, kw). Raises ValueError with real alpha."""
        if self.alpha is not None:
            raise ValueError("a weight with real alpha has no int8 form")
        return _merge(self).to(torch.int8)

    def unscaled(self) -> Tensor:
        """W' / CDSw, float32 (cho, chi, kh, kw)."""
        if self.alpha is None:
            return _merge(self).float()
        return expand_blocks(self.alpha, self.vqk.shape[1], self.block_size) * self.vqk.float()

    def weight(self) -> Tensor:
        """W', float32 (cho, chi, kh, kw)."""
        return self.cds_w[:, None, None, None] * self.unscaled()


_BY_CHANNEL = ("vqk", "m", "cds_w", "alpha", "code")  # what has a row for every output channel


def largest_pair(merged: Tensor) -> int:
    """Largest |w1 + w2| over neighbouring channels of the int8 weight (cho, chi, kh, kw), at least the largest |w|.

    With an odd chi engines differ in who is whose neighbour, and any two weights of an output channel count."""
    w = merged.int()
    if w.shape[1] % 2 == 0:
        return max(int((w[:, 0::2] + w[:, 1::2]).abs().max()), int(w.abs().max()))
    return 2 * int(w.abs().max())


def _merge(t: DSTensor) -> Tensor:
    chi = t.vqk.shape[1]
    return expand_blocks(t.m.int(), chi, t.block_size) * t.vqk.int()
