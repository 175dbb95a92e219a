"""Small stand-ins for the YOLOv5 and YOLOv7 trees, written for these tests from the published architectures: blocks of
their own, apart from dsconvert's, whose checkpoints carry the published class names.

What counts: a layer's parameters have the published names; `parse_model` evaluates module names and arguments of the
rows; the model keeps its yaml, whose activations stay text; RepConv and IDetect are stored as they are trained."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import torch
from importable import importable

COMMON = """
import math
import torch
from torch import nn

def half_of(k):
    return k // 2

class Conv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1, p=None, g=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, half_of(k) if p is None else p, groups=g, bias=False)
        self.bn = nn.BatchNorm2d(c2)
        self.act = nn.SiLU() if act is True else act if isinstance(act, nn.Module) else nn.Identity()
    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

class DWConv(Conv):
    def __init__(self, c1, c2, k=1, s=1, act=True):
        super().__init__(c1, c2, k, s, None, math.gcd(c1, c2), act)

class Bottleneck(nn.Module):
    def __init__(self, c1, c2, shortcut, e=1.0):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, int(c2 * e)), Conv(int(c2 * e), c2, 3)
        self.add = shortcut
    def forward(self, x):
        y = self.cv2(self.cv1(x))
        return y + x if self.add else y

class GhostConv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1, g=1, act=True):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c2 // 2, k, s, None, g, act), Conv(c2 // 2, c2 // 2, 5, g=c2 // 2, act=act)
    def forward(self, x):
        first = self.cv1(x)
        return torch.cat([first, self.cv2(first)], dim=1)

