"""Write the `.pt` format of YOLOv5 without its code: for the demo's checkpoint, tests and benchmarks.

dsconvert itself only reads it (`dsconvert.yolo.checkpoint`).
"""

from __future__ import annotations

import copy
import io
import sys
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from dsconvert.yolo import attention, ghost, segment, yolov7
from dsconvert.yolo import modules as ours
from dsconvert.yolo.archive import LAYERS
from dsconvert.yolo.layers import DETECTS
from dsconvert.yolo.network import Head, Network

CLASS_NAMES: dict[type[nn.Module], str] = {
    Network: "models.yolo.DetectionModel",
    ours.Detect: "models.yolo.Detect",
    yolov7.IDetect: "models.yolo.IDetect",
    segment.Segment: "models.yolo.Segment",
    **{getattr(home, n): f"models.common.{n}" for home in (ours, ghost, attention, segment, yolov7) for n in LAYERS
       if hasattr(home, n)},
}  # fmt: skip


class _Method:
    """A class's attribute, by name: Segment calls the `forward` of Detect that it holds."""

    def __init__(self, owner: type, name: str) -> None:
        self.owner, self.name = owner, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.owner, self.name)


@contextmanager
def _named_classes(segmentation: bool) -> Iterator[dict[type[nn.Module], type]]:
    """Empty classes under YOLOv5's module names, present only while pickling: pickle stores names, not code."""
    made: dict[type[nn.Module], type] = {}
    added: list[str] = []
    names = dict(CLASS_NAMES)
    if segmentation:
        names[Network] = "models.yolo.SegmentationModel"
    for source, full in names.items():
        module_name, name = full.rsplit(".", 1)
        for part in ("models", module_name):
            if part not in sys.modules:
                sys.modules[part] = types.ModuleType(part)
                added.append(part)
        made[source] = type(name, (nn.Module,), {"__module__": module_name})
        setattr(sys.modules[module_name], name, made[source])
    try:
        yield made
    finally:
        for part in added:
            del sys.modules[part]


def _dressed(module: nn.Module, classes: Mapping[type[nn.Module], type], extra: Mapping[str, Any]) -> nn.Module:
    """A shallow copy of the module tree whose classes carry YOLOv5's names."""
    kind: Any = classes.get(type(module), type(module))
    if isinstance(module, nn.ModuleList) and extra.get("sequential"):
        kind = nn.Sequential
    dressed = kind.__new__(kind)
    dressed.__dict__.update(module.__dict__)
    dressed.__dict__["_modules"] = {
        name: _dressed(child, classes, {}) if child is not None else None for name, child in module._modules.items()
    }
    return dressed


def yolov5_bytes(network: Network, head: Head, extra: Mapping[str, Any] | None = None) -> bytes:
    """The bytes of a float16 `.pt` in YOLOv5's format, loadable by YOLOv5 itself and by `load_checkpoint`.

    `extra` holds plain values stored beside the model (epoch, date). The network's anchors buffer must be set.
    """
    half = copy.deepcopy(network).half().eval()
    stride = torch.tensor([float(s) for s in head.strides])
    with _named_classes(head.nm > 0) as classes:
        model = _dressed(half, classes, {})
        layers = _dressed(half.model, classes, {"sequential": True})
        model._modules["model"] = layers
        save: set[int] = set()
        for index, (layer, sources, kind) in enumerate(
            zip(layers._modules.values(), half.sources, half.kinds, strict=True)
        ):
            relative = [-1 if s == index - 1 else s for s in sources]
            save.update(s for s in relative if s != -1)
            assert layer is not None
            layer.__dict__.update(
                i=index, f=relative[0] if len(relative) == 1 else relative, type=_yolov5_type(kind),
                np=sum(p.numel() for p in layer.parameters()),
            )  # fmt: skip
            if kind == "Concat":
                layer.__dict__["d"] = 1
        nl = len(head.strides)
        detect = list(layers._modules.values())[-1]
        assert detect is not None
        detect.__dict__.update(
            no=sum(head.parts), nl=nl, stride=stride, inplace=True,
            grid=[torch.empty(0)] * nl, anchor_grid=[torch.empty(0)] * nl,
        )  # fmt: skip
        if isinstance(network.detect, segment.Segment):
            hidden = network.detect.proto.cv1.conv.out_channels
            detect.__dict__.update(npr=hidden, detect=_Method(classes[ours.Detect], "forward"))
        else:
            detect.__dict__.pop("nm")
        for name in ("config", "sources", "kinds", "_kept"):
            model.__dict__.pop(name)
        model.__dict__.update(
            yaml={**network.config, "nc": head.nc}, names=dict(enumerate(head.names)), stride=stride,
            save=sorted(save), nc=head.nc, inplace=True,
        )  # fmt: skip
        buffer = io.BytesIO()
        torch.save({"epoch": -1, **(extra or {}), "model": model, "ema": None, "optimizer": None}, buffer)
    return buffer.getvalue()


def _yolov5_type(kind: str) -> str:
    if kind == "Upsample":
        return "torch.nn.modules.upsampling.Upsample"
    return f"models.yolo.{kind}" if kind in DETECTS else f"models.common.{kind}"
