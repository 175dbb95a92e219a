"""Turn Detect's raw maps into boxes in pixels (YOLOv5's published equations), and measure how far two results
differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.yolo.masks import coefficients, mask_measure
from dsconvert.yolo.network import Head


def sigmoids(raw: list[Tensor], head: Head) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Return for each level the sigmoids of boxes (n, na, 4, ny, nx), objectness (n, na, 1, ny, nx) and classes (n, na,
    nc, ny, nx).

    An untrained class gets 1, so that objectness times class is the score of every network.

    raw: one map a level, or one map a level for each part of a box (see `lower.split_detect`); then the prototypes of a
        segmentation network.
    """
    maps, step = raw[:-1] if head.nm else raw, len(head.parts)
    if len(maps) == len(head.strides):
        whole = [t.unflatten(1, (head.na, sum(head.parts)))[:, :, : head.nc + 5].sigmoid() for t in maps]
        levels = [(p[:, :, :4], p[:, :, 4:5], p[:, :, 5:]) for p in whole]
    else:
        parts = ([t.unflatten(1, (head.na, -1)).sigmoid() for t in maps[part::step]] for part in range(3))
        levels = list(zip(*parts, strict=True))
    if head.class_untrained:
        levels = [(box, objectness, torch.ones_like(classes)) for box, objectness, classes in levels]
    return levels


def decode(raw: list[Tensor], head: Head) -> Tensor:
    """Decode raw maps to (n, boxes, 5 + nc): x, y, w, h in input pixels, objectness and class scores (0..1).

    Mask coefficients follow, if there are any.

        xy = (2 sigmoid(t) - 0.5 + cell) * stride,    wh = (2 sigmoid(t))^2 * anchor

    Boxes are ordered by level, anchor, row and column, as in YOLOv5's own output.
    """
    levels = []
    for parts, stride, anchors in zip(sigmoids(raw, head), head.strides, head.anchors, strict=True):
        box, objectness, classes = (part.permute(0, 1, 3, 4, 2) for part in parts)
        n, _, ny, nx, _ = box.shape
        gy, gx = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        cell = torch.stack((gx, gy), -1).to(box) - 0.5
        sizes = torch.tensor(anchors, dtype=box.dtype, device=box.device)[:, None, None]
        xy = (box[..., :2] * 2 + cell) * stride
        wh = (box[..., 2:] * 2) ** 2 * sizes
        levels.append(torch.cat((xy, wh, objectness, classes), -1).reshape(n, -1, head.nc + 5))
    boxes = torch.cat(levels, 1)
    return torch.cat((boxes, coefficients(raw, head)), 2) if head.nm else boxes


def detection_measure(raw: list[Tensor], reference: list[Tensor], head: Head) -> list[Tensor]:
    """Return numbers whose squared change is the damage to the detections.

    For every anchor these are the class scores (objectness times class), and the box's centre and size relative to the
    box, weighted by the square root of its best score. The weights, and the sizes that centres are relative to, come
    from the `reference` maps. The damage to masks is added by `mask_measure`.
    """
    parts: list[Tensor] = []
    given = zip(sigmoids(raw, head), sigmoids(reference, head), head.strides, head.anchors, strict=True)
    for (box, objectness, classes), (box0, objectness0, classes0), stride, anchors in given:
        weight = (objectness0 * classes0).amax(2, keepdim=True).sqrt()
        sizes = torch.tensor(anchors, dtype=box.dtype, device=box.device)[None, :, :, None, None]
        pixels = ((box0[:, :, 2:] * 2) ** 2 * sizes).clamp_min(4.0)  # no box is smaller than this
        centre = box[:, :, :2] * (2 * stride) / pixels
        size = 2 * box[:, :, 2:].clamp_min(1e-4).log()
        parts += [objectness * classes, weight * centre, weight * size]
    return [*parts, mask_measure(raw, decode(reference, head), head)] if head.nm else parts


def whole_maps(raw: list[Tensor], head: Head) -> list[Tensor]:
    """Return one map a level (n, na * (5 + nc), ny, nx) from either form that `sigmoids` takes."""
    if len(raw) == len(head.strides):
        return raw
    parts = [t.unflatten(1, (head.na, -1)) for t in raw]
    step = len(head.parts)
    return [torch.cat(parts[i : i + step], 2).flatten(1, 2) for i in range(0, len(parts), step)]
