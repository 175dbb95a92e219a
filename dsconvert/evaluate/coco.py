"""COCO metrics through faster-coco-eval, which reimplements pycocotools' evaluation."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster
from numpy.typing import NDArray

from dsconvert.errors import InputError

Array = NDArray[np.floating[Any]]
CONFIDENCES = np.linspace(0, 1, 1001)[1:-1]


@dataclass(frozen=True)
class Metrics:
    """mAP over IoU 0.50..0.95 and at 0.50 (COCO's definitions, 100 detections an image); precision and recall at
    IoU 0.50 and the confidence where mean F1 over classes is best, counted in detections; AP50-95 by class number; why
    files could not be read, which are not among the images; and the mAP of masks, where a model has them and the
    labels are polygons."""

    map50_95: float
    map50: float
    precision: float
    recall: float
    images: int
    per_class: dict[int, float]
    skipped: tuple[str, ...] = ()
    mask_map50_95: float | None = None
    mask_map50: float | None = None


def coco_metrics(
    detections: Sequence[Array], truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int
) -> Metrics:
    """Per image: detections (n, 6) x1, y1, x2, y2, score, class; truths (m, 5) class, x1, y1, x2, y2, all in
    pixels of an image of shape (height, width). Raises InputError when there is no object to find."""
    return metrics_of(coco_tables(detections, truths, shapes, nc), len(shapes))


def coco_tables(
    detections: Sequence[Array], truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int
) -> dict[str, Any]:
    """The library's result: among others `precision` and `scores`, (IoU, recall level, class, area, limit), -1 for a
    class that has no object; besides, as `best_f1`, the mean precision and recall at one confidence. Arguments and
    error as `coco_metrics`."""
    if not sum(len(t) for t in truths):
        raise InputError("The images have no labels: there is nothing to measure accuracy against.")
    found = results(detections)
    tables = tables_of(ground_truth(truths, shapes, nc), found, "bbox")
    objects = np.bincount(np.concatenate([t[:, 0] for t in truths]).astype(int), minlength=nc)
    return {**tables, "best_f1": _best_f1(found, tables["matched"], objects)}


def tables_of(document: dict[str, Any], found: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    """The library's result for a document as `ground_truth` makes it and `results`; kind bbox, or segm where both have
    masks."""
    with contextlib.redirect_stdout(io.StringIO()):  # the library reports its progress on stdout
        coco = COCO(document)
        run = COCOeval_faster(coco, coco.loadRes(found), kind, print_function=lambda *_: None)
        run.evaluate()
        run.accumulate()
    return dict(run.eval)


def all_areas(tables: dict[str, Any]) -> NDArray[np.float64]:
    """Precision (IoU, recall level, class) over objects of every size, 100 detections an image."""
    return np.asarray(tables["precision"])[:, :, :, 0, -1]


def metrics_of(tables: dict[str, Any], images: int) -> Metrics:
    """Metrics from `coco_tables`."""
    precision = all_areas(tables)
    present = precision[0, 0] > -1
    per_class = {int(i): float(precision[:, :, i].mean()) for i in np.nonzero(present)[0]}
    map50_95, map50 = mean_precision(tables)
    p, r = tables["best_f1"]
    return Metrics(map50_95, map50, p, r, images, per_class)


def mean_precision(tables: dict[str, Any]) -> tuple[float, float]:
    """mAP50-95 and mAP50: the mean of `all_areas` over the classes that have objects."""
    precision = all_areas(tables)
    present = precision[0, 0] > -1
    return float(precision[:, :, present].mean()), float(precision[0][:, present].mean())


def ground_truth(truths: Sequence[Array], shapes: Sequence[tuple[int, int]], nc: int) -> dict[str, Any]:
    """Truths as `coco_metrics` takes them -> a COCO annotation document."""
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
        "categories": [{"id": i, "name": str(i)} for i in range(nc)],
    }


def results(detections: Sequence[Array]) -> list[dict[str, Any]]:
    """Detections as `coco_metrics` takes them -> COCO's list of results."""
    return [
        {"image_id": image, "category_id": int(kind), "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score}
        for image, boxes in enumerate(detections)
        for x1, y1, x2, y2, score, kind in boxes.tolist()
    ]


def _best_f1(
    found: list[dict[str, Any]], matched: Mapping[str, float], objects: NDArray[np.integer[Any]]
) -> tuple[float, float]:
    """Mean precision and recall over classes at the one confidence with the best mean F1.

    Counted in detections, not read off COCO's curve, whose precision at a recall is the best at any higher one.
    `matched` is the library's: the IoU by "detection_object", both counted from 1; objects (nc,) of each class."""
    hits = np.zeros(len(found), bool)
    hits[[int(pair.partition("_")[0]) - 1 for pair, overlap in matched.items() if overlap >= 0.5]] = True
    kinds, scores = (np.array([d[key] for d in found], float) for key in ("category_id", "score"))
    rows = []
    for kind in np.nonzero(objects)[0]:
        mine = np.nonzero(kinds == kind)[0]
        mine = mine[np.argsort(-scores[mine], kind="stable")]
        right = np.concatenate(([0], hits[mine].cumsum()))
        shown = np.searchsorted(-scores[mine], -CONFIDENCES, side="right")
        rows.append((right[shown] / np.maximum(shown, 1), right[shown] / objects[kind]))
    precision, recall = np.array(rows).transpose(1, 0, 2)  # class, confidence
    best = (2 * precision * recall / np.maximum(precision + recall, 1e-16)).mean(0).argmax()
    return float(precision[:, best].mean()), float(recall[:, best].mean())
