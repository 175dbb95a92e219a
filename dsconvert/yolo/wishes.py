"""Objects that images made from nothing are asked to show: see `measure.synthesize`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base.size import Size
from dsconvert.yolo.network import Head

OBJECTS = 3  # an image

Doubt = Callable[[list[Tensor]], Tensor]


def wished(head: Head, images: int, size: Size, generator: torch.Generator) -> Doubt:
    """Draws OBJECTS objects an image, each of any class at any anchor of any cell of any level, and returns how much
    raw maps (n, na (5 + nc + nm), ny, nx) of `images` images of that size doubt them: the mean cross entropy
    of objectness and class. With one class its score means nothing (YOLOv5 does not train it)."""

    def draw(below: int) -> Tensor:
        return torch.randint(below, (images * OBJECTS,), generator=generator)

    image = torch.arange(images).repeat_interleave(OBJECTS)
    level, anchor, kind = draw(len(head.strides)), draw(head.na), draw(head.nc)
    strides = torch.tensor(head.strides)[level]
    row, column = ((torch.rand(len(level), generator=generator) * (n // strides)).long() for n in size.pair)

    def doubt(raw: list[Tensor]) -> Tensor:
        losses = []
        for index in range(len(head.strides)):
            at = level == index
            maps = raw[index].unflatten(1, (head.na, -1))
            boxes = maps[image[at], anchor[at], :, row[at], column[at]]  # (wishes, 5 + nc + nm)
            losses.append(F.softplus(-boxes[:, 4]))
            if head.nc > 1:
                losses.append(F.softplus(-boxes.gather(1, 5 + kind[at][:, None].to(boxes.device))[:, 0]))
        return torch.cat(losses).sum() / (images * OBJECTS)

    return doubt
