"""The YOLOv5 building blocks, written from the published architecture (v5.0 to v7.0).

Attributes have the parameter names of checkpoints (`cv1`, `conv`, `bn`, `m`), so that a checkpoint's tensors load by
name.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from dsconvert.graph.ops import space_to_depth

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": nn.ReLU,
    "LeakyReLU": nn.LeakyReLU,
    "Hardswish": nn.Hardswish,
}
LEAKY_SLOPE = 0.1
BN_EPS, BN_MOMENTUM = 1e-3, 0.03  # YOLOv5 sets these on every BatchNorm when it builds a model


def make_activation(name: str) -> nn.Module:
    """Return an activation by class name, `Identity` for none; YOLOv5's LeakyReLU has slope 0.1."""
    if name == "Identity":
        return nn.Identity()
    return nn.LeakyReLU(LEAKY_SLOPE) if name == "LeakyReLU" else ACTIVATIONS[name]()


def norm(channels: int) -> nn.BatchNorm2d:
    """Return a BatchNorm with the settings of YOLOv5 and YOLOv7."""
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Return a BatchNorm's factor gamma / sigma and offset beta - mean * gamma / sigma at inference, float64 (c,)."""
    assert bn.running_mean is not None
    assert bn.running_var is not None
    gain = bn.weight.detach().double() / torch.sqrt(bn.running_var.double() + bn.eps)
    return gain, bn.bias.detach().double() - bn.running_mean.double() * gain


class Conv(nn.Module):
    """Convolution, BatchNorm, activation. `fuse()` folds the BatchNorm into the convolution."""

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: str = "SiLU"
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2 if p is None else p, groups=g, bias=False)
        self.bn: nn.Module = norm(c2)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuse(self) -> None:
        """Fold BatchNorm: W' = W * gamma / sigma, b' = beta - mean * gamma / sigma, computed in float64."""
        if not isinstance(self.bn, nn.BatchNorm2d):
            return
        conv = self.conv
        fused = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding,  # type: ignore[arg-type]
            conv.dilation, conv.groups, bias=True, device=conv.weight.device,  # type: ignore[arg-type]
        )  # fmt: skip
        assert fused.bias is not None
        if conv.weight.is_meta:  # only the structure is needed, see `lower.check_maps`
            self.conv, self.bn = fused, nn.Identity()
            return
        gain, bias = self._folded()
        fused.weight.data = (conv.weight.detach().double() * gain[:, None, None, None]).to(conv.weight.dtype)
        fused.bias.data = bias.to(conv.weight.dtype)
        self.conv, self.bn = fused, nn.Identity()

    def _folded(self) -> tuple[Tensor, Tensor]:
        """Return gamma / sigma and beta - mean * gamma / sigma, float64 (c2,)."""
        assert isinstance(self.bn, nn.BatchNorm2d)
        return affine(self.bn)

    def fused_bounds(self) -> Tensor:
        """Return the largest |weight| of every output channel and its bias, (2, c2), as `fuse` would make them."""
        largest = self.conv.weight.detach().abs().amax((1, 2, 3))
        if not isinstance(self.bn, nn.BatchNorm2d):
            return torch.stack((largest, largest))
        gain, bias = self._folded()
        return torch.stack((largest * gain, bias)).to(largest.dtype)


class Bottleneck(nn.Module):
    """A 1x1 and a 3x3 convolution, with an optional residual."""

    def __init__(self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU"):
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1, act=act)
        self.cv2 = Conv(hidden, c2, 3, 1, g=g, act=act)
        self.add = shortcut and c1 == c2

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv2(self.cv1(x))
        return x + y if self.add else y


class C3(nn.Module):
    """Cross-stage partial block: two 1x1 branches, one through n bottlenecks, joined by a third 1x1."""

    def __init__(
        self,
        c1: int,
        c2: int,
        n: int = 1,
        shortcut: bool = True,
        g: int = 1,
        e: float = 0.5,
        act: str = "SiLU",
    ) -> None:
        super().__init__()
        hidden = int(c2 * e)
        self.cv1 = Conv(c1, hidden, 1, 1, act=act)
        self.cv2 = Conv(c1, hidden, 1, 1, act=act)
        self.cv3 = Conv(2 * hidden, c2, 1, act=act)
        self.m = nn.Sequential(*(Bottleneck(hidden, hidden, shortcut, g, 1.0, act) for _ in range(n)))

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class SPP(nn.Module):
    """Parallel max-pools of several sizes between two 1x1 convolutions (v5.0)."""

    def __init__(self, c1: int, c2: int, k: tuple[int, ...] = (5, 9, 13), act: str = "SiLU") -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1, act=act)
        self.cv2 = Conv(hidden * (len(k) + 1), c2, 1, 1, act=act)
        self.m = nn.ModuleList(nn.MaxPool2d(size, 1, size // 2) for size in k)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        return self.cv2(torch.cat([x, *(pool(x) for pool in self.m)], 1))


class SPPF(nn.Module):
    """One max-pool applied three times in a row; equal to SPP(5, 9, 13) and cheaper (v6.0 on)."""

    def __init__(self, c1: int, c2: int, k: int = 5, act: str = "SiLU") -> None:
        super().__init__()
        hidden = c1 // 2
        self.cv1 = Conv(c1, hidden, 1, 1, act=act)
        self.cv2 = Conv(hidden * 4, c2, 1, 1, act=act)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.cv1(x)
        y1 = self.m(x)
        y2 = self.m(y1)
        return self.cv2(torch.cat((x, y1, y2, self.m(y2)), 1))


class Focus(nn.Module):
    """Space-to-depth by 2, then a convolution (the v5.0 stem)."""

    def __init__(self, c1: int, c2: int, k: int = 1, s: int = 1, act: str = "SiLU") -> None:
        super().__init__()
        self.conv = Conv(c1 * 4, c2, k, s, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(space_to_depth(x))


class Concat(nn.Module):
    """Concatenates a list of tensors along the channels."""

    def forward(self, xs: list[Tensor]) -> Tensor:
        return torch.cat(xs, 1)


class Detect(nn.Module):
    """The three 1x1 output convolutions.

    `anchors` (nl, na, 2) are in units of each level's stride. `nm` is how many numbers follow a box's classes (see
    `segment`).
    """

    anchors: Tensor

    def __init__(self, nc: int, channels: list[int], na: int, nm: int = 0) -> None:
        super().__init__()
        self.nc, self.na, self.nm = nc, na, nm
        self.register_buffer("anchors", torch.zeros(len(channels), na, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, na * (5 + nc + nm), 1) for c in channels)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Return raw maps, one (n, na * (nc + 5), h, w) a level; `decode` turns them into boxes."""
        return [conv(x) for conv, x in zip(self.m, xs, strict=True)]
