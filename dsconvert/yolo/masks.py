"""The masks of a segmentation network, from the coefficients of each box and the prototypes of the image (see
`segment`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.yolo.network import Head

SUREST = 100  # boxes of an image whose masks are measured


def coefficients(raw: list[Tensor], head: Head) -> Tensor:
    """Return the mask coefficients of all boxes (n, boxes, nm) from raw maps, in the order of `decode`."""
    if len(raw) - 1 == len(head.strides):
        levels = [t.unflatten(1, (head.na, sum(head.parts)))[:, :, -head.nm :] for t in raw[:-1]]
    else:
        step = len(head.parts)
        levels = [t.unflatten(1, (head.na, head.nm)) for t in raw[step - 1 : -1 : step]]
    return torch.cat([t.permute(0, 1, 3, 4, 2).flatten(1, 3) for t in levels], 1)


def mask_measure(raw: list[Tensor], reference: Tensor, head: Head) -> Tensor:
    """Return numbers (n, boxes, h, w) whose squared change is the damage to the masks.

    They are the masks inside the SUREST best boxes. Their weights make the squared change of one box the mean over its
    pixels, times its best score.

    reference: (n, boxes, 5 + nc + nm) from `decode`; it says which boxes, where they are, and their scores.
    """
    scores = (reference[..., 4:5] * reference[..., 5 : 5 + head.nc]).amax(-1)
    best, rows = scores.topk(min(SUREST, scores.shape[1]), 1)
    chosen = coefficients(raw, head).gather(1, rows[..., None].expand(-1, -1, head.nm))
    boxes = reference[..., :4].gather(1, rows[..., None].expand(-1, -1, 4))
    logits = torch.einsum("nbm,nmhw->nbhw", chosen, raw[-1])
    inside = _inside(boxes * 2 / head.strides[0], *logits.shape[2:])
    area = inside.sum((2, 3), keepdim=True).clamp_min(1)
    return logits.sigmoid() * inside * (best[..., None, None] / area).sqrt()


def _inside(boxes: Tensor, h: int, w: int) -> Tensor:
    """Return 1 in the pixels that boxes touch, (n, k, h, w).

    boxes: (n, k, 4), centre and size in pixels of the prototypes.
    """
    low, high = (boxes[..., :2] - boxes[..., 2:] / 2).floor(), (boxes[..., :2] + boxes[..., 2:] / 2).ceil()
    x, y = torch.arange(w, device=boxes.device), torch.arange(h, device=boxes.device)
    across = (x >= low[..., 0, None]) & (x < high[..., 0, None])
    down = (y >= low[..., 1, None]) & (y < high[..., 1, None])
    return (down[..., :, None] & across[..., None, :]).to(boxes)
