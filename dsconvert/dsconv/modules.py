"""DSConv as a torch module, with the names of the published constructor and buffers.

The published PyTorch class convolves its float weight and never applies alpha. This module applies the whole equation,
so it computes what its integers stand for.
"""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsconvert.dsconv.tensor import DSTensor, block_count, expand_blocks


class DSConv(nn.Module):
    """Computes out = conv(x, CDSw * (alpha * intweight + KDSb)) + CDSb (arXiv 1901.01928, section 3).

    intweight: VQK, int8 (cho, chi / groups, kh, kw).
    alpha, KDSb: float (cho, nblk, kh, kw); KDSb exists with KDSBias=True. alpha holds real numbers (the paper) or
        integers m.
    CDSw, CDSb: float (cho,); both exist with CDS=True.
    bias: the ordinary bias of a convolution.
    bits: of each integer in intweight.

    Raises ValueError for groups that do not divide the channels, and for an unknown padding_mode.
    """

    intweight: Tensor
    alpha: Tensor
    KDSb: Tensor | None
    CDSw: Tensor | None
    CDSb: Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | None = None,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        bias: bool = False,
        block_size: int = 32,
        KDSBias: bool = False,
        CDS: bool = False,
        bits: int = 4,
    ) -> None:
        super().__init__()
        if in_channels % groups or out_channels % groups:
            raise ValueError(f"groups={groups} must divide {in_channels} and {out_channels}")
        if padding_mode not in ("zeros", "reflect", "replicate", "circular"):
            raise ValueError(f"padding_mode {padding_mode!r} is unknown")
        self.in_channels, self.out_channels, self.groups = in_channels, out_channels, groups
        self.kernel_size, self.stride, self.dilation = _pair(kernel_size), _pair(stride), _pair(dilation)
        same = tuple(d * (k - 1) // 2 for k, d in zip(self.kernel_size, self.dilation, strict=True))
        self.padding = _pair(same if padding is None else padding)
        self.padding_mode, self.block_size, self.bits = padding_mode, block_size, bits
        chi = in_channels // groups
        blocks = (out_channels, block_count(chi, block_size), *self.kernel_size)
        self.register_buffer("intweight", torch.zeros(out_channels, chi, *self.kernel_size, dtype=torch.int8))
        self.register_buffer("alpha", torch.ones(blocks))
        self.register_buffer("KDSb", torch.zeros(blocks) if KDSBias else None)
        self.register_buffer("CDSw", torch.ones(out_channels) if CDS else None)
        self.register_buffer("CDSb", torch.zeros(out_channels) if CDS else None)
        self.bias = nn.Parameter(torch.zeros(out_channels)) if bias else None
        self._begin()

    def _begin(self) -> None:
        """Hook for subclasses: add parameters at the end of the constructor."""

    @classmethod
    def in_place_of(cls, conv: nn.Conv2d, bias: bool, block_size: int, KDSBias: bool, CDS: bool, bits: int) -> Self:
        """Create a module with the geometry of a convolution."""
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,  # type: ignore[arg-type]
            conv.groups, conv.padding_mode, bias, block_size, KDSBias, CDS, bits,
        )  # fmt: skip

    def real_weight(self) -> Tensor:
        """Return W' of the class's equation, in alpha's dtype."""
        chi = self.intweight.shape[1]
        w = expand_blocks(self.alpha, chi, self.block_size) * self.intweight.to(self.alpha.dtype)
        if self.KDSb is not None:
            w = w + expand_blocks(self.KDSb, chi, self.block_size)
        return w if self.CDSw is None else self.CDSw[:, None, None, None] * w

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (n, chi, h, w) to (n, cho, h', w')."""
        padding = self.padding
        if self.padding_mode != "zeros":
            x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]), mode=self.padding_mode)
            padding = (0, 0)
        out = F.conv2d(x, self.real_weight(), self.bias, self.stride, padding, self.dilation, self.groups)
        return out if self.CDSb is None else out + self.CDSb[:, None, None]


def fitted_conv(conv: nn.Conv2d, weight: DSTensor, cds_b: Tensor) -> DSConv:
    """Return a DSConv that replaces `conv`, with a fitted weight and output bias CDSb (cho,)."""
    module = DSConv.in_place_of(conv, False, weight.block_size, False, True, weight.bits)
    parts = {"intweight": weight.vqk, "alpha": weight.m.float(), "CDSw": weight.cds_w, "CDSb": cds_b}
    module.load_state_dict(parts)
    return module


def _pair(value: int | tuple[int, ...]) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])
