"""The attention block of YOLOv5 (C3TR), written from the architecture: tokens are a map's pixels, and no LayerNorm.

Every linear layer is a 1x1 convolution of the map, so `projections` gives them as such: those that follow each other
with nothing between them as one.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsconvert.yolo.modules import C3

HEADS = 4  # YOLOv5 has no other number
QKV = ("query", "key", "value")


class TransformerLayer(nn.Module):
    """Attention of every token to all of them, and two linear layers, each with a residual."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        if channels % HEADS:
            raise ValueError(f"{channels} channels for {HEADS} heads")
        self.q, self.k, self.v = (nn.Linear(channels, channels, bias=False) for _ in range(3))
        self.ma = nn.MultiheadAttention(channels, HEADS)
        self.fc1, self.fc2 = (nn.Linear(channels, channels, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (pixels, n, channels) -> the same shape."""
        x = x + self.ma(self.q(x), self.k(x), self.v(x), need_weights=False)[0]
        return x + self.fc2(self.fc1(x))

    def projections(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Weight (c, c) and bias (c,) of those of QKV, each the product of two layers; of `out` behind the attention;
        and of `fc`, again a product. Products are made in float64."""
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
        """The largest |number| of each of the `projections`."""
        return torch.stack([torch.cat((w.flatten(), b)).abs().max() for w, b in self.projections().values()])


class TransformerBlock(nn.Module):
    """Layers of attention over a map's pixels, which a linear layer gives a place first."""

    def __init__(self, channels: int, n: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, channels)
        self.tr = nn.Sequential(*(TransformerLayer(channels) for _ in range(n)))
        self.conv, self.c2 = None, channels  # what YOLOv5's forward pass asks for

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).permute(2, 0, 1)
        return self.tr(tokens + self.linear(tokens)).permute(1, 2, 0).reshape(x.shape)


class C3TR(C3):
    """C3 with a TransformerBlock in place of its bottlenecks."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU"
    ) -> None:
        super().__init__(c1, c2, 0, shortcut, g, e, act)
        self.m: nn.Module = TransformerBlock(int(c2 * e), n)  # type: ignore[assignment]
