"""The detection loss of the YOLOv5 family, written from its published description.

Every box is assigned to anchors of similar shape, in the cell of its centre and in the one or two neighbouring cells
that are nearest to it. These cells learn the box (complete IoU, arXiv 1911.08287) and the class. Every cell learns its
objectness; the target is the IoU that the cell's own box reaches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base.size import Size

LEVEL_BALANCE = (4.0, 1.0, 0.4)  # objectness weights of three levels: finer levels have far more empty cells
OTHER_BALANCE = (4.0, 1.0, 0.25, 0.06, 0.02)  # of any other number of levels, up to five
LARGEST_RATIO = 4.0  # largest factor between the sides of anchor and box


@dataclass(frozen=True)
class Gains:
    """The weights of the loss's parts."""

    box: float = 0.05
    objectness: float = 0.7
    kind: float = 0.3

    @staticmethod
    def usual(nc: int, size: Size) -> Gains:
        """Return YOLOv5's published weights, scaled with the classes (from 80) and the image area (from 640 pixels
        squared).
        """
        return Gains(0.05, (size.height / 640) * (size.width / 640), 0.5 * nc / 80)


@dataclass(frozen=True)
class Assigned:
    """The targets of one level, t of them.

    index: image, anchor, row and column, (t,) each.
    box: (t, 4), x, y, w, h in cells, relative to the cell.
    anchor_size: (t, 2) in cells.
    kind: class, (t,).
    """

    index: tuple[Tensor, Tensor, Tensor, Tensor]
    box: Tensor
    anchor_size: Tensor
    kind: Tensor


def assign(targets: Tensor, anchors: Tensor, rows: int, columns: int) -> Assigned:
    """Assign each box to the cells and anchors that learn it.

    targets: (t, 6), image, class, x, y, w, h in 0..1.
    anchors: (na, 2), in cells.
    """
    na, device = anchors.shape[0], targets.device
    scale = targets.new_tensor([columns, rows, columns, rows])
    box = targets[:, 2:] * scale
    ratio = box[None, :, 2:] / anchors[:, None]
    close = torch.maximum(ratio, 1 / ratio).amax(2) < LARGEST_RATIO  # (na, t)
    anchor_index = torch.arange(na, device=device)[:, None].expand_as(close)[close]
    chosen = torch.arange(len(targets), device=device)[None].expand_as(close)[close]
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
        pick = torch.arange(len(box), device=device) if mask is None else mask.nonzero()[:, 0]
        cells.append(centre[pick].floor().long() + torch.tensor(step, device=device))
        picks.append(pick)
    cell, pick = torch.cat(cells), torch.cat(picks)
    cell = torch.stack((cell[:, 0].clamp(0, columns - 1), cell[:, 1].clamp(0, rows - 1)), 1)
    relative = torch.cat((centre[pick] - cell, box[pick, 2:]), 1)
    return Assigned(
        (image[pick], anchor_index[pick], cell[:, 1], cell[:, 0]), relative, anchors[anchor_index[pick]], kind[pick]
    )


def complete_iou(a: Tensor, b: Tensor) -> Tensor:
    """Return the complete IoU of boxes x, y, w, h (t, 4): IoU minus centre distance and aspect mismatch; 1 for equal
    boxes.
    """
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


def level_balance(levels: int) -> tuple[float, ...]:
    """Return the weight of each level's objectness, the finest level first."""
    return LEVEL_BALANCE if levels == 3 else OTHER_BALANCE[:levels]


def detection_loss(
    raw: Sequence[Tensor], targets: Tensor, anchors: Tensor, nc: int, gains: Gains | None = None,
    total: Callable[[Tensor], Tensor] = lambda counts: counts,
) -> Tensor:  # fmt: skip
    """Return the mean loss of an image.

    raw: maps (n, na * (nc + 5), rows, columns), one a level.
    targets: (t, 6), as for `assign`.
    anchors: (nl, na, 2), in cells.
    gains: weights of the parts.
    total: sums counts, int64 (nl + 1,), over all processes. Then the losses of all processes add up to the batch's.
    """
    g = gains or Gains()
    found = [
        assign(targets, sizes, *level.shape[2:]) for level, sizes in zip(raw, anchors, strict=True)
    ]  # fmt: skip
    counts = total(torch.tensor([*(len(f.box) for f in found), len(raw[0])])).tolist()
    loss = raw[0].new_zeros(())
    for level, level_found, count, balance in zip(raw, found, counts[:-1], level_balance(len(raw)), strict=True):
        n, _, rows, columns = level.shape
        p = level.float().view(n, -1, nc + 5, rows, columns).permute(0, 1, 3, 4, 2)
        wanted = p.new_zeros(p.shape[:-1])
        if len(level_found.box):
            mine = p[level_found.index]
            xy = mine[:, :2].sigmoid() * 2 - 0.5
            wh = (mine[:, 2:4].sigmoid() * 2) ** 2 * level_found.anchor_size
            iou = complete_iou(torch.cat((xy, wh), 1), level_found.box)
            classes = F.one_hot(level_found.kind, nc).to(mine)
            loss = loss + g.box * (1 - iou).sum() / count
            loss = loss + g.kind * _entropy(mine[:, 5:], classes) / (count * nc)
            reached = iou.detach().clamp(min=0).to(wanted)
            place = _flat(level_found.index, wanted.shape)  # if two boxes share a cell, the larger IoU is its target
            wanted.view(-1).scatter_reduce_(0, place, reached, "amax")
        cells = counts[-1] * wanted[0].numel()
        loss = loss + g.objectness * balance * _entropy(p[..., 4], wanted) / cells
    return loss


def _entropy(logits: Tensor, wanted: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, wanted, reduction="sum")


def _flat(index: tuple[Tensor, ...], shape: Sequence[int]) -> Tensor:
    """Return the indices of an array of that shape as places in the flattened array."""
    place = torch.zeros_like(index[0])
    for along, size in zip(index, shape, strict=True):
        place = place * size + along
    return place
