"""COCO metrics by faster-coco-eval, a reimplementation of pycocotools' evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from faster_coco_eval.core import mask
from numpy.typing import NDArray

from dsconvert.base.errors import InputError

Array = NDArray[np.floating[Any]]
CONFIDENCES = np.linspace(0, 1, 1001)[1:-1]
FOUND = 0.5  # least IoU at which a box finds an object, for precision and recall
COCO_MOST = 100  # detections of a class in an image that count for COCO's mAP


@dataclass(frozen=True)
class Metrics:
    """The accuracy of one model.

    map50_95, map50: mAP over IoU 0.50..0.95, and at 0.50 (COCO's definition, 100 detections an image).
    precision, recall: at IoU 0.50 and the confidence with the best mean F1 over classes (see `matched` and `best_f1`).
    images: measured on.
    per_class: class number -> AP50-95.
    skipped: why other files could not be read.
    mask_...: the same for masks, if the model has them and the labels are polygons.
    """

    map50_95: float
    map50: float
    precision: float
    recall: float
    images: int
    per_class: dict[int, float]
    skipped: tuple[str, ...] = ()
    mask_map50_95: float | None = None
    mask_map50: float | None = None
    mask_precision: float | None = None
    mask_recall: float | None = None


def coco_metrics(
    detections: Sequence[Array], truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int,
    most: int = COCO_MOST,
) -> Metrics:  # fmt: skip
    """Measure detections against the truth, image by image.

    detections: (n, 6) x1, y1, x2, y2, score, class.
    truths: (m, 5) class, x1, y1, x2, y2.
    shapes: (height, width); boxes are in pixels of these images.
    nc: number of classes.
    most: detections of a class in an image that count for the mAP; the highest scores are kept.

    Raises InputError when there is no object to find.
    """
    return metrics_of(coco_tables(detections, truths, shapes, nc, most), len(shapes))


def coco_tables(
    detections: Sequence[Array], truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int,
    most: int = COCO_MOST,
) -> dict[str, Any]:  # fmt: skip
    """Return the library's result for the arguments of `coco_metrics`, which raises the same error.

    It has `precision` and `scores` (IoU, recall level, class, area, limit) for the `classes` that have objects.
    `best_f1` is added: mean precision and recall at one confidence.
    """
    if not sum(len(t) for t in truths):
        raise InputError("The images have no labels: there is nothing to measure accuracy against.")
    tables = tables_of(ground_truth(truths, shapes, nc), results(detections), "bbox", most)
    hits = [matched(d, t, overlaps(d[:, :4], t[:, 1:])) for d, t in zip(detections, truths, strict=True)]
    return {**tables, "classes": with_objects(truths, nc), "best_f1": best_f1(detections, truths, hits)}


def with_objects(truths: Sequence[Array], nc: int) -> list[int]:
    """Return the classes below nc that have objects.

    Tables of all classes of a file with ten thousand would take gigabytes.
    """
    return sorted({int(kind) for truth in truths for kind in truth[:, 0].tolist() if kind < nc})


def tables_of(
    document: dict[str, Any], found: list[dict[str, Any]], kind: str, most: int = COCO_MOST
) -> dict[str, Any]:
    """Return the library's result for a document of `ground_truth` and a list of `results`.

    kind: bbox, or segm if both have masks.
    most: see `coco_metrics`.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # the library prints its progress to stdout
        coco = COCO(document)
        run = COCOeval_faster(coco, coco.loadRes(found), kind, print_function=lambda *_: None)
        run.params.maxDets = [most]
        run.evaluate()
        run.accumulate()
    return dict(run.eval)


def all_areas(tables: dict[str, Any]) -> NDArray[np.float64]:
    """Return the precision (IoU, recall level, class) over objects of every size."""
    return np.asarray(tables["precision"])[:, :, :, 0, -1]


def metrics_of(tables: dict[str, Any], images: int) -> Metrics:
    """Return the metrics in the tables of `coco_tables`."""
    precision = all_areas(tables)
    present = precision[0, 0] > -1
    classes = tables["classes"]
    per_class = {classes[i]: float(precision[:, :, i].mean()) for i in np.nonzero(present)[0]}
    map50_95, map50 = mean_precision(tables)
    p, r = tables["best_f1"]
    return Metrics(map50_95, map50, p, r, images, per_class)


def mean_precision(tables: dict[str, Any]) -> tuple[float, float]:
    """Return mAP50-95 and mAP50: the mean of `all_areas` over the classes that have objects."""
    precision = all_areas(tables)
    present = precision[0, 0] > -1
    return float(precision[:, :, present].mean()), float(precision[0][:, present].mean())


def ground_truth(truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int) -> dict[str, Any]:
    """Turn truths, as `coco_metrics` takes them, into a COCO annotation document."""
    annotations: list[dict[str, Any]] = []
    for image, boxes in enumerate(truths):
        for kind, x1, y1, x2, y2 in boxes.tolist():
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(kind), "iscrowd": 0,
                "bbox": [x1, y1, x2 - x1, y2 - y1], "area": (x2 - x1) * (y2 - y1),
            })  # fmt: skip
    images = [{"id": i, "height": h, "width": w} for i, (h, w) in enumerate(shapes)]
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": str(i)} for i in with_objects(truths, nc)],
    }


