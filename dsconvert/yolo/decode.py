"""From Detect's raw maps to boxes in pixels (YOLOv5's published box equations), and how far two results differ."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.yolo.masks import coefficients, mask_measure
from dsconvert.yolo.network import Head


def sigmoids(raw: list[Tensor], head: Head) -> list[tuple[Tensor, Tensor]]:
    """Per level the sigmoids of boxes (n, na, 4, ny, nx) and scores (n, na, 1 + nc, ny, nx); 1 for a class that is
    untrained, so that objectness times class is the score of every network.

    `raw` is one map a level, or a box map and a score map a level (see `lower.split_detect`), and perhaps a third of
    mask coefficients; then the prototypes come last."""
    maps, step = raw[:-1] if head.nm else raw, len(head.parts)
    if len(maps) == len(head.strides):
        whole = [t.unflatten(1, (head.na, sum(head.parts)))[:, :, : head.nc + 5].sigmoid() for t in maps]
        return [(p[:, :, :4], _meant(p[:, :, 4:], head)) for p in whole]
    pairs = zip(maps[::step], maps[1::step], strict=True)
    return [(_by_anchor(box, head).sigmoid(), _meant(_by_anchor(score, head).sigmoid(), head)) for box, score in pairs]


def _meant(scores: Tensor, head: Head) -> Tensor:
    """Objectness and class scores (n, na, 1 + nc, ny, nx) as they are to be read."""
    if not head.class_untrained:
        return scores
    return torch.cat((scores[:, :, :1], torch.ones_like(scores[:, :, 1:])), 2)


def _by_anchor(value: Tensor, head: Head) -> Tensor:
    return value.unflatten(1, (head.na, -1))


def decode(raw: list[Tensor], head: Head) -> Tensor:
    """Raw maps -> (n, boxes, 5 + nc): x, y, w, h in input pixels, objectness, class scores (0..1); then the mask
    coefficients, where there are any.

    xy = (2 sigmoid(t) - 0.5 + cell) * stride,  wh = (2 sigmoid(t))^2 * anchor. Boxes run over levels, then
    anchors, then rows, then columns: the order of YOLOv5's own output.
    """
    levels = []
    for (boxes, scores), stride, anchors in zip(sigmoids(raw, head), head.strides, head.anchors, strict=True):
        n, _, _, ny, nx = boxes.shape
        box, score = boxes.permute(0, 1, 3, 4, 2), scores.permute(0, 1, 3, 4, 2)
        gy, gx = torch.meshgrid(torch.arange(ny), torch.arange(nx), indexing="ij")
        cell = torch.stack((gx, gy), -1).to(box) - 0.5
        sizes = torch.tensor(anchors, dtype=box.dtype, device=box.device)[:, None, None]
        xy = (box[..., :2] * 2 + cell) * stride
        wh = (box[..., 2:] * 2) ** 2 * sizes
        levels.append(torch.cat((xy, wh, score), -1).reshape(n, -1, head.nc + 5))
    boxes = torch.cat(levels, 1)
    return torch.cat((boxes, coefficients(raw, head)), 2) if head.nm else boxes


def detection_measure(raw: list[Tensor], reference: list[Tensor], head: Head) -> list[Tensor]:
    """Numbers whose squared change is the damage to the detections: every anchor's class scores (objectness times
    class), and its box's centre and size relative to the box, weighted by the root of its best score.

    The weights, and the box sizes that centres are relative to, come from the `reference` maps. The damage to masks is
    measured besides, see `mask_measure`."""
    parts: list[Tensor] = []
    given = zip(sigmoids(raw, head), sigmoids(reference, head), head.strides, head.anchors, strict=True)
    for (box, score), (box0, score0), stride, anchors in given:
        weight = (score0[:, :, :1] * score0[:, :, 1:]).amax(2, keepdim=True).sqrt()
        sizes = torch.tensor(anchors, dtype=box.dtype, device=box.device)[None, :, :, None, None]
        pixels = ((box0[:, :, 2:] * 2) ** 2 * sizes).clamp_min(4.0)  # no box is as small as that
        centre = box[:, :, :2] * (2 * stride) / pixels
        size = 2 * box[:, :, 2:].clamp_min(1e-4).log()
        parts += [score[:, :, :1] * score[:, :, 1:], weight * centre, weight * size]
    return [*parts, mask_measure(raw, decode(reference, head), head)] if head.nm else parts


def whole_maps(raw: list[Tensor], head: Head) -> list[Tensor]:
    """One map a level (n, na * (5 + nc), ny, nx), whichever of the forms that `sigmoids` takes is given."""
    if len(raw) == len(head.strides):
        return raw
    parts = [t.unflatten(1, (head.na, -1)) for t in raw]
    return [torch.cat(pair, 2).flatten(1, 2) for pair in zip(parts[::2], parts[1::2], strict=True)]
