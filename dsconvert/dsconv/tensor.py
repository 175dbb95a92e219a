"""The quantized weight of a DSConv layer as a value (arXiv 1901.01928, section 3), with integer group scales.

A convolution weight W (cho, chi, kh, kw) is represented as

    W'[o, i, y, x] = CDSw[o] * m[o, i // B, y, x] * VQK[o, i, y, x]

    VQK   quantized weights: signed integers that b bits stand for
    m     group scales, the paper's kernel distribution shift (KDS): integers 1..15, one for B channels at one tap
    CDSw  per-channel scales, the paper's channel distribution shift: float, one for each output channel
    B     block size along the input channels (chi is per group)

|m * VQK| <= 127 always holds, so W' / CDSw is an int8 tensor, which every int8 engine can run. An ordinary per-channel
int8 weight is the case b = 8 and m = 1. The code decides which VQK the bits stand for (see `format`).

If B does not divide chi, the last block is shorter: 48 channels with B = 32 are blocks of 32 and 16.
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
    """Return ceil(chi / block_size)."""
    return math.ceil(chi / block_size)


def expand_blocks(kds: Tensor, chi: int, block_size: int) -> Tensor:
    """Repeat each block's value for all its channels: (cho, nblk, kh, kw) -> (cho, chi, kh, kw)."""
    return kds.repeat_interleave(min(block_size, chi), 1)[:, :chi]


@dataclass(frozen=True)
class DSTensor:
    """One quantized weight. Raises ValueError when its parts do not fit together or m * VQK leaves int8."""

    stored: Tensor  # (cho, chi, kh, kw): what the format's code stores of each weight; VQK itself for free integers
    m: Tensor  # (cho, nblk, kh, kw): int8 1..15; for a code with real KDS the paper's alpha, float32
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
        """Return the weight with the least squared error that the format's search finds, on CPU."""
        return DSTensor(*format.code.nearest(weight, format), format)

    @staticmethod
    def joined(parts: Sequence[DSTensor]) -> DSTensor:
        """Join the output channels of all parts. Raises ValueError unless all have one format."""
        if len({p.format for p in parts}) != 1:
            raise ValueError("weights that are stored differently cannot be joined")
        stored, m, cds_w = (torch.cat(some) for some in zip(*((p.stored, p.m, p.cds_w) for p in parts), strict=True))
        return replace(parts[0], stored=stored, m=m, cds_w=cds_w)

    def rows(self, rows: Tensor) -> DSTensor:
        """Return some output channels, by index."""
        return replace(self, stored=self.stored[rows], m=self.m[rows], cds_w=self.cds_w[rows])

    @cached_property
    def vqk(self) -> Tensor:
        """VQK, int8 (cho, chi, kh, kw)."""
        return self.format.values(self.stored)

    @property
    def bits(self) -> int:
        """Bits stored for each VQK."""
        return self.format.bits

    @property
    def block_size(self) -> int:
        """Input channels that share an m (KDS)."""
        return self.format.block_size

    @property
    def weight_bits(self) -> float:
        """Stored bits per weight: the bits of VQK and a share of the bits of KDS. Plain int8 stores no KDS."""
        return self.bits + self.m.numel() * self.format.kds_bits / self.stored.numel()

    @property
    def is_plain_int8(self) -> bool:
        """Whether this is an ordinary per-channel int8 weight instead of DSConv."""
        return self.format.is_plain

    def merged(self) -> Tensor:
        """Return W' / CDSw = m * VQK, int8 (cho, chi, kh, kw). Raises ValueError if KDS are real."""
        if self.format.code.real:
            raise ValueError("a weight with real alpha has no int8 form")
        return self._products().to(torch.int8)

    def unscaled(self) -> Tensor:
        """Return W' / CDSw, float32 (cho, chi, kh, kw)."""
        if self.format.code.real:
            return expand_blocks(self.m, self.vqk.shape[1], self.block_size) * self.vqk.float()
        return self._products().float()

    def weight(self) -> Tensor:
        """Return W', float32 (cho, chi, kh, kw)."""
        return self.cds_w[:, None, None, None] * self.unscaled()

    def _products(self) -> Tensor:
        return expand_blocks(self.m.int(), self.vqk.shape[1], self.block_size) * self.vqk.int()
