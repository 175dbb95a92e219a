"""The masks of a segmentation model: from coefficients and prototypes to pixels of the image, and their COCO metrics.

A box's mask is the part of the box where sigmoid(coefficients @ prototypes), scaled to the image by linear
interpolation, exceeds one half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import cv2
import numpy as np
from faster_coco_eval.core import mask as rle
from numpy.typing import NDArray

from dsconvert.base.size import Size, SizeLike
from dsconvert.onnxfile.bounds import Bounds
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.photos.images import Image, Letterbox
from dsconvert.scoring.coco import best_f1, ground_truth, matched, mean_precision, results, tables_of

Array = NDArray[np.float32]
Encoded = dict[str, Any]  # COCO's run lengths of a mask: size (h, w) and counts


@dataclass(frozen=True)
class Masks:
    """What a segmentation network gives for one image besides boxes.

    coefficients: (boxes, nm).
    prototypes: (nm, h, w), which cover the letterboxed image.
    """

    coefficients: Array
    prototypes: Array

    def placed(
        self, rows: Sequence[int], found: Array, box: Letterbox, size: Size, shape: tuple[int, int]
    ) -> Iterator[PlacedMask]:
        """Yield the masks of some boxes, one at a time.

        rows: the boxes' rows among the coefficients.
        found: (n, 4 or more) x1, y1, x2, y2 of the boxes, in pixels of the image.
        box: how the image was letterboxed.
        size: of the letterboxed image.
        shape: height and width of the image.
        """
        nm, h, w = self.prototypes.shape
        maps = self.prototypes.reshape(nm, -1)
        for row, corners in zip(rows, found[:, :4].tolist(), strict=True):
            yield _placed((self.coefficients[row] @ maps).reshape(h, w), corners, box, size, shape)


@dataclass(frozen=True)
class PlacedMask:
    """A mask in pixels of the image: `inside` (h, w) is bool, with its first pixel at `left`, `top`."""

    left: int
    top: int
    inside: NDArray[np.bool_]

    @property
    def window(self) -> tuple[slice, slice]:
        """The mask's rows and columns in the image."""
        h, w = self.inside.shape
        return slice(self.top, self.top + h), slice(self.left, self.left + w)

    def encoded(self, shape: tuple[int, int]) -> Encoded:
        """Return COCO's run lengths, column by column, over the whole image of (height, width), without making that
        image.
        """
        (h, w), (height, width) = self.inside.shape, shape
        columns = np.zeros((w, h + 1), np.int8)  # a 0 below each column ends every run within it
        columns[:, :h] = self.inside.T
        column, row = np.divmod(np.flatnonzero(np.diff(columns.ravel(), prepend=0)), h + 1)
        places = (self.left + column) * height + self.top + row  # indices where runs of 1 start and end, in turn
        # a run at a column's end may continue in the next column
        apart = np.append(places[1:-1:2] != places[2::2], True)
        ends = places[1::2][apart[: len(places) // 2]]
        starts = places[::2][np.append(True, apart[:-1])[: len(places) // 2]]
        turns = np.stack((starts, ends), 1).ravel()
        counts = np.diff(turns, prepend=0, append=height * width).tolist()
        return dict(rle.frPyObjects({"size": [height, width], "counts": counts}, height, width))

    def polygon(self) -> NDArray[np.float64]:
        """Return the corners (n, 2) of the outline of the mask's largest part, x and y in pixels.

        If no part has three corners, the corners of the window are returned.
        """
        h, w = self.inside.shape
        parts, _ = cv2.findContours(self.inside.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
        usable = [part.reshape(-1, 2) + 0.5 for part in parts if len(part) > 2]
        corners = np.array([(0, 0), (w, 0), (w, h), (0, h)], np.float64)
        largest = max(usable, key=lambda p: cv2.contourArea(p.astype(np.float32)), default=corners)
        return np.asarray(largest, np.float64) + np.array([self.left, self.top])


def _placed(logits: Array, corners: Sequence[float], box: Letterbox, input: Size, shape: tuple[int, int]) -> PlacedMask:
    """Return the mask of one box.

    Pixel X of the image lies at (gain (X + 1/2) + pad) / (input width / w) - 1/2 in the prototypes.
    """
    x1, y1, x2, y2 = corners
    left, top = max(int(np.floor(x1)), 0), max(int(np.floor(y1)), 0)
    size = max(min(int(np.ceil(x2)), shape[1]) - left, 0), max(min(int(np.ceil(y2)), shape[0]) - top, 0)
    if not all(size):
        return PlacedMask(left, top, np.zeros(size[::-1], np.bool_))
    sx, sy = logits.shape[1] / input.width, logits.shape[0] / input.height
    step_x, step_y = box.gain * sx, box.gain_y * sy
    matrix = np.array([
        [step_x, 0, step_x * (left + 0.5) + box.pad_x * sx - 0.5],
        [0, step_y, step_y * (top + 0.5) + box.pad_y * sy - 0.5],
    ])  # fmt: skip
    soft = 1 / (1 + np.exp(-np.clip(logits, -80, 80)))
    scaled = cv2.warpAffine(
        soft, matrix, size, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP, borderMode=cv2.BORDER_REPLICATE
    )
    return PlacedMask(left, top, scaled > 0.5)


@dataclass(frozen=True)
class MaskPredictor:
    """A segmentation model.

    Called with a batch of one image it is a `Predictor` and returns boxes as a detector does.

    run: returns boxes with coefficients (1, boxes, 5 + nc + nm), and prototypes (1, nm, h, w).
    bounds: of the stranger's file that it comes from, if any.
    form: of the images that it takes.
    """

    run: Callable[[Array], tuple[Array, Array]]
    nc: int
    bounds: Bounds | None = None
    form: InputForm = PLAIN

    def __call__(self, batch: Array) -> Array:
        return self.run(batch)[0][:, :, : 5 + self.nc]


def form_of(predict: object) -> InputForm:
    """Return the form of the images that a predictor takes."""
    form = getattr(predict, "form", PLAIN)
    return form if isinstance(form, InputForm) else PLAIN


def prepared(predict: object, image: Image, imgsz: SizeLike) -> tuple[Array, Letterbox]:
    """Return an RGB image (h, w, 3) as a batch of one in the predictor's form, and where the image lies in it."""
    form = form_of(predict)
    placed, box = form.place(image, *Size.of(imgsz).pair)
    return form.numbers(placed)[None], box


def look(predict: Callable[[Array], Array], batch: Array) -> tuple[Array, Masks | None]:
    """Run a predictor on a batch of one image: return (boxes, 5 + nc), and the masks of a segmentation model."""
    if not isinstance(predict, MaskPredictor):
        return predict(batch)[0], None
    found, prototypes = predict.run(batch)
    return found[0, :, : 5 + predict.nc], Masks(found[0, :, 5 + predict.nc :], prototypes[0])


def outlines(rows: Iterable[Sequence[float]], shape: tuple[int, int]) -> list[Encoded]:
    """Return the masks of labels from `labels.label_rows` in an image of (height, width); a box is filled."""
    h, w = shape
    found = []
    for _, *values in rows:
        if len(values) == 4:
            x, y, half_w, half_h = values[0], values[1], values[2] / 2, values[3] / 2
            values = [x - half_w, y - half_h, x + half_w, y - half_h, x + half_w, y + half_h, x - half_w, y + half_h]
        corners = (np.array(values).reshape(-1, 2) * (w, h)).flatten().tolist()
        found.append(dict(rle.merge(rle.frPyObjects([corners], h, w))))
    return found


def mask_precision(
    found: Sequence[Sequence[Encoded]], detections: Sequence[Array], outlined: Sequence[Sequence[Encoded]],
    truths: Sequence[NDArray[Any]], shapes: Sequence[tuple[int, int]], nc: int,
) -> tuple[float, float]:  # fmt: skip
    """Return mAP50-95 and mAP50 of masks, COCO's `segm`.

    found: the masks of the `detections`, by image.
    outlined: the masks of the `truths`, by image; detections and truths are as for `coco_metrics`.
    """
    document, listed = ground_truth(truths, shapes, nc), results(detections)
    for entry, mask in zip(document["annotations"], chain.from_iterable(outlined), strict=True):
        entry.update(segmentation=mask, area=float(rle.area(mask)))
    for entry, mask in zip(listed, chain.from_iterable(found), strict=True):
        del entry["bbox"]  # otherwise the library would use the box as the mask
        entry["segmentation"] = mask
    return mean_precision(tables_of(document, listed, "segm"))


def mask_f1(
    found: Sequence[Sequence[Encoded]], detections: Sequence[Array], outlined: Sequence[Sequence[Encoded]],
    truths: Sequence[NDArray[Any]],
) -> tuple[float, float]:  # fmt: skip
    """Return precision and recall of masks, as `coco.best_f1` does for boxes; arguments as for `mask_precision`."""
    given = zip(detections, truths, found, outlined, strict=True)
    hits = [matched(boxes, truth, _overlaps(masks, objects)) for boxes, truth, masks, objects in given]
    return best_f1(detections, truths, hits)


def _overlaps(first: Sequence[Encoded], second: Sequence[Encoded]) -> NDArray[np.float64]:
    """Return the IoU of masks, (n, m)."""
    if not len(first) or not len(second):
        return np.zeros((len(first), len(second)))
    return np.asarray(rle.iou(list(first), list(second), [0] * len(second)))