class GhostBottleneck(nn.Module):
    def __init__(self, c1, c2, k=3, s=1):
        super().__init__()
        wide = s == 2
        self.conv = nn.Sequential(
            GhostConv(c1, c2 // 2), DWConv(c2 // 2, c2 // 2, k, s, False) if wide else nn.Identity(),
            GhostConv(c2 // 2, c2, act=False))
        self.shortcut = nn.Sequential(
            DWConv(c1, c1, k, s, False), Conv(c1, c2, act=False)) if wide else nn.Identity()
    def forward(self, x):
        return self.shortcut(x) + self.conv(x)

class SPP(nn.Module):
    def __init__(self, c1, c2, k=(5, 9, 13)):
        super().__init__()
        self.cv1, self.cv2 = Conv(c1, c1 // 2), Conv(c1 // 2 * (1 + len(k)), c2)
        self.m = nn.ModuleList([nn.MaxPool2d(n, 1, half_of(n)) for n in k])
    def forward(self, x):
        x = self.cv1(x)
        return self.cv2(torch.cat([x] + [pool(x) for pool in self.m], 1))

class SPPF(SPP):
    def __init__(self, c1, c2, k=5):
        super().__init__(c1, c2)
        self.m = nn.MaxPool2d(k, 1, half_of(k))
    def forward(self, x):
        found = [self.cv1(x)]
        for _ in range(3):
            found.append(self.m(found[-1]))
        return self.cv2(torch.cat(found, 1))

class C3(nn.Module):
    def __init__(self, c1, c2, n=1, shortcut=True):
        super().__init__()
        self.cv1, self.cv2, self.cv3 = Conv(c1, c2 // 2), Conv(c1, c2 // 2), Conv(c2, c2)
        self.m = self.inner(c2 // 2, n, shortcut)
    def inner(self, c, n, shortcut):
        return nn.Sequential(*[Bottleneck(c, c, shortcut) for _ in range(n)])
    def forward(self, x):
        return self.cv3(torch.cat([self.m(self.cv1(x)), self.cv2(x)], 1))

class C3Ghost(C3):
    def inner(self, c, n, shortcut):
        return nn.Sequential(*[GhostBottleneck(c, c) for _ in range(n)])

class C3SPP(C3):
    def __init__(self, c1, c2, k=(5, 9, 13)):
        super().__init__(c1, c2)
        self.m = SPP(c2 // 2, c2 // 2, k)

class TransformerLayer(nn.Module):
    def __init__(self, c, num_heads):
        super().__init__()
        for name in ("q", "k", "v", "fc1", "fc2"):
            setattr(self, name, nn.Linear(c, c, bias=False))
        self.ma = nn.MultiheadAttention(embed_dim=c, num_heads=num_heads)
    def forward(self, tokens):
        seen, _ = self.ma(self.q(tokens), self.k(tokens), self.v(tokens))
        tokens = seen + tokens
        return tokens + self.fc2(self.fc1(tokens))

class TransformerBlock(nn.Module):
    def __init__(self, c, num_heads, n):
        super().__init__()
        self.conv, self.c2 = None, c
        self.linear = nn.Linear(c, c)
        self.tr = nn.Sequential(*[TransformerLayer(c, num_heads) for _ in range(n)])
    def forward(self, x):
        n, c, high, wide = x.shape
        tokens = x.reshape(n, c, high * wide).permute(2, 0, 1)
        made = self.tr(self.linear(tokens) + tokens)
        return made.permute(1, 2, 0).reshape(n, c, high, wide)

class C3TR(C3):
    def inner(self, c, n, shortcut):
        return TransformerBlock(c, 4, n)

class CBAM(nn.Module):
    pass

class Concat(nn.Module):
    def __init__(self, dimension=1):
        super().__init__()
        self.d = dimension
    def forward(self, xs):
        return torch.cat(xs, self.d)

class MP(nn.Module):
    def __init__(self, k=2):
        super().__init__()
        self.m = nn.MaxPool2d(kernel_size=k, stride=k)
    def forward(self, x):
        return self.m(x)

class SP(MP):
    def __init__(self, k=3, s=1):
        super().__init__()
        self.m = nn.MaxPool2d(k, s, half_of(k))

class SPPCSPC(nn.Module):
    def __init__(self, c1, c2, n=1):
        super().__init__()
        shapes = [(c1, c2, 1), (c1, c2, 1), (c2, c2, 3), (c2, c2, 1), (4 * c2, c2, 1), (c2, c2, 3), (2 * c2, c2, 1)]
        for number, (a, b, k) in enumerate(shapes, 1):
            setattr(self, f"cv{number}", Conv(a, b, k))
        self.m = nn.ModuleList([nn.MaxPool2d(n, 1, half_of(n)) for n in (5, 9, 13)])
    def forward(self, x):
        deep = self.cv4(self.cv3(self.cv1(x)))
        deep = self.cv6(self.cv5(torch.cat([deep] + [pool(deep) for pool in self.m], 1)))
        return self.cv7(torch.cat([deep, self.cv2(x)], 1))

class RepConv(nn.Module):
    def __init__(self, c1, c2, k=3, s=1):
        super().__init__()
        self.act = nn.SiLU()
        self.rbr_identity = nn.BatchNorm2d(c1) if c1 == c2 and s == 1 else None
        self.rbr_dense = nn.Sequential(nn.Conv2d(c1, c2, k, s, 1, bias=False), nn.BatchNorm2d(c2))
        self.rbr_1x1 = nn.Sequential(nn.Conv2d(c1, c2, 1, s, bias=False), nn.BatchNorm2d(c2))
    def forward(self, x):
        total = self.rbr_1x1(x) + self.rbr_dense(x)
        return self.act(total if self.rbr_identity is None else total + self.rbr_identity(x))

class ImplicitA(nn.Module):
    def __init__(self, channel):
        super().__init__()
        self.channel = channel
        self.implicit = nn.Parameter(torch.zeros(1, channel, 1, 1))
    def forward(self, x):
        return self.implicit + x

class ImplicitM(ImplicitA):
    def forward(self, x):
        return self.implicit * x
"""

YOLO = """
import copy, math
import torch
from torch import nn
from models.common import *

class Detect(nn.Module):
    def __init__(self, nc, anchors, ch):
        super().__init__()
        self.nc, self.no, self.na, self.nl = nc, nc + 5, len(anchors[0]) // 2, len(anchors)
        sizes = torch.tensor(anchors).float().view(self.nl, -1, 2)
        self.register_buffer("anchors", sizes)
        self.register_buffer("anchor_grid", sizes.clone().view(self.nl, 1, -1, 1, 1, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, self.na * self.no, 1) for c in ch)
    def forward(self, xs):
        return [conv(x) for conv, x in zip(self.m, xs)]

class IDetect(Detect):
    def __init__(self, nc, anchors, ch):
        super().__init__(nc, anchors, ch)
        self.ia = nn.ModuleList(ImplicitA(c) for c in ch)
        self.im = nn.ModuleList(ImplicitM(self.no * self.na) for _ in ch)
    def forward(self, xs):
        return [self.im[i](self.m[i](self.ia[i](x))) for i, x in enumerate(xs)]

class Model(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.yaml = cfg
        layers, ch, self.save = [], [], set()
        for index, (source, n, name, args) in enumerate(cfg["backbone"] + cfg["head"]):
            kind = eval(name)
            words = {"nc": cfg["nc"], "anchors": cfg["anchors"], "nearest": "nearest"}
            args = [(words[a] if a in words else eval(a)) if isinstance(a, str) else a for a in copy.deepcopy(args)]
            n = max(round(n * cfg["depth_multiple"]), 1) if n > 1 else n
            inputs = [ch[s] if ch else 3 for s in (source if isinstance(source, list) else [source])]
            if kind in (Detect, IDetect):
                out, args = 0, [*args, inputs]
            elif kind is Concat:
                out = sum(inputs)
            elif kind in (MP, SP, nn.Upsample):
                out = inputs[0]
            else:
                out = math.ceil(args[0] * cfg["width_multiple"] / 8) * 8
                args = [inputs[0], out, *args[1:]]
                if kind in (C3, C3Ghost, C3TR):
                    args, n = [*args[:2], n, *args[2:]], 1
            layer = nn.Sequential(*[kind(*args if i == 0 else [out, *args[1:]]) for i in range(n)])
            layer = layer[0] if n == 1 else layer
            layer.i, layer.f, layer.type = index, source, f"{kind.__module__}.{kind.__name__}"
            layers.append(layer)
            ch.append(out)
        self.model = nn.Sequential(*layers)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eps, module.momentum = 1e-3, 0.03
    def forward(self, x):
        made = []
        for layer in self.model:
            many = isinstance(layer.f, list)
            given = [(made[s] if made else x) for s in (layer.f if many else [layer.f])]
            made.append(layer(given if many else given[0]))
        return made[-1]

class DetectionModel(Model):
    pass
"""


def trained(
    config: dict[str, Any], strides: list[int], prepare: Callable[[Any], None], *, old: bool = False
) -> tuple[bytes, Callable[[torch.Tensor], list[torch.Tensor]]]:
    """A checkpoint's bytes, and the raw maps its float32 model gives for an image; `prepare` gives the model numbers.
    `old`: its class is Model, as in YOLOv5 v5.0 and YOLOv7."""
    with importable(COMMON, YOLO) as (_, yolo):
        model = (yolo.Model if old else yolo.DetectionModel)(config)
        prepare(model)
        model.names = [f"class {i}" for i in range(config["nc"])]
        model.stride = model.model[-1].stride = torch.tensor([float(s) for s in strides])
        buffer = io.BytesIO()
        torch.save({"epoch": 3, "model": model.half().eval(), "ema": None, "optimizer": None}, buffer)
    model = model.float()

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        with torch.no_grad():
            return model(x)

    return buffer.getvalue(), run
