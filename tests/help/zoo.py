"""The DSConv paper's classification networks, written from their published definitions; `width` scales every layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def conv_bn(c1: int, c2: int, k: int, s: int = 1, g: int = 1, act: type[nn.Module] | None = nn.ReLU) -> nn.Sequential:
    parts = [nn.Conv2d(c1, c2, k, s, k // 2, groups=g, bias=False), nn.BatchNorm2d(c2)]
    return nn.Sequential(*parts, *([act()] if act else []))


class Residual(nn.Module):
    """x + body(x), x projected where the shapes differ; ReLU behind where `act`."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, act: bool) -> None:
        super().__init__()
        self.body, self.shortcut, self.act = body, shortcut, nn.ReLU() if act else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.body(x) + self.shortcut(x))


def _resnet(deep: bool, depths: tuple[int, ...], width: float, classes: int) -> nn.Sequential:
    stem = int(64 * width)
    layers: list[nn.Module] = [conv_bn(3, stem, 7, 2), nn.MaxPool2d(3, 2, 1)]
    c1 = stem
    for stage, depth in enumerate(depths):
        inner = int(64 * width) << stage
        c2 = inner * 4 if deep else inner
        for i in range(depth):
            s = 2 if stage and i == 0 else 1
            if deep:
                body = nn.Sequential(
                    conv_bn(c1, inner, 1), conv_bn(inner, inner, 3, s), conv_bn(inner, c2, 1, act=None)
                )
            else:
                body = nn.Sequential(conv_bn(c1, c2, 3, s), conv_bn(c2, c2, 3, act=None))
            same = s == 1 and c1 == c2
            layers.append(Residual(body, nn.Identity() if same else conv_bn(c1, c2, 1, s, act=None), True))
            c1 = c2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c1, classes))


def resnet34(width: float = 1, classes: int = 1000) -> nn.Sequential:
    """arXiv 1512.03385."""
    return _resnet(False, (3, 4, 6, 3), width, classes)


def resnet50(width: float = 1, classes: int = 1000) -> nn.Sequential:
    """arXiv 1512.03385."""
    return _resnet(True, (3, 4, 6, 3), width, classes)


def alexnet(width: float = 1, classes: int = 1000) -> nn.Sequential:
    """The one-column form, arXiv 1404.5997."""
    a, b, c, d, e = (int(n * width) for n in (64, 192, 384, 256, 4096))
    return nn.Sequential(
        nn.Conv2d(3, a, 11, 4, 2), nn.ReLU(), nn.MaxPool2d(3, 2), nn.Conv2d(a, b, 5, padding=2), nn.ReLU(),
        nn.MaxPool2d(3, 2), nn.Conv2d(b, c, 3, padding=1), nn.ReLU(), nn.Conv2d(c, d, 3, padding=1), nn.ReLU(),
        nn.Conv2d(d, d, 3, padding=1), nn.ReLU(), nn.MaxPool2d(3, 2), Pooled(6), nn.Flatten(),
        nn.Dropout(), nn.Linear(d * 36, e), nn.ReLU(), nn.Dropout(), nn.Linear(e, e), nn.ReLU(), nn.Linear(e, classes),
    )  # fmt: skip


class Pooled(nn.Module):
    """To a fixed side: by repeating, as the small images of the tests end smaller than ImageNet's."""

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.interpolate(x, size=(self.side, self.side))


def mobilenet_v1(width: float = 1, classes: int = 1000) -> nn.Sequential:
    """arXiv 1704.04861."""
    rows = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
    c1 = int(32 * width)
    layers: list[nn.Module] = [conv_bn(3, c1, 3, 2)]
    for channels, s in rows:
        c2 = int(channels * width)
        layers += [conv_bn(c1, c1, 3, s, c1), conv_bn(c1, c2, 1)]
        c1 = c2
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c1, classes))


def mobilenet_v2(width: float = 1, classes: int = 1000) -> nn.Sequential:
    """arXiv 1801.04381."""
    rows = [(1, 16, 1, 1), (6, 24, 2, 2), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1)]
    c1 = int(32 * width)
    layers: list[nn.Module] = [conv_bn(3, c1, 3, 2, act=nn.ReLU6)]
    for grow, channels, count, stride in rows:
        for i in range(count):
            c2, s, inner = int(channels * width), stride if i == 0 else 1, c1 * grow
            wide = [conv_bn(c1, inner, 1, act=nn.ReLU6)] if grow > 1 else []
            body = nn.Sequential(*wide, conv_bn(inner, inner, 3, s, inner, nn.ReLU6), conv_bn(inner, c2, 1, act=None))
            layers.append(Residual(body, nn.Identity(), False) if s == 1 and c1 == c2 else body)
            c1 = c2
    last = int(1280 * width)
    layers += [conv_bn(c1, last, 1, act=nn.ReLU6), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.2), nn.Linear(last, classes))
