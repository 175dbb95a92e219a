"""Decode the boxes of families of networks: one function for each rule, from the outputs for one image to rows.

A row is x, y (the centre), w, h in pixels of the input, objectness, and the score of each class. Families without
objectness have 1 there. Cells are ordered by row, then by column, and a cell's x and y count from 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.size import Size

Array = NDArray[np.float32]
# (outputs with a batch of one or without a batch, size of the input) -> (boxes, 5 + classes)
Rule = Callable[[Sequence[Array], Size], Array]

STRIDES = (8, 16, 32, 64, 128)
BINS = 16  # bins of the distance to each side in YOLOv8's heads
MOST_EXPONENT = 20.0  # largest exponent of a side: e^20 cells are larger than any image
# YOLOv5's anchors, (width, height), for strides 8, 16 and 32
ANCHORS = (
    ((10, 13), (16, 30), (33, 23)), ((30, 61), (62, 45), (59, 119)), ((116, 90), (156, 198), (373, 326)),
)  # fmt: skip


class Unfit(ValueError):
    """Outputs that a rule cannot decode; the message says what it expects."""


def grid(size: Size, stride: int) -> tuple[int, int]:
    """Return the rows and columns of cells."""
    return -(-size.height // stride), -(-size.width // stride)


def cells(size: Size, stride: int) -> Array:
    """Return the column and row of every cell, (n, 2)."""
    down, across = grid(size, stride)
    y, x = np.mgrid[:down, :across]
    return np.stack((x, y), -1).reshape(-1, 2).astype(np.float32)


def yolox(outputs: Sequence[Array], size: Size) -> Array:
    """Decode YOLOX: one output of rows, with centres in cells relative to their own, and logarithms of sides in cells.

    A file that was exported with its decoding has pixels there already.
    """
    rows = _rows(outputs[0])
    strides = pyramid(len(rows), size, 1)
    if rows.shape[1] < 6 or strides is None:
        raise Unfit("one output (1, cells, 5 + classes), a row for every cell of strides 8, 16 and 32")
    if rows[:, 2:4].max() > MOST_EXPONENT:
        return rows
    grids = [cells(size, s) for s in strides]
    places = np.concatenate(grids)
    scale = np.repeat(np.array(strides, np.float32), [len(g) for g in grids])[:, None]
    sides = np.exp(np.minimum(rows[:, 2:4], MOST_EXPONENT)) * scale
    return np.concatenate(((rows[:, :2] + places) * scale, sides, rows[:, 4:]), 1)


def distances(outputs: Sequence[Array], size: Size) -> Array:
    """Decode NanoDet and PicoDet.

    For every stride there is a map of class scores (cells, classes) and a map (cells, 4 bins) of distances to the four
    sides, in any order. A distance is its expected bin, in strides.
    """
    expects = "a map of scores and a map of distances to the four sides for every stride"
    if len(outputs) % 2:
        raise Unfit(expects)
    maps = [_rows(output) for output in outputs]
    scores = {len(m): m for m in maps if _are_scores(m)}
    sides = {len(m): m for m in maps if m.shape[1] % 4 == 0 and not _are_scores(m)}
    if not scores or scores.keys() != sides.keys() or 2 * len(scores) != len(maps):
        raise Unfit(expects)
    if len({m.shape[1] for m in scores.values()}) != 1:
        raise Unfit(expects)
    levels = []
    for count in sorted(scores, reverse=True):
        stride = next((s for s in STRIDES if np.prod(grid(size, s)) == count), None)
        if stride is None:
            raise Unfit(expects)
        boxes = _from_sides(expected(sides[count].reshape(count, 4, -1)), cells(size, stride), stride)
        levels.append(without_objectness(boxes, scores[count]))
    return np.concatenate(levels)


def fastestdet(outputs: Sequence[Array], size: Size) -> Array:
    """Decode FastestDet: one map of objectness, centre, sides and classes.

    Its score is objectness^0.6 * class^0.4.
    """
    found = outputs[0][0] if outputs[0].ndim == 4 else outputs[0]
    if found.ndim != 3 or len(found) < 6:
        raise Unfit("one map (1, 5 + classes, rows, columns)")
    down, across = found.shape[1:]
    rows = found.reshape(len(found), -1).T
    y, x = np.mgrid[:down, :across]
    extent = np.array([size.width, size.height], np.float32)
    share = np.array([size.width / across, size.height / down], np.float32)
    centres = (np.stack((x, y), -1).reshape(-1, 2) + np.tanh(rows[:, 1:3])) * share
    scores = np.concatenate((rows[:, :1].clip(0, 1) ** 0.6, rows[:, 5:].clip(0, 1) ** 0.4), 1)
    return np.concatenate((centres, sigmoid(rows[:, 3:5]) * extent, scores), 1).astype(np.float32)


def v5lite(outputs: Sequence[Array], size: Size) -> Array:
    """Decode YOLOv5-Lite, whose file ends with the sigmoid, with YOLOv5's boxes and anchors.

    Rows are ordered by stride, anchor and cell. A file that was exported with its decoding has pixels there already.
    """
    rows, strides = _rows(outputs[0]), (8, 16, 32)
    counts = [len(cells(size, s)) for s in strides]
    if rows.shape[1] < 6 or len(rows) != 3 * sum(counts):
        raise Unfit("one output (1, boxes, 5 + classes), with three boxes for every cell of strides 8, 16 and 32")
    if rows[:, :4].max() > 1:
        return rows
    levels, at = [], 0
    for stride, anchors, count in zip(strides, ANCHORS, counts, strict=True):
        level = rows[at : at + 3 * count].reshape(3, count, -1)
        centres = (level[..., :2] * 2 - 0.5 + cells(size, stride)) * stride
        sides = (level[..., 2:4] * 2) ** 2 * np.array(anchors, np.float32)[:, None]
        levels.append(np.concatenate((centres, sides, level[..., 4:]), 2).reshape(3 * count, -1))
        at += 3 * count
    return np.concatenate(levels)


def dfl(outputs: Sequence[Array], size: Size) -> Array:
    """Decode YOLOv8's heads: for every stride a map of 4 sides by 16 bins, and a logit for each class."""
    return _heads(outputs, size, None)


