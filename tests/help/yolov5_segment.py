"""Run as a program: `python yolov5_segment.py TREE FOLDER` builds YOLOv5's own yolov5n-seg from a tree of theirs with
random weights and writes into FOLDER what its training would save (seg.pt) and what it gives for an image (io.pth).

Of the tree only its documented interface is used. What the tree imports besides torch and numpy, and building a model
does not need, is replaced by stand-ins."""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import math
import re
import sys
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import packaging.version  # noqa: F401 (which the tree uses but leaves to others to import)
import torch

UNNEEDED = ("torchvision", "pandas", "seaborn", "requests", "PIL", "ultralytics", "matplotlib", "tqdm", "scipy", "thop",
            "IPython", "psutil", "git", "pkg_resources")  # fmt: skip


class _StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """First of all finders: what is installed may be too new for the tree."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        usable = name.partition(".")[0] in UNNEEDED
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if usable else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        made: Any = MagicMock(name=spec.name)
        made.__path__, made.__spec__, made.__version__ = [], spec, "99"
        # what building a model uses, in trees that take it from there
        made.make_divisible = lambda x, divisor: math.ceil(x / int(divisor)) * int(divisor)
        made.initialize_weights = lambda model: None
        made.parse_version = lambda text: [int(n) for n in re.findall(r"\d+", text)[:3]]
        return made

    def exec_module(self, module: ModuleType) -> None:
        """There is nothing to run."""


def main(tree: str, folder: str) -> None:
    sys.meta_path.insert(0, _StandIns())
    sys.path.insert(0, tree)
    from models.yolo import SegmentationModel  # type: ignore[import-not-found]

    torch.manual_seed(0)
    model = SegmentationModel(f"{tree}/models/segment/yolov5n-seg.yaml")
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.eps = 1e-3  # as YOLOv5 sets it, where the stand-in has not
            module.running_mean.uniform_(-0.5, 0.5)
            module.running_var.uniform_(0.5, 1.5)
    model.half().eval()
    torch.save({"epoch": -1, "best_fitness": None, "model": model, "ema": None, "optimizer": None}, f"{folder}/seg.pt")
    image = torch.rand(1, 3, 128, 160)
    with torch.no_grad():
        boxes, prototypes = model.float()(image)[:2]
    count = sum(p.numel() for p in model.parameters())
    torch.save({"image": image, "boxes": boxes, "prototypes": prototypes, "parameters": count}, f"{folder}/io.pth")


if __name__ == "__main__":
    main(*sys.argv[1:])
