"""The published blocks (DSConv2D, Bottleneck_DSConv2D, DSConv2D_C3) around the DSConv that trains.

`from_...` build them from existing blocks of any class with the attributes of YOLOv5's own. They do not inherit from
YOLOv5's classes. So a tree's `fuse()`, which would fold BatchNorm into the float weight and forget the integers, leaves
them alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.torch.conv import DSConv
from dsconvert.yolo.modules import BN_EPS, BN_MOMENTUM, Conv


class DSConv2D(nn.Module):
    """DSConv, BatchNorm and activation (act: True for SiLU, or a module; anything else for none)."""

    def __init__(
        self, inc: int, ouc: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, d: int = 1,
        act: bool | nn.Module = True, **shifts: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.conv = DSConv(inc, ouc, k, s, p, d, g, **shifts)
        self.bn = nn.BatchNorm2d(ouc, eps=BN_EPS, momentum=BN_MOMENTUM)
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else nn.Identity()

    @classmethod
    def from_conv(cls, conv: Any, **shifts: Any) -> DSConv2D:
        """Build from a module with conv, bn and act."""
        made = _empty(cls)
        made.conv, made.bn, made.act = DSConv.from_float(conv.conv, **shifts), conv.bn, conv.act
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))


class Bottleneck_DSConv2D(nn.Module):
    """A 1x1 and a 3x3 DSConv2D, with an optional residual."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5, **shifts: Any) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = DSConv2D(c1, hidden, 1, 1, **shifts)
        self.cv2 = DSConv2D(hidden, c2, 3, 1, g=g, **shifts)
        self.add = shortcut and c1 == c2

    @classmethod
    def from_bottleneck(cls, block: Any, **shifts: Any) -> Bottleneck_DSConv2D:
        """Build from a module with cv1, cv2 and add."""
        made = _empty(cls)
        made.cv1, made.cv2 = (DSConv2D.from_conv(conv, **shifts) for conv in (block.cv1, block.cv2))
        made.add = block.add
        return made

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class DSConv2D_C3(nn.Module):
    """C3 with n Bottleneck_DSConv2D; cv1, cv2 and cv3 stay ordinary convolutions."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, **shifts: Any
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1, self.cv2, self.cv3 = Conv(c1, hidden), Conv(c1, hidden), Conv(2 * hidden, c2)
        self.m = nn.Sequential(*(Bottleneck_DSConv2D(hidden, hidden, shortcut, g, 1.0, **shifts) for _ in range(n)))

    @classmethod
    def from_c3(cls, block: Any, **shifts: Any) -> DSConv2D_C3:
        """Build from a module with cv1, cv2, cv3 and m; the first three are taken over as they are."""
        made = _empty(cls)
        made.cv1, made.cv2, made.cv3 = block.cv1, block.cv2, block.cv3
        made.m = nn.Sequential(*(Bottleneck_DSConv2D.from_bottleneck(b, **shifts) for b in block.m))
        return made

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


def _empty(cls: Any) -> Any:
    """Return a module without its parts."""
    made = cls.__new__(cls)
    nn.Module.__init__(made)
    return made
