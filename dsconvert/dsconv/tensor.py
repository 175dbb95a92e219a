"""The DSConv weight as a value (arXiv 1901.01928, section 3), with the two-level integer KDS.

A convolution weight W of shape (cho, chi, kh, kw) is represented as

    W'[o, i, y, x] = CDSw[o] * m[o, i // B, y, x] * VQK[o, i, y, x]

VQK are signed integers that b bits stand for, B is the block size along input channels (chi is per group), m (1..15) is
the kernel distribution shift (KDS) kept as an integer, CDSw (float, one per output channel) is the channel distribution
shift. Because |m * VQK| <= 127 always, W' / CDSw is an int8 tensor: every int8 engine runs it. A plain per-channel int8
weight is the same thing with b = 8 and m = 1. Which VQK the bits stand for is the code's (see `format`).

When chi is no multiple of B the last block is the short one: 48 channels with B = 32 are blocks of 32 and 16.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from dsconvert.dsconv.format import INT8_MAX, M_MAX, WeightFormat


def block_count(chi: int, block_size: int) -> int:
    """ceil(chi / block_size)."""
    return math.ceil(chi / block_size)


def expand_blocks(kds: Tensor, chi: int, block_size: int) -> Tensor:
    """(cho, nblk, kh, kw) -> (cho, chi, kh, kw): every channel gets its block's value."""
    return kds.repeat_interleave(min(block_size, chi), 1)[:, :chi]


@dataclass(frozen=True)
class DSTensor:
    """One DSConv weight. Raises ValueError when the parts do not fit each other or leave int8."""

    stored: Tensor  # (cho, chi, kh, kw): what the format's code keeps of every weight; of free integers VQK itself
    m: Tensor  # (cho, nblk, kh, kw): KDS, int8 1..15; where the code has real ones, the paper's alpha, float32
    cds_w: Tensor  # (cho,) float32
    format: WeightFormat

    def __post_init__(self) -> None:
        cho, chi, kh, kw = self.stored.shape
        blocks = (cho, block_count(chi, self.block_size), kh, kw)
        if tuple(self.m.shape) != blocks:
            raise ValueError(f"KDS must have shape {blocks}, got {tuple(self.m.shape)}")
        if tuple(self.cds_w.shape) != (cho,):
            raise ValueError(f"CDSw must have shape ({cho},), got {tuple(self.cds_w.shape)}")
        low, high = self.format.limits
        if self.vqk.numel() and (int(self.vqk.min()) < low or int(self.vqk.max()) > high):
            raise ValueError(f"VQK leaves {self.bits} bits")
        if self.format.code.real:
            return
        if self.m.numel() and (int(self.m.min()) < 1 or int(self.m.max()) > (1 if self.format.is_plain else M_MAX)):
            raise ValueError(f"m must lie in 1..{M_MAX}, and be 1 at 8 bits")
        if self.vqk.numel() and int(self._products().abs().max()) > INT8_MAX:
            raise ValueError("m * VQK leaves int8")

    @staticmethod
    def nearest(weight: Tensor, format: WeightFormat) -> DSTensor:
        """The weight of least squared error in a format, as far as it is found, on CPU."""
        return DSTensor(*format.code.nearest(weight, format), format)

    @staticmethod
    def joined(parts: Sequence[DSTensor]) -> DSTensor:
        """The output channels of all parts, one after another. Raises ValueError where they are stored differently."""
        if len({p.format for p in parts}) != 1:
            raise ValueError("weights that are stored differently cannot be joined")
        stored, m, cds_w = (torch.cat(some) for some in zip(*((p.stored, p.m, p.cds_w) for p in parts), strict=True))
        return replace(parts[0], stored=stored, m=m, cds_w=cds_w)

    def rows(self, rows: Tensor) -> DSTensor:
        """Some output channels, by index."""
        return replace(self, stored=self.stored[rows], m=self.m[rows], cds_w=self.cds_w[rows])

    @cached_property
    def vqk(self) -> Tensor:
        """VQK, int8 (cho, chi, kh, kw)."""
        return self.format.values(self.stored)

    @property
    def bits(self) -> int:
        """Of a VQK in storage."""
        return self.format.bits

    @property
    def block_size(self) -> int:
        """Input channels that share a KDS."""
        return self.format.block_size

    @property
    def weight_bits(self) -> float:
        """Bits per weight in storage: VQK, plus KDS where it says anything (plain int8 stores none)."""
        return self.bits + self.m.numel() * self.format.kds_bits / self.stored.numel()

    @property
    def is_plain_int8(self) -> bool:
        """True when this is an ordinary per-channel int8 weight (not DSConv)."""
        return self.format.is_plain

    def merged(self) -> Tensor:
        """W' / CDSw = m * VQK, int8 (cho, chi, kh, kw). Raises ValueError where KDS are real."""
        if self.format.code.real:
            raise ValueError("a weight with real alpha has no int8 form")
        return self._products().to(torch.int8)

    def unscaled(self) -> Tensor:
        """W' / CDSw, float32 (cho, chi, kh, kw)."""
        if self.format.code.real:
            return expand_blocks(self.m, self.vqk.shape[1], self.block_size) * self.vqk.float()
        return self._products().float()

    def weight(self) -> Tensor:
        """W', float32 (cho, chi, kh, kw)."""
        return self.cds_w[:, None, None, None] * self.unscaled()

    def _products(self) -> Tensor:
        return expand_blocks(self.m.int(), self.vqk.shape[1], self.block_size) * self.vqk.int()
