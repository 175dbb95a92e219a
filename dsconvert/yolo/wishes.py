"""The objects that synthesised images are asked to show (see `measure.synthesize`)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base.size import Size
from dsconvert.yolo.network import Head

OBJECTS = 3  # in an image

Doubt = Callable[[list[Tensor]], Tensor]


def wished(head: Head, images: int, size: Size, generator: torch.Generator) -> Doubt:
    """Draw OBJECTS objects for each image, and return a function that measures how much raw maps doubt them.

    An object has any class, at any anchor of any cell of any level. The doubt of raw maps (n, na (5 + nc + nm), ny, nx)
    is the mean cross entropy of objectness and class. A single class is left out, as YOLOv5 does not train its score.
    """

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
