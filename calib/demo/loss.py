"""The detection loss of the YOLOv5 family, written from its published description.

Every box is given to the cells it falls in and to the one or two neighbouring cells its centre is nearest to, for
each anchor of similar shape. Those cells learn the box (complete IoU, arXiv 1911.08287) and the class; every cell
learns its objectness, whose target is the IoU its own box reaches.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

BOX_GAIN, OBJECT_GAIN, CLASS_GAIN = 0.05, 0.7, 0.3
LEVEL_BALANCE = (4.0, 1.0, 0.4)  # finer levels have far more empty cells
LARGEST_RATIO = 4.0  # anchor and box sides may differ by at most this factor


@dataclass(frozen=True)
class Assigned:
    """Targets of one level: index tensors (image, anchor, row, column), each (t,); `box` (t, 4) xywh in cells,
    relative to the cell; `anchor_size` (t, 2) in cells; `kind` (t,) class."""

    index: tuple[Tensor, Tensor, Tensor, Tensor]
    box: Tensor
    anchor_size: Tensor
    kind: Tensor


def assign(targets: Tensor, anchors: Tensor, rows: int, columns: int) -> Assigned:
    """targets (t, 6): image, class, x, y, w, h in 0..1; anchors (na, 2) in cells -> the cells that learn them."""
    na = anchors.shape[0]
    scale = targets.new_tensor([columns, rows, columns, rows])
    box = targets[:, 2:] * scale
    ratio = box[None, :, 2:] / anchors[:, None]
    close = torch.maximum(ratio, 1 / ratio).amax(2) < LARGEST_RATIO  # (na, t)
    anchor_index = torch.arange(na)[:, None].expand_as(close)[close]
    chosen = torch.arange(len(targets))[None].expand_as(close)[close]
    box, image, kind = box[chosen], targets[chosen, 0].long(), targets[chosen, 1].long()
    size = box.new_tensor([columns, rows])
    centre = box[:, :2]
    fraction = centre % 1
    before = (fraction < 0.5) & (centre > 1)
    after = (fraction > 0.5) & (centre < size - 1)
    steps = [
        (None, (0, 0)),
        (before[:, 0], (-1, 0)),
        (before[:, 1], (0, -1)),
        (after[:, 0], (1, 0)),
        (after[:, 1], (0, 1)),
    ]
    cells, picks = [], []
    for mask, step in steps:
        pick = torch.arange(len(box)) if mask is None else mask.nonzero()[:, 0]
        cells.append(centre[pick].floor().long() + torch.tensor(step))
        picks.append(pick)
    cell, pick = torch.cat(cells), torch.cat(picks)
    cell = torch.stack((cell[:, 0].clamp(0, columns - 1), cell[:, 1].clamp(0, rows - 1)), 1)
    relative = torch.cat((centre[pick] - cell, box[pick, 2:]), 1)
    return Assigned(
        (image[pick], anchor_index[pick], cell[:, 1], cell[:, 0]), relative, anchors[anchor_index[pick]], kind[pick]
    )


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """Complete IoU of boxes xywh (t, 4): IoU less centre distance and aspect mismatch; 1 for equal boxes."""
    a_low, a_high = a[:, :2] - a[:, 2:] / 2, a[:, :2] + a[:, 2:] / 2
    b_low, b_high = b[:, :2] - b[:, 2:] / 2, b[:, :2] + b[:, 2:] / 2
    overlap = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(1)
    iou = overlap / (a[:, 2:].prod(1) + b[:, 2:].prod(1) - overlap + 1e-7)
    diagonal = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).square().sum(1) + 1e-7
    distance = (a[:, :2] - b[:, :2]).square().sum(1) / diagonal
    angle = torch.atan(a[:, 2] / (a[:, 3] + 1e-7)) - torch.atan(b[:, 2] / (b[:, 3] + 1e-7))
    aspect = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        weight = aspect / (aspect - iou + 1 + 1e-7)
    return iou - distance - aspect * weight


def detection_loss(raw: list[Tensor], targets: Tensor, anchors: Tensor, nc: int) -> Tensor:
    """Raw maps, targets (t, 6) as for `assign`, anchors (nl, na, 2) in cells -> mean loss of an image."""
    total = raw[0].new_zeros(())
    for level, sizes, balance in zip(raw, anchors, LEVEL_BALANCE, strict=True):
        n, _, rows, columns = level.shape
        p = level.float().view(n, len(sizes), nc + 5, rows, columns).permute(0, 1, 3, 4, 2)
        wanted = torch.zeros_like(p[..., 4])
        found = assign(targets, sizes, rows, columns)
        if len(found.box):
            mine = p[found.index]
            xy = mine[:, :2].sigmoid() * 2 - 0.5
            wh = (mine[:, 2:4].sigmoid() * 2) ** 2 * found.anchor_size
            iou = complete_iou(torch.cat((xy, wh), 1), found.box)
            classes = F.one_hot(found.kind, nc).to(mine)
            total = total + BOX_GAIN * (1 - iou).mean()
            total = total + CLASS_GAIN * F.binary_cross_entropy_with_logits(mine[:, 5:], classes)
            wanted[found.index] = iou.detach().clamp(min=0)
        total = total + OBJECT_GAIN * balance * F.binary_cross_entropy_with_logits(p[..., 4], wanted)
    return total
