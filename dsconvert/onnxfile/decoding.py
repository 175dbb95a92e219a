"""From a file's outputs to rows of boxes: by a rule of its family, or by the outputs' shapes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from dsconvert.base.size import Size
from dsconvert.base.smallyaml import load_plain
from dsconvert.onnxfile.rules import RULES, Array, Unfit, has_cells, pyramid

ROWS, COLUMNS, ENDS = "rows", "columns", "ends"
USUAL_CLASSES = 80  # COCO's: what most published detectors find
NEGATIVE = 0.01  # share of boxes whose sides may be below 0 by a rounding


@cache
def usual_names() -> tuple[str, ...]:
    """COCO's classes."""
    text = (resources.files("dsconvert.onnxfile") / "coco.yaml").read_text(encoding="utf-8")
    return tuple(load_plain(text))


def boxes_of(rule: str | None, outputs: Sequence[Array], size: Size, named: int) -> Array:
    """The outputs for one image of that size -> (boxes, 5 + classes), see `rules`; `named`: the number of classes that
    the file names, 0 where it names none. Raises Unfit."""
    if rule is not None:
        return RULES[rule](outputs, size)
    layout = layout_of(outputs[0].shape, size, named)
    if layout == COLUMNS:
        return _of_columns(outputs[0][0])
    if layout == ENDS and _ends_in_classes(found := outputs[0].reshape(-1, 6)):
        return _of_ends(found, named or USUAL_CLASSES)
    if layout is None:
        raise Unfit("(1, boxes, 5 + classes), (1, 4 + classes, boxes) or (1, boxes, 6)")
    rows = outputs[0][0] if outputs[0].ndim == 3 else outputs[0]
    _refuse_raw(rows, size)
    return rows


def layout_of(shape: Sequence[Any], size: Size, named: int) -> str | None:
    """What the shape of the first output says; dimensions may be names. ROWS: YOLOv5's (1, boxes, 5 + classes);
    COLUMNS: YOLOv8's (1, 4 + classes, boxes); ENDS: the file suppresses boxes itself, (1, boxes, 6) of corners, score
    and class. None: something else."""
    if len(shape) == 2 and shape[1] == 6:
        return ENDS
    if len(shape) != 3:
        return None
    count, numbers = shape[1:]
    fixed = isinstance(count, int)
    if numbers == 6 and fixed and not has_cells(count, size):
        return ENDS
    if named and isinstance(numbers, int) and numbers == 5 + named:
        return ROWS
    if named:
        return COLUMNS if fixed and count == 4 + named else None
    if fixed and isinstance(numbers, int) and has_cells(count, size) and has_cells(numbers, size):
        return COLUMNS if count == 4 + USUAL_CLASSES and numbers != 5 + USUAL_CLASSES else ROWS
    if isinstance(numbers, int) and (not fixed or numbers < count or has_cells(count, size)):
        return ROWS if numbers >= 6 else None
    return COLUMNS if fixed and count >= 5 else None


def classes_of(shape: Sequence[Any], size: Size) -> int:
    """How many classes the shape of the first output of a file without names tells of; 0 where it leaves that open."""
    layout = layout_of(shape, size, 0)
    if layout == ENDS:
        return USUAL_CLASSES
    if layout == COLUMNS:
        return int(shape[1]) - 4
    return max(0, shape[2] - 5) if layout == ROWS and isinstance(shape[2], int) else 0


def _of_columns(found: Array) -> Array:
    """(4 + classes, boxes) of centre, sides and scores."""
    rows = found.T
    return np.concatenate((rows[:, :4], np.ones((len(rows), 1), np.float32), rows[:, 4:]), 1)


def _ends_in_classes(found: Array) -> bool:
    kinds = found[:, 5]
    return bool((kinds == np.rint(kinds)).all() and (found[:, 2:4] >= found[:, :2]).all())


def _of_ends(found: Array, nc: int) -> Array:
    """(boxes, 6) of corners, score and class; rows that fill up have a score of 0."""
    kinds = found[:, 5].astype(np.int64)
    real = found[:, 4] > 0
    if not ((kinds[real] >= 0) & (kinds[real] < nc)).all():
        raise Unfit(f"classes below {nc}")
    rows = np.zeros((int(real.sum()), 5 + nc), np.float32)
    low, high = found[real, :2], found[real, 2:4]
    rows[:, :2], rows[:, 2:4], rows[:, 4] = (low + high) / 2, high - low, 1
    rows[np.arange(len(rows)), 5 + kinds[real]] = found[real, 4]
    return rows


def _refuse_raw(rows: Array, size: Size) -> None:
    """Raises Unfit for rows of YOLOv5's form that are not its boxes: YOLOX's have sides below 0, and those of
    YOLOv5-Lite are all below 1."""
    if pyramid(len(rows), size, 1) and (rows[:, 2:4] < 0).mean() > NEGATIVE:
        raise Unfit("boxes with sides above 0, and these look as YOLOX gives them: give {input} yolox")
    if pyramid(len(rows), size, 3) and rows[:, :4].min() >= 0 and rows[:, :4].max() <= 1:
        raise Unfit("boxes in pixels, and these look as YOLOv5-Lite gives them: give {input} v5lite")