def faces(outputs: Sequence[Array], size: Size) -> Array:
    """Decode YOLOv8's heads for faces: one class, followed by key points, which are left out."""
    return _heads(outputs, size, 1)


def _heads(outputs: Sequence[Array], size: Size, nc: int | None) -> Array:
    expects = f"a map (1, {4 * BINS} + classes, rows, columns) for every stride"
    if not outputs:
        raise Unfit(expects)
    levels = []
    for found in sorted(outputs, key=lambda o: -o.size):
        stride = next((s for s in STRIDES if grid(size, s) == found.shape[2:]), None)
        if found.ndim != 4 or stride is None or found.shape[1] <= 4 * BINS:
            raise Unfit(expects)
        rows = found[0].reshape(found.shape[1], -1).T
        last = None if nc is None else 4 * BINS + nc
        boxes = _from_sides(expected(rows[:, : 4 * BINS].reshape(-1, 4, BINS)), cells(size, stride), stride)
        levels.append(without_objectness(boxes, sigmoid(rows[:, 4 * BINS : last])))
    if len({level.shape[1] for level in levels}) != 1:
        raise Unfit(expects)
    return np.concatenate(levels)


def expected(logits: Array) -> Array:
    """Return the expected bin 0, 1, ... under the softmax over the last dimension."""
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    mean: Array = (powers @ np.arange(logits.shape[-1], dtype=np.float32)) / powers.sum(-1)
    return mean


def sigmoid(values: Array) -> Array:
    """Return 1 / (1 + e^-x)."""
    made: Array = 1 / (1 + np.exp(-values.clip(-80, 80)))
    return made


def _from_sides(sides: Array, places: Array, stride: int) -> Array:
    """Turn distances (n, 4) from the middle of cells to left, top, right and bottom, in strides, into x, y, w, h."""
    low, high = places + 0.5 - sides[:, :2], places + 0.5 + sides[:, 2:]
    return np.concatenate(((low + high) / 2, high - low), 1) * np.float32(stride)


def without_objectness(boxes: Array, classes: Array) -> Array:
    """Return rows with an objectness of 1, from boxes (n, 4) and scores (n, classes)."""
    return np.concatenate((boxes, np.ones((len(boxes), 1), np.float32), classes), 1).astype(np.float32, copy=False)


def _are_scores(values: Array) -> bool:
    return bool(values.min() >= 0 and values.max() <= 1)


def _rows(output: Array) -> Array:
    """Reshape an output (1, n, m) or (n, m) to (n, m)."""
    rows = output[0] if output.ndim == 3 and len(output) == 1 else output
    if rows.ndim != 2 or not rows.size:
        raise Unfit("outputs of rows")
    return rows


def pyramid(count: int, size: Size, boxes: int) -> tuple[int, ...] | None:
    """Return the strides whose cells, with so many boxes each, give `count` rows; None if there are none."""
    for strides in PYRAMIDS:
        if boxes * sum(int(np.prod(grid(size, s))) for s in strides) == count:
            return strides
    return None


def has_cells(count: int, size: Size) -> bool:
    """Return whether `count` rows can be one to three boxes of every cell; otherwise the file has chosen among them."""
    if any(pyramid(count, size, boxes) for boxes in (1, 2, 3)):
        return True
    return size.height == size.width and any(int(np.prod(grid(size, s))) == count for s in STRIDES[:3])


PYRAMIDS = ((8, 16, 32), (8, 16, 32, 64), (16, 32), (4, 8, 16, 32), (8, 16), (16, 32, 64))
RULES: Mapping[str, Rule] = {
    "yolox": yolox, "distances": distances, "fastestdet": fastestdet, "v5lite": v5lite, "dfl": dfl, "faces": faces,
}  # fmt: skip
