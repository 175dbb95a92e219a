"""The Ghost blocks of YOLOv5 (arXiv 1911.11907), its depthwise convolution and C3SPP, written from the architecture.

A convolution makes half of a Ghost convolution's channels. A cheap depthwise one makes the other half from these.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dsconvert.yolo.modules import C3, SPP, Conv


class DWConv(Conv):
    """A convolution with as many groups as input and output channels allow."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: str = "SiLU") -> None:
        super().__init__(c1, c2, k, s, None, math.gcd(c1, c2), act)


class GhostConv(nn.Module):
    """A convolution to half the channels, and a 5x5 depthwise one from these to the other half."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, g: int = 1, act: str = "SiLU") -> None:
        super().__init__()
        half = c2 // 2
        self.cv1 = Conv(c1, half, k, s, None, g, act)
        self.cv2 = Conv(half, half, 5, 1, None, half, act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv1(x)
        return torch.cat((y, self.cv2(y)), 1)


class GhostBottleneck(nn.Module):
    """Two Ghost convolutions and a residual; with stride 2, a depthwise convolution between them and in the
    residual.
    """

    def __init__(self, c1: int, c2: int, k: int = 3, s: int = 1, act: str = "SiLU") -> None:
        super().__init__()
        hidden = c2 // 2
        small: list[nn.Module] = [nn.Identity(), nn.Identity()]
        if s == 2:
            residual = nn.Sequential(DWConv(c1, c1, k, s, "Identity"), Conv(c1, c2, 1, 1, act="Identity"))
            small = [DWConv(hidden, hidden, k, s, "Identity"), residual]
        self.conv = nn.Sequential(
            GhostConv(c1, hidden, 1, 1, 1, act), small[0], GhostConv(hidden, c2, 1, 1, 1, "Identity")
        )
        self.shortcut = small[1]

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + self.shortcut(x)


class C3Ghost(C3):
    """C3 with GhostBottleneck as its bottlenecks."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU"
    ) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e, act)
        hidden = int(c2 * e)
        self.m = nn.Sequential(*(GhostBottleneck(hidden, hidden, act=act) for _ in range(n)))


class C3SPP(C3):
    """C3 with an SPP instead of its bottlenecks."""

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13), act: str = "SiLU") -> None:
        super().__init__(c1, c2, 0, act=act)
        self.m: nn.Module = SPP(c2 // 2, c2 // 2, k, act)  # type: ignore[assignment]
