"""From a file's outputs to rows of boxes: by a rule of its family, or by the outputs' shapes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import numpy as np

from dsconvert.base.size import Size
from dsconvert.base.smallyaml import load_plain
from dsconvert.onnxfile.rules import RULES, Array, Unfit, has_cells, without_objectness

ROWS, COLUMNS, ENDS = "rows", "columns", "ends"
SHAPES = "(1, boxes, 5 + classes), (1, 4 + classes, boxes) or (1, boxes, 6)"  # that tell by themselves
USUAL_CLASSES = 80  # COCO's: what most published detectors find
SLACK = 0.1  # that a quantized file's scores may lie outside 0..1
NEGATIVE = 0.01  # share of boxes whose sides may be below 0 by a rounding


@cache
def usual_names() -> tuple[str, ...]:
    """COCO's classes."""
    text = (resources.files("dsconvert.onnxfile") / "coco.yaml").read_text(encoding="utf-8")
    return tuple(load_plain(text))


class OtherFamily(Unfit):
    """Outputs whose shapes do not tell what they are, of networks of the presets `names`."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__("outputs whose shapes tell what they are")
        self.names = names


def boxes_of(rule: str | None, outputs: Sequence[Array], size: Size, named: int) -> Array:
    """The outputs for one image of that size -> (boxes, 5 + classes), see `rules`; `named`: the number of classes that
    the file names, 0 where it names none. Raises Unfit."""
    if rule is not None:
        return RULES[rule](outputs, size)
    if names := families_like(outputs, size):
        raise OtherFamily(names)
    return _by_shape(outputs[0], size, named)


def check_scores(rows: Array) -> None:
    """Raises Unfit for rows whose scores are none: key points and angles may stand where classes do."""
    if rows.size and (rows[:, 4:].max() > 1 + SLACK or rows[:, 4:].min() < -SLACK):
        raise Unfit("scores in 0..1 behind the numbers of a box (key points and angles are not read)")


def families_like(outputs: Sequence[Array], size: Size) -> tuple[str, ...]:
    """Names of the presets whose networks give such outputs for one image; empty where shapes tell, as YOLOv5's do."""
    for rule, (names, looks) in _LIKE.items():
        try:
            if len(RULES[rule](outputs, size)) and looks(outputs):
                return names
        except Unfit:
            continue
    return ()


def _has_negative_sides(outputs: Sequence[Array]) -> bool:
    return bool((outputs[0][..., 2:4] < 0).mean() > NEGATIVE)


def _is_within_one(outputs: Sequence[Array]) -> bool:
    return bool(outputs[0][..., :4].max() <= 1 and outputs[0].min() >= 0)


def _has_shares(outputs: Sequence[Array]) -> bool:
    """Whether the classes of a map's cells are shares of one."""
    return len(outputs) == 1 and bool(np.allclose(outputs[0][0, 5:].sum(0), 1, atol=0.05))


# What outputs that fit a rule must look like besides, where YOLOv5's or others' might fit it too.
_LIKE: Mapping[str, tuple[tuple[str, ...], Callable[[Sequence[Array]], bool]]] = {
    "yolox": (("yolox",), _has_negative_sides),
    "v5lite": (("v5lite",), _is_within_one),
    "distances": (("nanodet", "picodet"), lambda outputs: True),
    "fastestdet": (("fastestdet",), _has_shares),
    "dfl": (("yolov8-heads", "yolov8-face"), lambda outputs: True),
}


def _by_shape(output: Array, size: Size, named: int) -> Array:
    layout = layout_of(output.shape, size, named)
    if output.ndim == 3 and len(output) != 1:
        layout = None
    if layout == COLUMNS:
        return without_objectness(output[0, :4].T, output[0, 4:].T)
    if layout == ENDS and _ends_in_classes(found := output.reshape(-1, 6)):
        return _of_ends(found, named or USUAL_CLASSES)
    if layout is None:
        raise Unfit(SHAPES)
    return output[0] if output.ndim == 3 else output


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
