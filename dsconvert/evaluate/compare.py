"""How far two models agree on images nobody labelled."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval.core import mask
from numpy.typing import NDArray

from dsconvert.errors import InputError
from dsconvert.evaluate.accuracy import Predictor
from dsconvert.evaluate.coco import coco_metrics
from dsconvert.evaluate.detect import DetectOptions, Found, sort_out
from dsconvert.yolo.boxes import non_max_suppression, to_image
from dsconvert.yolo.images import Image, letterbox, to_tensor

MATCHING = 0.5  # least IoU of two boxes that are the same object


@dataclass(frozen=True)
class Matches:
    """Pairs of boxes that are the same object: rows of the first's boxes, rows of the second's, their IoU."""

    first: list[int]
    second: list[int]
    iou: list[float]


@dataclass(frozen=True)
class Pictured:
    """What two models find in one image: objects both find, only the first, only the second."""

    matched: int
    only_first: int
    only_second: int


@dataclass(frozen=True)
class Agreement:
    """Two models on the same images, object by object. Shifts are the second's confidence less the first's, over
    matched objects (`largest_shift` the one farthest from 0); these and `mean_iou` are None where nothing matches.
    `map50_95` measures all that the second finds against the first's objects; None where there are none."""

    images: list[Pictured]
    mean_iou: float | None
    mean_shift: float | None
    largest_shift: float | None
    map50_95: float | None

    @property
    def matched(self) -> int:
        """Objects that both find."""
        return sum(i.matched for i in self.images)

    @property
    def only_first(self) -> int:
        """Objects that only the first finds."""
        return sum(i.only_first for i in self.images)

    @property
    def only_second(self) -> int:
        """Objects that only the second finds."""
        return sum(i.only_second for i in self.images)

    @property
    def share(self) -> float:
        """Of the objects that either finds, the share that both find."""
        return self.matched / (self.matched + self.only_first + self.only_second)


def compare(
    first: Predictor, second: Predictor, images: Iterable[Image], side: int, options: DetectOptions
) -> Agreement:
    """Run both on RGB images (h, w, 3), letterboxed to `side` pixels. Raises InputError when neither finds anything."""
    pairs: list[tuple[Found, Found]] = []
    every: list[Found] = []
    shapes: list[tuple[int, int]] = []
    for image in images:
        square, box = letterbox(image, side)
        shape = image.shape[:2]
        batch = to_tensor([square]).numpy()
        a, b = first(batch)[0], second(batch)[0]
        pairs.append((sort_out(a, box, shape, options), sort_out(b, box, shape, options)))
        every.append(to_image(non_max_suppression(b), box, shape))
        shapes.append(shape)
    if not sum(len(a) + len(b) for a, b in pairs):
        raise InputError("Neither model finds anything with confidence in these images, so there is no agreement.")
    truths = [a[:, [5, 0, 1, 2, 3]].astype(np.float64) for a, _ in pairs]
    nc = 1 + int(max(boxes[:, 5].max(initial=0) for boxes in (*every, *(a for a, _ in pairs))))
    accuracy = coco_metrics(every, truths, shapes, nc).map50_95 if sum(map(len, truths)) else None
    return agreement(pairs, accuracy)


def agreement(pairs: Sequence[tuple[Found, Found]], map50_95: float | None) -> Agreement:
    """From both models' objects in each image."""
    matches = [match(a, b) for a, b in pairs]
    shifts = [
        float(b[j, 4] - a[i, 4])
        for (a, b), m in zip(pairs, matches, strict=True)
        for i, j in zip(m.first, m.second, strict=True)
    ]
    overlaps = [iou for m in matches for iou in m.iou]
    images = [
        Pictured(len(m.iou), len(a) - len(m.iou), len(b) - len(m.iou)) for (a, b), m in zip(pairs, matches, strict=True)
    ]
    return Agreement(
        images,
        float(np.mean(overlaps)) if overlaps else None,
        float(np.mean(shifts)) if shifts else None,
        max(shifts, key=abs, default=None),
        map50_95,
    )


def match(a: Found, b: Found, least: float = MATCHING) -> Matches:
    """Pair boxes of the same class, the best overlap first, none twice, down to an IoU of `least`."""
    found = Matches([], [], [])
    if not len(a) or not len(b):
        return found
    overlap = mask.iou(_placed(a), _placed(b), [0] * len(b))
    overlap[a[:, None, 5] != b[None, :, 5]] = -1
    for flat in np.argsort(-overlap, axis=None, kind="stable").tolist():
        i, j = divmod(flat, len(b))
        if overlap[i, j] < least:
            break
        if i not in found.first and j not in found.second:
            found.first.append(i)
            found.second.append(j)
            found.iou.append(float(overlap[i, j]))
    return found


def _placed(boxes: Found) -> NDArray[np.float64]:
    """x, y, width, height."""
    return np.concatenate((boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]), 1).astype(np.float64)
