"""Layer tables of the families dsconvert converts, spelled from the published architectures, and what they cost.

Every table is a model yaml as checkpoints hold it; `width` and `depth` scale it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from dsconvert.graph.shapes import value_shapes
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Network

Row = list[Any]
UP = ["nn.Upsample", ["None", 2, "nearest"]]


class Table:
    """Rows one after the other; `add` gives a row's index."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def add(self, kind: str, *args: Any, source: int | Sequence[int] = -1, n: int = 1) -> int:
        self.rows.append([source if isinstance(source, int) else list(source), n, kind, list(args)])
        return len(self.rows) - 1

    def config(self, backbone: int, nc: int, depth: float, width: float, levels: int) -> dict[str, Any]:
        anchors = [[4 << i, 5 << i, 7 << i, 6 << i, 9 << i, 11 << i] for i in range(levels)]
        return {
            "nc": nc, "depth_multiple": depth, "width_multiple": width, "anchors": anchors,
            "backbone": self.rows[:backbone], "head": self.rows[backbone:],
        }  # fmt: skip


def yolov5(
    depth: float, width: float, nc: int = 80, channels: Sequence[int] = (128, 256, 512, 1024), conv: str = "Conv",
    block: str = "C3", spp: str = "SPPF", deepest: str | None = None,
) -> dict[str, Any]:  # fmt: skip
    """YOLOv5 v6: a C3 block for each of `channels`, a pyramid down and up again, one level fewer than blocks; with five
    `channels` the P6 models, with GhostConv and C3Ghost YOLOv5-ghost, with `deepest` (the backbone's last block) C3TR
    YOLOv5-transformer."""
    t = Table()
    repeats = [3, 6, 9, 3, 3][: len(channels)]
    t.add("Conv", 64, 6, 2, 2)
    stages = []
    for c, n in zip(channels, repeats, strict=True):
        t.add(conv, c, 3, 2)
        stages.append(t.add(deepest or block if len(stages) == len(channels) - 1 else block, c, n=n))
    last = channels[-1]
    if spp == "C3SPP":
        t.add("C3SPP", last, [5, 9, 13])
    else:
        t.add("SPPF", last, 5)
    backbone = len(t.rows)
    laterals = []
    for c, stage in zip(channels[-2:0:-1], stages[-2:0:-1], strict=True):
        laterals.append(t.add(conv, c, 1, 1))
        t.add(*UP[:1], *UP[1])
        t.add("Concat", 1, source=(-1, stage))
        t.add(block, c, False, n=3)
    outputs = [len(t.rows) - 1]
    for c, lateral, wider in zip(channels[1:], laterals[::-1], channels[2:], strict=False):
        t.add(conv, c, 3, 2)
        t.add("Concat", 1, source=(-1, lateral))
        outputs.append(t.add(block, wider, False, n=3))
    t.add("Detect", "nc", "anchors", source=outputs)
    return t.config(backbone, nc, depth, width, len(outputs))


P6 = (128, 256, 512, 768, 1024)


def _elan(
    t: Table, c: int, out: int, convs: int, act: list[Any], *, all_of_them: bool, small: int | None = None
) -> int:
    """Two 1x1 convolutions of one input, `convs` of 3x3 behind the second, joined and brought to `out` channels.
    Joined are all of them, or every second 3x3."""
    small = small or c
    t.add("Conv", c, 1, 1, *act)
    t.add("Conv", c, 1, 1, *act, source=-2)
    for _ in range(convs):
        t.add("Conv", small, 3, 1, *act)
    places = range(-1, -convs - 3, -1) if all_of_them else [*range(-1, -convs - 1, -2), -convs - 1, -convs - 2]
    t.add("Concat", 1, source=tuple(places))
    return t.add("Conv", out, 1, 1, *act)


LEAKY = ["None", 1, "nn.LeakyReLU(0.1)"]


