"""A stand-in for torchvision, which has no build for the torch that dsconvert pins: what YOLOv5 and YOLOv7 import of
it, and of that only non-maximum suppression works. Written to a folder, for PYTHONPATH of a training tree's scripts."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

SOURCE = '''
import sys, types
import cv2
import numpy as np
import torch
from torch import nn

class ImageFolder:
    """A base class for the trees' classification data sets."""

def nms(boxes, scores, iou_threshold):
    """Indices of the boxes (n, 4: corners) that no better one overlaps by more than that, best first (OpenCV's)."""
    corners = torch.cat((boxes[:, :2], boxes[:, 2:] - boxes[:, :2]), 1).double().tolist()
    kept = cv2.dnn.NMSBoxes(corners, scores.double().tolist(), 0.0, iou_threshold)
    return torch.tensor(np.asarray(kept).reshape(-1), dtype=torch.int64, device=boxes.device)

def not_here(*args, **kwargs):
    raise NotImplementedError("this torchvision is a stand-in: it has ops.nms alone")

def _module(name, **content):
    made = types.ModuleType(f"torchvision.{name}")
    made.__dict__.update(content)
    sys.modules[f"torchvision.{name}"] = made
    return made

ops = _module("ops", nms=nms, DeformConv2d=nn.Module, roi_pool=not_here, roi_align=not_here, ps_roi_pool=not_here,
              ps_roi_align=not_here)
utils = _module("utils", save_image=not_here)
datasets = _module("datasets", ImageFolder=ImageFolder)
transforms = _module("transforms", ToPILImage=lambda: not_here)  # made when train.py is imported, called by comet alone
models = _module("models")
'''


def write(folder: Path) -> Path | None:
    """The stand-in in this new folder, its version the one that goes with torch; None where the real one is there."""
    if importlib.util.find_spec("torchvision"):
        return None
    minor = int(torch.__version__.split(".")[1])
    (folder / "torchvision").mkdir(parents=True)
    (folder / "torchvision" / "__init__.py").write_text(SOURCE)
    info = folder / f"torchvision-0.{minor + 15}.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torchvision\nVersion: 0.{minor + 15}.0\n")
    return folder
