"""A small stand-in for a YOLOv5 tree, written for these tests from its documented behaviour; none of its code.

What counts: `models.common` holds the blocks; `models.yolo.parse_model(d, ch)` evaluates each row's module name in its
own globals, scales channels and repeats for a fixed set of modules, notes i, f, type and np on each layer, and returns
the layers and the indices to keep; `Model` looks parse_model up when it is built, and its yaml keeps the names.
"""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

from importable import importable

from dsconvert.yolo import modules as ours

YOLO = """
import copy, math
import torch
from torch import nn
from models.common import *

class Detect(nn.Module):
    def __init__(self, nc, anchors, ch):
        super().__init__()
        self.nc, self.na, self.nl = nc, len(anchors[0]) // 2, len(anchors)
        self.register_buffer("anchors", torch.tensor(anchors).float().view(self.nl, -1, 2))
        self.m = nn.ModuleList(nn.Conv2d(c, self.na * (nc + 5), 1) for c in ch)
    def forward(self, xs):
        return [conv(x) for conv, x in zip(self.m, xs)]

def parse_model(d, ch):
    anchors, nc, layers, save = d["anchors"], d["nc"], [], []
    scaled, repeated = {Conv, Bottleneck, C3, SPPF}, {C3}
    for index, (source, n, name, args) in enumerate(d["backbone"] + d["head"]):
        kind = eval(name)
        words = {"nc": nc, "anchors": anchors, "None": None}
        args = [words.get(a, a) if isinstance(a, str) else a for a in args]
        n = max(round(n * d["depth_multiple"]), 1) if n > 1 else n
        if kind in scaled:
            out = math.ceil(args[0] * d["width_multiple"] / 8) * 8
            args = [ch[source], out, *args[1:]]
            if kind in repeated:
                args.insert(2, n)
                n = 1
        elif kind is Concat:
            out, args = sum(ch[s] for s in source), []
        elif kind is Detect:
            args.append([ch[s] for s in source])
            out = 0
        else:
            out = ch[source]
        layer = nn.Sequential(*(kind(*args) for _ in range(n))) if n > 1 else kind(*args)
        layer.i, layer.f, layer.type = index, source, str(kind)[8:-2]
        layer.np = sum(p.numel() for p in layer.parameters())
        save.extend(s % index for s in ([source] if isinstance(source, int) else source) if s != -1)
        layers.append(layer)
        ch = [out] if index == 0 else [*ch, out]
    return nn.Sequential(*layers), sorted(save)

class DetectionModel(nn.Module):
    def __init__(self, cfg, ch=3):
        super().__init__()
        self.yaml = cfg
        self.model, self.save = parse_model(copy.deepcopy(cfg), ch=[ch])
        self.names = [str(i) for i in range(cfg["nc"])]
        self.model[-1].stride = self.stride = torch.tensor([4.0, 8.0])
        self.model[-1].anchors /= self.stride.view(-1, 1, 1)
    def forward(self, x):
        kept = []
        for layer in self.model:
            if layer.f != -1:
                x = kept[layer.f] if isinstance(layer.f, int) else [x if s == -1 else kept[s] for s in layer.f]
            x = layer(x)
            kept.append(x if layer.i in self.save else None)
        return x
"""


@contextmanager
def tree():
    """The modules `models.common` and `models.yolo`, importable meanwhile; yields the latter."""
    with importable(Path(ours.__file__).read_text(), YOLO) as (_, yolo):  # our own blocks, under their names
        yield yolo


def config(block: str = "DSConv2D_C3") -> dict:
    """A model yaml whose head has one row of `block`, at layer 7."""
    return {
        "nc": 2,
        "depth_multiple": 1.0,
        "width_multiple": 0.25,
        "anchors": [[4, 5, 8, 10], [16, 12, 30, 33]],
        "backbone": [
            [-1, 1, "Conv", [32, 6, 2, 2]],
            [-1, 1, "Conv", [64, 3, 2]],
            [-1, 1, "C3", [64]],
            [-1, 1, "Conv", [160, 3, 2]],
            [-1, 1, "SPPF", [160, 5]],
        ],
        "head": [
            [-1, 1, "nn.Upsample", ["None", 2, "nearest"]],
            [[-1, 2], 1, "Concat", [1]],
            [-1, 2, block, [96, False]],
            [[7, 4], 1, "Detect", ["nc", "anchors"]],
        ],
    }
