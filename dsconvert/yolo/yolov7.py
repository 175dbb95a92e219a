"""The layers that only YOLOv7 has (arXiv 2207.02696), written from the architecture.

Attributes have the parameter names of its checkpoints. `fuse()` turns parts that only training needs into one
convolution: the branches of RepConv, and the implicit knowledge (YOLOR, arXiv 2105.04206) of IDetect.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsconvert.yolo.modules import Conv, Detect, affine, make_activation, norm


class MP(nn.Module):
    """Max-pool over k by k pixels with stride k."""

    def __init__(self, k: int = 2) -> None:
        super().__init__()
        self.m = nn.MaxPool2d(k, k)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class SP(nn.Module):
    """Max-pool over k by k pixels that keeps the size (stride 1)."""

    def __init__(self, k: int = 3, s: int = 1) -> None:
        super().__init__()
        self.m = nn.MaxPool2d(k, s, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.m(x)


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling in one of two branches: cv1, cv3, cv4, pools, cv5, cv6 beside cv2, joined by cv7."""

    def __init__(self, c1: int, c2: int, act: str = "SiLU") -> None:
        super().__init__()
        self.cv1 = Conv(c1, c2, act=act)
        self.cv2 = Conv(c1, c2, act=act)
        self.cv3 = Conv(c2, c2, 3, act=act)
        self.cv4 = Conv(c2, c2, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(k, 1, k // 2) for k in (5, 9, 13))
        self.cv5 = Conv(4 * c2, c2, act=act)
        self.cv6 = Conv(c2, c2, 3, act=act)
        self.cv7 = Conv(2 * c2, c2, act=act)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv4(self.cv3(self.cv1(x)))
        pooled = torch.cat([y, *(pool(y) for pool in self.m)], 1)
        return self.cv7(torch.cat((self.cv6(self.cv5(pooled)), self.cv2(x)), 1))


class RepConv(nn.Module):
    """3x3 and 1x1 convolutions and, where shapes allow, the input itself, each with its BatchNorm, added and activated.

    `fuse()` merges them into one 3x3 convolution, `rbr_reparam` (RepVGG, arXiv 2101.03697).
    """

    def __init__(
        self, c1: int, c2: int, k: int = 3, s: int = 1, p: int | None = None, g: int = 1, act: str = "SiLU"
    ) -> None:
        super().__init__()
        if k != 3 or p not in (None, 1):
            raise ValueError("RepConv is a 3x3 convolution padded by 1")
        self.act = make_activation(act)
        self.rbr_identity = norm(c1) if c1 == c2 and s == 1 else None
        self.rbr_dense = nn.Sequential(nn.Conv2d(c1, c2, 3, s, 1, groups=g, bias=False), norm(c2))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(c1, c2, 1, s, 0, groups=g, bias=False), norm(c2))
        self.rbr_reparam: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.rbr_reparam is not None:
            return self.act(self.rbr_reparam(x))
        y = self.rbr_dense(x) + self.rbr_1x1(x)
        return self.act(y if self.rbr_identity is None else y + self.rbr_identity(x))

    def fuse(self) -> None:
        """Merge the branches: W' = gain3 W3 + (gain1 W1 + gain0 I at the centre), b' their sum, computed in float64."""
        if self.rbr_reparam is not None:
            return
        dense = self.rbr_dense[0]
        assert isinstance(dense, nn.Conv2d)
        fused = nn.Conv2d(
            dense.in_channels, dense.out_channels, 3, dense.stride, 1, groups=dense.groups,  # type: ignore[arg-type]
            device=dense.weight.device,
        )  # fmt: skip
        assert fused.bias is not None
        if not dense.weight.is_meta:
            weight, bias = self._merged()
            fused.weight.data, fused.bias.data = weight.to(dense.weight.dtype), bias.to(dense.weight.dtype)
        del self.rbr_dense, self.rbr_1x1, self.rbr_identity
        self.rbr_reparam = fused

    def _merged(self) -> tuple[Tensor, Tensor]:
        """Return weight (c2, c1 / groups, 3, 3) and bias (c2,), float64."""
        (dense, dense_bn), (point, point_bn) = self.rbr_dense, self.rbr_1x1
        assert isinstance(dense_bn, nn.BatchNorm2d)
        assert isinstance(point_bn, nn.BatchNorm2d)
        (gain, bias), (point_gain, point_bias) = affine(dense_bn), affine(point_bn)
        weight = dense.weight.detach().double() * gain[:, None, None, None]  # type: ignore[operator]
        weight += F.pad(point.weight.detach().double() * point_gain[:, None, None, None], [1] * 4)  # type: ignore[operator]
        bias = bias + point_bias
        if self.rbr_identity is not None:
            straight, offset = affine(self.rbr_identity)
            channels = torch.arange(len(straight))
            weight[channels, channels % weight.shape[1], 1, 1] += straight
            bias = bias + offset
        return weight, bias

    def fused_bounds(self) -> Tensor:
        """Return the largest |weight| of every output channel and its bias, (2, c2), as `fuse` would make them."""
        if self.rbr_reparam is not None:
            weight, bias = self.rbr_reparam.weight.detach(), self.rbr_reparam.bias
            assert bias is not None
        else:
            weight, bias = self._merged()
        return torch.stack((weight.abs().amax((1, 2, 3)), bias)).float()


class Implicit(nn.Module):
    """One learned number for each channel, (1, channels, 1, 1)."""

    def __init__(self, channels: int, value: float) -> None:
        super().__init__()
        self.implicit = nn.Parameter(torch.full((1, channels, 1, 1), value))


class ImplicitA(Implicit):
    """Numbers that are added."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 0.0)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.implicit


class ImplicitM(Implicit):
    """Numbers to multiply by."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, 1.0)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.implicit


class IDetect(Detect):
    """Detect with an ImplicitA before and an ImplicitM behind each convolution; `fuse()` folds them in."""

    def __init__(self, nc: int, channels: list[int], na: int) -> None:
        super().__init__(nc, channels, na)
        self.ia = nn.ModuleList(ImplicitA(c) for c in channels)
        self.im = nn.ModuleList(ImplicitM(na * (nc + 5)) for _ in channels)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Return raw maps, as Detect does."""
        if not len(self.ia):
            return super().forward(xs)
        return [im(conv(ia(x))) for ia, conv, im, x in zip(self.ia, self.m, self.im, xs, strict=True)]

    def fuse(self) -> None:
        """Fold the implicit layers: im * (W (x + ia) + b) = (im W) x + im (b + W ia), computed in float64."""
        known = not any(p.is_meta for p in self.parameters())  # otherwise only the structure is needed
        for conv, (weight, bias) in zip(self.m, self._merged() if known else [], strict=False):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            conv.weight.data, conv.bias.data = weight.to(conv.weight.dtype), bias.to(conv.weight.dtype)
        self.ia, self.im = nn.ModuleList(), nn.ModuleList()

    def _merged(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias of every convolution, float64; nothing if they are merged already."""
        found = []
        for ia, conv, im in zip(self.ia, self.m, self.im, strict=False):
            assert isinstance(conv, nn.Conv2d)
            assert conv.bias is not None
            weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
            added, factor = (m.implicit.detach().double().flatten() for m in (ia, im))  # type: ignore[operator]
            bias = bias + weight[:, :, 0, 0] @ added
            found.append((weight * factor[:, None, None, None], bias * factor))
        return found

    def fused_bounds(self) -> Tensor:
        """Return the largest |weight| of every output channel and its bias, (2, channels), as `fuse` would make
        them.
        """
        if not len(self.ia):
            return torch.zeros(2, 0)
        parts = [torch.stack((weight.abs().amax((1, 2, 3)), bias)) for weight, bias in self._merged()]
        return torch.cat(parts, 1).float()