def yolov7_tiny(nc: int = 80, width: float = 1.0, detect: str = "IDetect") -> dict[str, Any]:
    """YOLOv7-tiny: every convolution's row names its activation."""
    t = Table()

    def conv(*args: int, source: int = -1) -> int:
        return t.add("Conv", *args, *LEAKY, source=source)

    conv(32, 3, 2)
    conv(64, 3, 2)
    _elan(t, 32, 64, 2, LEAKY, all_of_them=True)
    stages = []
    for c in (64, 128, 256):
        t.add("MP")
        stages.append(_elan(t, c, 2 * c, 2, LEAKY, all_of_them=True))
    backbone = len(t.rows)
    conv(256, 1, 1)
    conv(256, 1, 1, source=-2)
    for place, k in enumerate((5, 9, 13), 1):
        t.add("SP", k, source=-place)
    t.add("Concat", 1, source=(-1, -2, -3, -4))
    conv(256, 1, 1)
    t.add("Concat", 1, source=(-1, -7))
    deep = [conv(256, 1, 1)]
    for c, stage in ((128, stages[1]), (64, stages[0])):
        conv(c, 1, 1)
        t.add(*UP[:1], *UP[1])
        conv(c, 1, 1, source=stage)
        t.add("Concat", 1, source=(-1, -2))
        deep.append(_elan(t, c // 2, c, 2, LEAKY, all_of_them=True))
    ends = [deep[-1]]
    for c, lateral in ((128, deep[1]), (256, deep[0])):
        conv(c, 3, 2)
        t.add("Concat", 1, source=(-1, lateral))
        ends.append(_elan(t, c // 2, c, 2, LEAKY, all_of_them=True))
    outputs = [conv(c, 3, 1, source=end) for c, end in zip((128, 256, 512), ends, strict=True)]
    t.add(detect, "nc", "anchors", source=outputs)
    return t.config(backbone, nc, 1.0, width, 3)


def yolov7(nc: int = 80, width: float = 1.0, detect: str = "IDetect") -> dict[str, Any]:
    """YOLOv7."""
    t = Table()

    def shrink(c: int, *more: int) -> int:
        """Half the size, by a pool in one branch and a stride in the other."""
        t.add("MP")
        t.add("Conv", c, 1, 1)
        t.add("Conv", c, 1, 1, source=-3)
        t.add("Conv", c, 3, 2)
        return t.add("Concat", 1, source=(-1, -3, *more))

    t.add("Conv", 32, 3, 1)
    t.add("Conv", 64, 3, 2)
    t.add("Conv", 64, 3, 1)
    t.add("Conv", 128, 3, 2)
    stages = [_elan(t, 64, 256, 4, [], all_of_them=False)]
    for c, inner, out in ((128, 128, 512), (256, 256, 1024), (512, 256, 1024)):
        shrink(c)
        stages.append(_elan(t, inner, out, 4, [], all_of_them=False))
    backbone = len(t.rows)
    deep = [t.add("SPPCSPC", 512)]
    for c, stage in ((256, stages[2]), (128, stages[1])):
        t.add("Conv", c, 1, 1)
        t.add(*UP[:1], *UP[1])
        t.add("Conv", c, 1, 1, source=stage)
        t.add("Concat", 1, source=(-1, -2))
        deep.append(_elan(t, c, c, 4, [], all_of_them=True, small=c // 2))
    ends = [deep[-1]]
    for c, lateral in ((128, deep[1]), (256, deep[0])):
        shrink(c, lateral)
        ends.append(_elan(t, 2 * c, 2 * c, 4, [], all_of_them=True, small=c))
    outputs = [t.add("RepConv", c, 3, 1, source=end) for c, end in zip((256, 512, 1024), ends, strict=True)]
    t.add(detect, "nc", "anchors", source=outputs)
    return t.config(backbone, nc, 1.0, width, 3)


def short_p6() -> Table:
    t = Table()
    t.add("Conv", 32, 6, 4, 1)
    for c in (32, 32, 48, 64):
        t.add("Conv", c, 3, 2)
        t.add("C3", c, False)
    t.add("Detect", "nc", "anchors", source=(2, 4, 6, 8))
    return t


def short_yolov7() -> Table:
    t = Table()
    t.add("Conv", 32, 3, 4)
    t.add("Conv", 32, 1, 1)
    t.add("Conv", 32, 1, 1, source=-2)
    t.add("Conv", 32, 3, 1)
    t.add("Concat", 1, source=(-1, -2, -3))
    t.add("MP")
    t.add("Conv", 32, 1, 1)
    t.add("Conv", 32, 1, 1, source=-3)
    t.add("Conv", 32, 3, 2)
    t.add("Concat", 1, source=(-1, -3))
    t.add("SPPCSPC", 32)
    t.add("RepConv", 32, 3, 1)
    t.add("Conv", 48, 3, 2)
    t.add("RepConv", 64, 3, 1)
    t.add("IDetect", "nc", "anchors", source=(11, 13))
    return t


def short_tiny() -> Table:
    t = Table()
    t.add("Conv", 32, 3, 4, *LEAKY)
    t.add("Conv", 32, 1, 1, *LEAKY)
    t.add("MP")
    t.add("SP", 5)
    t.add("SP", 9, source=-2)
    t.add("Concat", 1, source=(-1, -2, -3))
    t.add("Conv", 48, 3, 1, *LEAKY)
    t.add("Conv", 64, 3, 2, *LEAKY)
    t.add("IDetect", "nc", "anchors", source=(6, 7))
    return t


def short_ghost() -> Table:
    t = Table()
    t.add("Conv", 32, 6, 4, 1)
    t.add("GhostBottleneck", 32, 3, 2)
    t.add("C3Ghost", 32)
    t.add("DWConv", 32, 3, 2)
    t.add("C3SPP", 48, [3, 5])
    t.add("Detect", "nc", "anchors", source=(2, 4))
    return t


def short_transformer() -> Table:
    t = Table()
    t.add("Conv", 32, 6, 4, 1)
    t.add("Conv", 32, 3, 2)
    t.add("C3", 32)
    t.add("Conv", 48, 3, 2)
    t.add("C3TR", 48, n=2)
    t.add("Detect", "nc", "anchors", source=(2, 4))
    return t


# Few layers of every kind: (model yaml, strides).
SHORT = {
    "P6": (short_p6().config(4, 2, 1.0, 1.0, 4), [8, 16, 32, 64]),
    "YOLOv7": (short_yolov7().config(6, 2, 1.0, 1.0, 2), [8, 16]),
    "YOLOv7-tiny": (short_tiny().config(3, 2, 1.0, 1.0, 2), [8, 16]),
    "ghost": (short_ghost().config(3, 2, 1.0, 1.0, 2), [8, 16]),
    "attention": (short_transformer().config(3, 2, 1.0, 1.0, 2), [8, 16]),
}


def meta(config: dict[str, Any]) -> Network:
    """The network without its numbers."""
    with torch.device("meta"):
        return Network(config, config["nc"], 3)


def parameters(network: Network) -> int:
    return sum(p.numel() for p in network.parameters())


def gflops(network: Network, side: int = 640, count: Callable[[int], float] = lambda n: 2 * n / 1e9) -> float:
    """Two for every multiplication of a convolution with one image of side x side, in 10^9; the network is fused."""
    graph, params = lower(network.fused())
    weights = {name: tuple(p.weight.shape) for name, p in params.items()}
    shapes = value_shapes(graph, weights, (3, side, side))
    return sum(
        count(torch.Size(weights[n.name]).numel() * shapes[n.name][1] * shapes[n.name][2]) for n in graph.convs()
    )