def results(detections: Sequence[Array]) -> list[dict[str, Any]]:
    """Turn detections, as `coco_metrics` takes them, into COCO's list of results."""
    return [
        {"image_id": image, "category_id": int(kind), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, boxes in enumerate(detections)
        for x1, y1, x2, y2, score, kind in boxes.tolist()
    ]


def overlaps(first: Array, second: Array) -> NDArray[np.float64]:
    """Return the IoU (n, m) of boxes (n, 4) and (m, 4), each x1, y1, x2, y2."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    sized = [np.concatenate((b[:, :2], b[:, 2:] - b[:, :2]), 1).astype(np.float64) for b in (first, second)]
    return np.asarray(mask.iou(*sized, [0] * len(second)))


def matched(found: Array, truth: Array, overlap: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Return which detections (n, 6) of an image find one of its objects (m, 5).

    Detections are taken by falling score. Each one takes the free object of its class that it overlaps most, if the
    overlap is at least FOUND. So an object is found once, and further boxes on it count as wrong. These are COCO's
    matches at FOUND; of equal overlaps the last is taken.

    overlap: IoU, (n, m).
    """
    free = np.where((found[:, None, 5] == truth[None, :, 0]) & (overlap >= FOUND), overlap, 0)
    hits = np.zeros(len(found), bool)
    near = np.nonzero(free.any(1))[0]
    for i in near[np.argsort(-found[near, 4], kind="stable")].tolist():
        best = len(truth) - 1 - int(free[i, ::-1].argmax())
        if free[i, best]:
            hits[i] = True
            free[:, best] = 0
    return hits


def best_f1(
    detections: Sequence[Array], truths: Sequence[Array], hits: Sequence[NDArray[np.bool_]]
) -> tuple[float, float]:
    """Return the mean precision and recall over the classes with objects, at the one confidence with the best mean F1.

    Of equal F1 the lowest confidence is taken. Detections that score at least the confidence count. They are counted
    one by one, because precision on COCO's curve is the best at any higher recall.

    hits: which detections of each image find an object.
    """
    found, right = np.concatenate([*detections]), np.concatenate([*hits])
    kinds, objects = np.unique(np.concatenate([t[:, 0] for t in truths]), return_counts=True)
    rows = []
    for kind, count in zip(kinds, objects, strict=True):
        mine = found[:, 5] == kind
        shown, good = (_at_least(found[chosen, 4], CONFIDENCES) for chosen in (mine, mine & right))
        rows.append((good / np.maximum(shown, 1), good / count))
    precision, recall = np.array(rows).transpose(1, 0, 2)  # class, confidence
    f1 = (2 * precision * recall / np.maximum(precision + recall, 1e-16)).mean(0)
    best = f1.round(12).argmax()  # equal values may differ in their last bits
    return float(precision[:, best].mean()), float(recall[:, best].mean())


def _at_least(scores: Array, limits: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return how many scores are at least each limit."""
    return len(scores) - np.searchsorted(np.sort(scores), limits, side="left")
