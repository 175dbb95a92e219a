"""Turn predictions into final detections: non-maximum suppression by class, and back to pixels of the image."""

from __future__ import annotations

from collections.abc import Collection

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.photos.images import Letterbox

Array = NDArray[np.float32]
LEAST, MOST = 0.001, 300  # least score, and most boxes of an image, of YOLOv5's val.py


def non_max_suppression(
    predictions: Array, confidence: float = LEAST, iou: float = 0.6, most: int = MOST, candidates: int = 30000
) -> Array:
    """Return the boxes that `suppressed` keeps of every class."""
    return suppressed(predictions, confidence, iou, most, candidates)[0]


def suppressed(
    predictions: Array,
    confidence: float = LEAST,
    iou: float = 0.6,
    most: int = MOST,
    candidates: int = 30000,
    *,
    best_class_only: bool = False,
    classes_kept: Collection[int] | None = None,
    agnostic: bool = False,
) -> tuple[Array, NDArray[np.int64]]:
    """Suppress overlapping boxes, with OpenCV's batched NMS.

    predictions: (boxes, 5 + nc), as decoded.
    confidence: a box takes part in each class whose score (objectness * class) exceeds this.
    iou: boxes that overlap a better one of their class by more than this are dropped.
    most: most boxes that are returned.
    candidates: most boxes that take part; the highest scores are kept.
    best_class_only: whether a box takes part only in its best class.
    classes_kept: only these classes; None: all.
    agnostic: whether boxes of different classes suppress each other too.

    Returns (n, 6) x1, y1, x2, y2, score, class, the best first, and for each its row of `predictions`.
    """
    places = np.flatnonzero(predictions[:, 4] > confidence)
    likely = predictions[places]
    scores = likely[:, 5:] * likely[:, 4:5]
    sure = scores > confidence
    if best_class_only and scores.size:
        sure &= np.arange(scores.shape[1]) == scores.argmax(1)[:, None]
    if classes_kept is not None:
        sure &= np.isin(np.arange(scores.shape[1]), list(classes_kept))
    rows, classes = np.nonzero(sure)
    values = scores[rows, classes]
    if values.size > candidates:
        best = np.argsort(-values, kind="stable")[:candidates]
        rows, classes, values = rows[best], classes[best], values[best]
    if not values.size:
        return np.zeros((0, 6), np.float32), np.zeros(0, np.int64)
    xywh = likely[rows, :4].astype(np.float64)
    corner = np.concatenate((xywh[:, :2] - xywh[:, 2:] / 2, xywh[:, 2:]), 1)
    groups = np.zeros_like(classes) if agnostic else classes
    kept = cv2.dnn.NMSBoxesBatched(
        corner.tolist(), values.astype(float).tolist(), groups.tolist(), float(confidence), float(iou)
    )
    order = np.asarray(kept, dtype=np.int64).reshape(-1)[:most]
    boxes = np.concatenate((corner[order, :2], corner[order, :2] + corner[order, 2:]), 1)
    found = np.concatenate((boxes, values[order, None], classes[order, None]), 1).astype(np.float32)
    return found, places[rows[order]]


def to_image(detections: Array, box: Letterbox, shape: tuple[int, int]) -> Array:
    """Move boxes from the rectangle that an image was placed in to the image of (height, width), clipped to it."""
    h, w = shape
    out = detections.copy()
    out[:, [0, 2]] = ((detections[:, [0, 2]] - box.pad_x) / box.gain).clip(0, w)
    out[:, [1, 3]] = ((detections[:, [1, 3]] - box.pad_y) / box.gain_y).clip(0, h)
    return out


def inside(boxes: Array) -> NDArray[np.bool_]:
    """Return which boxes from `to_image` have an area; boxes wholly in the letterbox's margin have none."""
    return np.all(boxes[:, 2:4] > boxes[:, :2], axis=1)
