"""DSConv modules for training: the published classes, with a forward pass that uses their integers and shifts.

    import dsconvert.torch as dt
    layer = dt.DSConv(64, 128, 3)        # trains like nn.Conv2d; the integers follow
    dt.register(models.yolo)             # YOLOv5's train.py now knows yolov5s_DSConv2D_C3.yaml

Inside this package `import torch` is PyTorch, as imports are absolute.
"""

from __future__ import annotations

from dsconvert.torch.blocks import Bottleneck_DSConv2D, DSConv2D, DSConv2D_C3
from dsconvert.torch.conv import DSConv
from dsconvert.torch.register import register

__all__ = ["Bottleneck_DSConv2D", "DSConv", "DSConv2D", "DSConv2D_C3", "register"]
