"""Show a photo with two models' boxes: find the boxes that differ, and embed the photo."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.photos.images import Image, letterbox, read_image
from dsconvert.yolo.boxes import to_image

Array = NDArray[np.float32]
SAME_IOU = 0.5  # least IoU at which two boxes of one class are the same box
SIDES, QUALITIES = (640, 448, 320), (82, 65, 45, 25)  # of embedded photos: longest side in pixels, JPEG quality
MOST_BYTES = 96_000  # of an embedded photo


@dataclass(frozen=True)
class Box:
    """A box in pixels of the shown photo; `alone` means that the other model has no such box."""

    x: float
    y: float
    width: float
    height: float
    kind: int
    score: float
    alone: bool


@dataclass(frozen=True)
class Photo:
    """A photo as it is shown: name, JPEG as a data: URI, size in pixels, and both models' boxes, the best first."""

    name: str
    uri: str
    width: int
    height: int
    first: tuple[Box, ...]
    second: tuple[Box, ...]


def alone(first: Array, second: Array) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which of two models' boxes (n, 6) x1, y1, x2, y2, score, class have no partner among the other's.

    Partners have the same class and an IoU of at least SAME_IOU. Each box has at most one; larger overlaps pair first.
    """
    overlap = iou(first[:, :4], second[:, :4]) * (first[:, 5:6] == second[None, :, 5])
    lonely = np.ones(len(first), bool), np.ones(len(second), bool)
    rows, columns = np.nonzero(overlap >= SAME_IOU)
    for at in np.argsort(-overlap[rows, columns], kind="stable"):
        a, b = rows[at], columns[at]
        if lonely[0][a] and lonely[1][b]:
            lonely[0][a] = lonely[1][b] = False
    return lonely


def iou(a: Array, b: Array) -> NDArray[np.float64]:
    """Return the intersection over union of boxes (n, 4) and (m, 4), (n, m)."""
    one, two = a[:, None].astype(np.float64), b[None].astype(np.float64)
    sides = (np.minimum(one[..., 2:], two[..., 2:]) - np.maximum(one[..., :2], two[..., :2])).clip(0)
    inter = sides.prod(-1)
    areas = [(v[..., 2:] - v[..., :2]).clip(0).prod(-1) for v in (one, two)]
    return inter / np.maximum(areas[0] + areas[1] - inter, 1e-12)


def differing(first: Sequence[Array], second: Sequence[Array]) -> list[int]:
    """Return for each image the number of boxes without a partner."""
    return [sum(int(lonely.sum()) for lonely in alone(a, b)) for a, b in zip(first, second, strict=True)]


def load_photo(path: Path, size: Size, first: Array, second: Array) -> Photo:
    """Return a photo with the boxes that two models found in it, letterboxed to that size."""
    image = read_image(path)
    h, w = image.shape[:2]
    placed = letterbox(image, size)[1]
    data, (shown_h, shown_w) = small_jpeg(image)
    boxes = []
    for found, lonely in zip((first, second), alone(first, second), strict=True):
        scale = np.array([shown_w / w, shown_h / h] * 2)
        corners = to_image(found, placed, (h, w))[:, :4] * scale
        boxes.append(tuple(_box(c, f, bool(o)) for c, f, o in zip(corners, found, lonely, strict=True)))
    uri = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    return Photo(path.name, uri, shown_w, shown_h, boxes[0], boxes[1])


def _box(corners: NDArray[np.float64], found: Array, lonely: bool) -> Box:
    x1, y1, x2, y2 = (round(float(v), 1) for v in corners)
    return Box(x1, y1, round(x2 - x1, 1), round(y2 - y1, 1), int(found[5]), round(float(found[4]), 3), lonely)


def small_jpeg(image: Image, most: int = MOST_BYTES) -> tuple[bytes, tuple[int, int]]:
    """Return an RGB image (h, w, 3) as a JPEG of at most `most` bytes, and its height and width.

    Quality is reduced first, then size. Only pixels are kept, without place or camera. Raises InputError when even the
    smallest is too large.
    """
    h, w = image.shape[:2]
    for side, quality in product(SIDES, QUALITIES):
        gain = min(1.0, side / max(h, w))
        size = max(1, round(h * gain)), max(1, round(w * gain))
        shown = image if size == (h, w) else cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
        done, data = cv2.imencode(".jpg", shown[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
        if done and len(data) <= most:
            return data.tobytes(), size
    raise InputError("A photo cannot be made small enough to embed.")
