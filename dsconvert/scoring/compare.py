"""Measure how far two models agree on images without labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from dsconvert.base.errors import InputError
from dsconvert.base.size import SizeLike
from dsconvert.onnxfile.bounds import made_of
from dsconvert.photos.images import Image
from dsconvert.scoring.accuracy import CONFIDENT, Predictor
from dsconvert.scoring.coco import coco_metrics, overlaps
from dsconvert.scoring.detect import DetectOptions, Found, sort_out
from dsconvert.scoring.masks import prepared
from dsconvert.yolo.boxes import LEAST

MATCHING = 0.5  # least IoU of two boxes that count as one object
MOST_SHIFT = 0.03  # of the mean best score; beyond it, a threshold chosen for one model does not suit the other
ROUNDING = 1e-6  # of scores, in float32


@dataclass(frozen=True)
class Matches:
    """Pairs of boxes that are one object: rows of the first model's boxes, rows of the second's, and their IoU."""

    first: list[int]
    second: list[int]
    iou: list[float]


@dataclass(frozen=True)
class Pictured:
    """What two models find in one image: objects that both find, only the first, or only the second."""

    matched: int
    only_first: int
    only_second: int


@dataclass(frozen=True)
class ScoreShift:
    """How confident two models are on the same images.

    first_best, second_best: mean over images of the best score, 0 where nothing is found.
    first_boxes, second_boxes: boxes that score more than CONFIDENT.
    """

    first_best: float
    second_best: float
    first_boxes: int
    second_boxes: int

    @property
    def shift(self) -> float:
        """The second model's mean best score minus the first's."""
        return self.second_best - self.first_best

    @property
    def large(self) -> bool:
        """Whether the shift deserves a warning."""
        return abs(self.shift) > MOST_SHIFT + ROUNDING

    def warning(self, first: str, second: str) -> str | None:
        """Return a warning if the shift is large, with the names that the models have in it."""
        if not self.large:
            return None
        return (
            f"the best score of an image is {self.first_best:.2f} on average with {first} and {self.second_best:.2f} "
            f"with {second}, so a confidence threshold that suits one does not suit the other."
        )


def score_shift(first: Sequence[Found], second: Sequence[Found], least: float = 0.0) -> ScoreShift:
    """Compare the scores of what two models found in each image, (n, 6) with the score in column 4.

    least: scores up to this are ignored. If one model was filtered by a higher threshold, give that one.
    """
    sides = [[boxes[boxes[:, 4] > least, 4] for boxes in found] for found in (first, second)]
    best = [float(np.mean([float(scores.max(initial=0)) for scores in side])) if side else 0.0 for side in sides]
    sure = [sum(int((scores > CONFIDENT).sum()) for scores in side) for side in sides]
    return ScoreShift(best[0], best[1], sure[0], sure[1])


@dataclass(frozen=True)
class Agreement:
    """Two models on the same images, object by object.

    images: what both find in each image.
    mean_iou: over matched objects; None if there are none.
    mean_shift, largest_shift: the second model's confidence minus the first's, over matched objects; None if there are
        none.
    map50_95: all that the second finds, measured against the first's objects; None if there are none.
    scores: how confident both are.
    """

    images: list[Pictured]
    mean_iou: float | None
    mean_shift: float | None
    largest_shift: float | None
    map50_95: float | None
    scores: ScoreShift

    @property
    def matched(self) -> int:
        """Number of objects that both find."""
        return sum(i.matched for i in self.images)

    @property
    def only_first(self) -> int:
        """Number of objects that only the first finds."""
        return sum(i.only_first for i in self.images)

    @property
    def only_second(self) -> int:
        """Number of objects that only the second finds."""
        return sum(i.only_second for i in self.images)

    @property
    def share(self) -> float:
        """Share of the objects found by either that both find."""
        return self.matched / (self.matched + self.only_first + self.only_second)


def compare(
    first: Predictor,
    second: Predictor,
    images: Iterable[Image],
    imgsz: SizeLike,
    options: DetectOptions,
    least: float = 0.0,
) -> Agreement:
    """Run two predictors on RGB images (h, w, 3), and measure how far they agree.

    imgsz: size of the images for the predictors.
    options: filter for both models' boxes. The objects of each are its confident boxes, so that a model agrees with
        itself completely.
    least: as for `score_shift`.

    Raises InputError when neither finds anything.
    """
    every: list[tuple[Found, Found]] = []
    shapes: list[tuple[int, int]] = []
    unsure = replace(options, confidence=min(LEAST, options.confidence))
    for image in images:
        shape = image.shape[:2]
        a, b = (
            made_of(predict, partial(sort_out, predict(batch)[0], box, shape, unsure), image.nbytes)
            for predict, (batch, box) in ((p, prepared(p, image, imgsz)) for p in (first, second))
        )
        every.append((a, b))
        shapes.append(shape)
    pairs = [(a[a[:, 4] > options.confidence], b[b[:, 4] > options.confidence]) for a, b in every]
    if not sum(len(a) + len(b) for a, b in pairs):
        raise InputError("Neither model finds anything with confidence in these images, so there is no agreement.")
    truths = [a[:, [5, 0, 1, 2, 3]].astype(np.float64) for a, _ in pairs]
    found = [b for _, b in every]
    nc = 1 + int(max(boxes[:, 5].max(initial=0) for pair in every for boxes in pair))
    accuracy = coco_metrics(found, truths, shapes, nc, options.most).map50_95 if sum(map(len, truths)) else None
    return agreement(pairs, accuracy, score_shift([a for a, _ in every], found, least))


def agreement(
    pairs: Sequence[tuple[Found, Found]], map50_95: float | None, scores: ScoreShift | None = None
) -> Agreement:
    """Return the agreement from both models' objects in each image.

    map50_95: see Agreement.
    scores: None takes the objects' scores.
    """
    matches = [match(a, b) for a, b in pairs]
    shifts = shifts_of(pairs, matches)
    ious = [iou for m in matches for iou in m.iou]
    images = [
        Pictured(len(m.iou), len(a) - len(m.iou), len(b) - len(m.iou)) for (a, b), m in zip(pairs, matches, strict=True)
    ]
    return Agreement(
        images,
        float(np.mean(ious)) if ious else None,
        float(np.mean(shifts)) if shifts else None,
        max(shifts, key=abs, default=None),
        map50_95,
        scores or score_shift([a for a, _ in pairs], [b for _, b in pairs]),
    )


def shifts_of(pairs: Sequence[tuple[Found, Found]], matches: Sequence[Matches]) -> list[float]:
    """Return the second model's confidence minus the first's, for every object that both find."""
    return [
        float(b[j, 4] - a[i, 4])
        for (a, b), m in zip(pairs, matches, strict=True)
        for i, j in zip(m.first, m.second, strict=True)
    ]


def match(a: Found, b: Found, least: float = MATCHING) -> Matches:
    """Pair boxes of the same class by falling IoU, down to `least`; no box is used twice."""
    found = Matches([], [], [])
    overlap = overlaps(a[:, :4], b[:, :4])
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
