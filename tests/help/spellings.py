"""Small networks with what detectors of many families have between their convolutions, and their ONNX files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from dsconvert.onnxfile.source import Source, read_source

SIDE = 16


class Between(nn.Module):
    """Two convolutions with something between them."""

    def __init__(self, function, channels: int = 8, made: int | None = None) -> None:
        super().__init__()
        self.first, self.function = nn.Conv2d(3, channels, 3, padding=1), function
        self.last = nn.Conv2d(made or channels, 4, 1)

    def forward(self, x):
        return self.last(self.function(self.first(x)))


class Shuffle(nn.Module):
    def forward(self, x):
        n, c, h, w = x.shape
        return x.reshape(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Gate(nn.Module):
    """Squeeze and excite, with MobileNetV3's gate."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.up(F.relu(self.down(F.adaptive_avg_pool2d(x, 1)))))


class Heads(nn.Module):
    """Attention over pixels as YOLO11 has it: queries and keys half as wide as values, joined head by head."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x):
        n, c, h, w = x.shape
        q, k, v = x.reshape(n, 2, c // 2, h * w).split([1, 1, 2], 2)
        shares = (self.factor * q.transpose(2, 3) @ k).softmax(3)
        return (v @ shares.transpose(2, 3)).reshape(n, c // 2, h, w)


class Focus(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x):
        apart = (x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2])
        return self.conv(torch.cat(apart, 1))


class Decoded(nn.Module):
    """A head as YOLOv8's: boxes by shares of bins, whose mean is a convolution, and sigmoids beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU())
        self.boxes, self.scores = nn.Conv2d(8, 16, 1), nn.Conv2d(8, 3, 1)
        self.mean = nn.Conv2d(4, 1, 1, bias=False)
        self.mean.weight.data[:] = torch.arange(4.0).view(1, 4, 1, 1)

    def forward(self, x):
        x = self.trunk(x)
        boxes, scores = self.boxes(x).flatten(2), self.scores(x).flatten(2)
        n, _, cells = boxes.shape
        shares = boxes.view(n, 4, 4, cells).transpose(2, 1).softmax(1)
        return torch.cat((self.mean(shares).view(n, 4, cells), scores.sigmoid()), 1)


def source_of(module: nn.Module, folder: Path, shape=(1, 3, SIDE, SIDE)) -> tuple[Source, np.ndarray]:
    torch.manual_seed(0)
    path, x = folder / "net.onnx", torch.rand(shape)
    torch.onnx.export(module.eval(), (x,), str(path), dynamo=False, opset_version=17)
    return read_source(path, None, 1), x.numpy()
