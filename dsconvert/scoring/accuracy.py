"""Run predictors over labelled images and measure their accuracy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.onnxfile.bounds import made_of
from dsconvert.photos.images import none_readable, read_image
from dsconvert.photos.labels import Labelled, LabelRules, in_pixels, read_labelled
from dsconvert.scoring.coco import COCO_MOST, Metrics, coco_metrics
from dsconvert.scoring.masks import Encoded, MaskPredictor, form_of, look, mask_f1, mask_precision, outlines, prepared
from dsconvert.yolo.boxes import LEAST, MOST, inside, suppressed, to_image

# A predictor takes a float batch (1, 3, h, w) from `masks.prepared`, in 0..1 unless it has a form of its own. It
# returns (1, boxes, 5 + nc), as `decode` does.
CONFIDENT, OVERLAP = 0.25, 0.45  # YOLOv5's detect.py
VAL_OVERLAP = 0.6  # YOLOv5's val.py
Predictor = Callable[[NDArray[np.float32]], NDArray[np.float32]]


@dataclass(frozen=True)
class Detections:
    """What several predictors found in the same images, and the truth, in pixels of the original images.

    found: [predictor][image], (n, 6) x1, y1, x2, y2, score, class.
    truths: [image], (m, 5) class, x1, y1, x2, y2.
    shapes: [image], height and width.
    nc: number of classes.
    skipped: why other images could not be read.
    masks: [predictor][image], masks of the boxes, if labels are polygons; None for a detector.
    outlines: [image], masks of the labels, if these are polygons.
    most: detections of a class in an image that count for the mAP.
    read: the images' files.
    """

    found: list[list[NDArray[np.float32]]]
    truths: list[NDArray[np.float64]]
    shapes: list[tuple[int, int]]
    nc: int
    skipped: tuple[str, ...] = ()
    masks: Sequence[list[list[Encoded]] | None] = ()
    outlines: Sequence[list[Encoded]] = ()
    most: int = COCO_MOST
    read: Sequence[Path] = ()

    @property
    def measurable(self) -> bool:
        """Whether there is any object to find."""
        return any(len(truth) for truth in self.truths)

    def metrics(self, images: Sequence[int] | None = None) -> list[Metrics]:
        """Return the metrics of every predictor on the images with these indices; None: all.

        Repeated indices count again.
        """
        chosen = range(len(self.truths)) if images is None else images
        truths, shapes = [self.truths[i] for i in chosen], [self.shapes[i] for i in chosen]
        found = [
            coco_metrics([results[i] for i in chosen], truths, shapes, self.nc, self.most) for results in self.found
        ]
        for i, masks in enumerate(self.masks):
            if masks is not None:
                one = [masks[j] for j in chosen], [self.found[i][j] for j in chosen], [self.outlines[j] for j in chosen]
                (both, half), (p, r) = mask_precision(*one, truths, shapes, self.nc), mask_f1(*one, truths)
                found[i] = replace(
                    found[i], mask_map50_95=both, mask_map50=half, mask_precision=p, mask_recall=r
                )  # fmt: skip
        return [replace(m, skipped=self.skipped) for m in found]


def evaluate_predictors(
    predictors: Sequence[Predictor],
    paths: Sequence[Path],
    imgsz: SizeLike,
    nc: int,
    labelled: bool | Labelled = True,
    progress: Callable[[int, int], None] | None = None,
) -> list[Metrics]:
    """Return the metrics of every predictor on the same images (see `detect_all`).

    Raises InputError when there is no object to find.
    """
    found = detect_all(predictors, paths, imgsz, nc, labelled, progress)
    if not labelled and not found.measurable:
        raise InputError("The first model finds nothing with confidence in these images, so there is no agreement.")
    return found.metrics()


def most_overlap(overlap: float | None, labelled: bool) -> float:
    """Return how far two boxes of a class may overlap: `overlap`, or else a default of YOLOv5.

    With labels it is val.py's. Without labels it is detect.py's: then the truth is a part of what the first model
    finds, and a model agrees with itself completely.
    """
    return (VAL_OVERLAP if labelled else OVERLAP) if overlap is None else overlap


def detect_all(
    predictors: Sequence[Predictor],
    paths: Sequence[Path],
    imgsz: SizeLike,
    nc: int,
    labelled: bool | Labelled = True,
    progress: Callable[[int, int], None] | None = None,
    confidence: float = LEAST,
    overlap: float | None = None,
) -> Detections:
    """Run every predictor on the same images; each image is read once and brought into each predictor's form.

    predictors: see Predictor.
    paths: the images.
    imgsz: their size for the predictors.
    nc: number of classes.
    labelled: where the truth comes from. Labels given here replace `paths` by their own images. True reads the labels
        beside the images. False takes what the first predictor finds with confidence; metrics then measure agreement.
    confidence, overlap: boxes with scores up to `confidence`, and boxes that overlap a better one of their class by
        more than `overlap` (see `most_overlap`), are dropped first, as val.py does.

    Masks of segmentation models are measured if labels are polygons. Files that cannot be read are left out and
    counted. Under torchrun every process runs a part of the images and gets the results of all.

    Raises InputError when no image can be read. Without labels there may be nothing to find (see `measurable`).
    """
    size = Size.of(imgsz)
    found: list[list[NDArray[np.float32]]] = [[] for _ in predictors]
    truths, shapes = [], []
    skipped: list[str] = []
    masked = [bool(labelled) and isinstance(p, MaskPredictor) for p in predictors]
    labels = read_labelled(paths, LabelRules(nc), any(masked)) if labelled is True else labelled
    if labels:
        paths = labels.paths
    outlined = any(masked) and labels is not False and labels.has_polygons
    masks: list[list[list[Encoded]] | None] = [[] if outlined and m else None for m in masked]
    contours: list[list[Encoded]] = []
    read: list[Path] = []
    forms = {form_of(predict): predict for predict in predictors}
    part = workers.share(len(paths))
    mine, truth = paths[part], labels.labels[part] if labels else ()
    for index, path in enumerate(mine):
        try:
            image = read_image(path)
        except InputError as error:
            skipped.append(str(error))
            continue
        h, w = image.shape[:2]
        read.append(path)
        shapes.append((h, w))
        ready = {form: prepared(predict, image, size) for form, predict in forms.items()}
        given = [ready[form_of(predict)] for predict in predictors]
        looked = [look(predict, batch) for predict, (batch, _) in zip(predictors, given, strict=True)]
        if any(p.shape[1] != nc + 5 for p, _ in looked):
            raise InputError(f"A model finds another number of classes than the {nc} it is measured on.")
        for predict, results, (_, box), (raw, said), encoded in zip(
            predictors, found, given, looked, masks, strict=True
        ):
            most = most_overlap(overlap, bool(labelled))
            boxes, rows = made_of(predict, partial(suppressed, raw, confidence, most), image.nbytes)
            placed = to_image(boxes, box, (h, w))
            results.append(placed if labelled else placed[inside(placed)])
            if said is not None and encoded is not None:
                masked_boxes = said.placed(rows.tolist(), placed, box, size, (h, w))
                encoded.append([mask.encoded((h, w)) for mask in masked_boxes])
        if labelled:
            truths.append(in_pixels(truth[index].boxes, h, w))
            if outlined:
                contours.append(outlines(truth[index].rows, (h, w)))
        else:
            sure = found[0][-1][found[0][-1][:, 4] > CONFIDENT]
            truths.append(sure[:, [5, 0, 1, 2, 3]].astype(np.float64))
        if progress:
            progress(index + 1, len(mine))
    everyone = workers.gathered(Detections(found, truths, shapes, nc, tuple(skipped), masks, contours, read=read))
    whole = Detections(
        [[boxes for d in everyone for boxes in d.found[i]] for i in range(len(predictors))],
        [truth for d in everyone for truth in d.truths], [shape for d in everyone for shape in d.shapes],
        nc, tuple(reason for d in everyone for reason in d.skipped),
        [None if m is None else [image for d in everyone for image in d.masks[i] or ()] for i, m in enumerate(masks)],
        [image for d in everyone for image in d.outlines], COCO_MOST if labelled else MOST,
        [path for d in everyone for path in d.read],
    )  # fmt: skip
    if not whole.shapes:
        raise none_readable(whole.skipped)
    return whole
