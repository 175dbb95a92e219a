"""The attention block of YOLOv5 (C3TR), written from the architecture: tokens are a map's pixels; there is no
LayerNorm.

Every linear layer is a 1x1 convolution of the map. `projections` returns them so, and merges linear layers that follow
each other directly.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsconvert.yolo.modules import C3

HEADS = 4  # YOLOv5 uses no other number
QKV = ("query", "key", "value")


class TransformerLayer(nn.Module):
    """Attention of every token to all tokens, and two linear layers, each with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % HEADS:
            raise ValueError(f"{channels} channels for {HEADS} heads")
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.ma = nn.MultiheadAttention(channels, HEADS)
        self.fc1, self.fc2 = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (pixels, n, channels) to the same shape."""
        x = x + self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0]
        return x + self.fc2(self.fc1(x))

    def projections(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return weight (c, c) and bias (c,) of each of QKV, of `out` behind the attention, and of `fc`.

        QKV and `fc` are each the product of two layers, computed in float64.
        """
        found = {}
        bias = self.ma.in_proj_bias.detach()
        second = self.ma.in_proj_weight.detach().double().chunk(3)
        for name, layer, weight, b in zip(QKV, (self.q, self.k, self.v), second, bias.chunk(3), strict=True):
            first = layer.weight.detach()
            found[name] = (weight @ first.double()).to(first.dtype), b
        out = self.ma.out_proj
        found["out"] = out.weight.detach(), out.bias.detach()
        fc1, fc2 = (fc.weight.detach() for fc in (self.fc1, self.fc2))
        found["fc"] = (fc2.double() @ fc1.double()).to(fc1.dtype), torch.zeros_like(bias.chunk(3)[0])
        return found

    def fused_bounds(self) -> Tensor:
        """Return the largest |number| of each of the `projections`."""
        return torch.stack([torch.cat((w.flatten(), b)).abs().max() for w, b in self.projections().values()])


class TransformerBlock(nn.Module):
    """Attention layers over a map's pixels, behind a linear layer with a residual."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = nn.Sequential(*(TransformerLayer(channels) for _ in range(n)))
        self.conv, self.c2 = None, channels  # attributes that YOLOv5's forward pass reads

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        return self.tr(tokens + self.linear(tokens)).permute(1, 2, 0).reshape(x.shape)


class C3TR(C3):
    """C3 with a TransformerBlock instead of its bottlenecks."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU"
    ) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e, act)
        self.m: nn.Module = TransformerBlock(int(c2 * e), n)  # type: ignore[assignment]
