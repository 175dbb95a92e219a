"""From Detect's raw maps to boxes in pixels (YOLOv5's published box equations)."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.yolo.network import Head


def decode(raw: list[Tensor], head: Head) -> Tensor:
    """Raw maps -> (n, boxes, 5 + nc): x, y, w, h in input pixels, objectness, class scores (0..1).

    xy = (2 sigmoid(t) - 0.5 + cell) * stride,  wh = (2 sigmoid(t))^2 * anchor. Boxes run over levels, then
    anchors, then rows, then columns: the order of YOLOv5's own output.
    """
    levels = []
    for t, stride, anchors in zip(raw, head.strides, head.anchors, strict=True):
        n, _, ny, nx = t.shape
        p = t.view(n, head.na, head.nc + 5, ny, nx).permute(0, 1, 3, 4, 2).sigmoid()
        gy, gx = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        cell = torch.stack((gx, gy), -1).to(p) - 0.5
        sizes = torch.tensor(anchors, dtype=p.dtype, device=p.device)[:, None, None]
        xy = (p[..., :2] * 2 + cell) * stride
        wh = (p[..., 2:4] * 2) ** 2 * sizes
        levels.append(torch.cat((xy, wh, p[..., 4:]), -1).reshape(n, -1, head.nc + 5))
    return torch.cat(levels, 1)
