"""Turn a file's outputs into rows of boxes, by the rule of its family or by the outputs' shapes."""

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
# shapes from which the form of the output is clear
SHAPES = "(1, boxes, 5 + classes), (1, 4 + classes, boxes) or (1, boxes, 6)"
USUAL_CLASSES = 80  # COCO's, which most published detectors find
SLACK = 0.1  # scores of a quantized file may lie so far outside 0..1
NEGATIVE = 0.01  # share of boxes whose sides may be negative by a rounding error


@cache
def usual_names() -> tuple[str, ...]:
    """Return COCO's class names."""
    text = (resources.files("dsconvert.onnxfile") / "coco.yaml").read_text(encoding="utf-8")
    return tuple(load_plain(text))


class OtherFamily(Unfit):
    """Outputs of networks of another family than YOLOv5's, which shapes do not tell.

    names: presets that fit them.
    """

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__("outputs whose shapes tell what they are")
        self.names = names


def boxes_of(rule: str | None, outputs: Sequence[Array], size: Size, named: int) -> Array:
    """Return the boxes (boxes, 5 + classes) in the outputs for one image (see `rules`).

    rule: name of the rule; None: by the outputs' shapes.
    size: of the image.
    named: number of classes that the file names, 0 if none.

    Raises Unfit when the outputs do not fit.
    """
    if rule is not None:
        return RULES[rule](outputs, size)
    if names := families_like(outputs, size):
        raise OtherFamily(names)
    return _by_shape(outputs[0], size, named)


def check_scores(rows: Array) -> None:
    """Raise Unfit for rows whose scores are not in 0..1: key points or angles may stand in the place of classes."""
    if rows.size and (rows[:, 4:].max() > 1 + SLACK or rows[:, 4:].min() < -SLACK):
        raise Unfit("scores in 0..1 behind the numbers of a box (key points and angles are not read)")


def families_like(outputs: Sequence[Array], size: Size) -> tuple[str, ...]:
    """Return the presets whose networks give such outputs for one image; none if shapes are clear, as YOLOv5's are."""
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
    """Return whether the class scores in each cell of a map add up to 1."""
    return len(outputs) == 1 and bool(np.allclose(outputs[0][0, 5:].sum(0), 1, atol=0.05))


# rule -> its presets, and a test that tells its outputs from those of YOLOv5 and other families
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
    """Return the form that the shape of the first output has; dimensions may be names.

    ROWS: YOLOv5's (1, boxes, 5 + classes).
    COLUMNS: YOLOv8's (1, 4 + classes, boxes).
    ENDS: (1, boxes, 6), corners, score and class, from a file that suppresses boxes itself.
    None: anything else.
    """
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
    """Return the number of classes in the first output of a file without names, 0 if its shape does not tell."""
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
    """Turn rows of corners, score and class (boxes, 6) into boxes; rows with a score of 0 only fill up the output."""
    kinds = found[:, 5].astype(np.int64)
    real = found[:, 4] > 0
    if not ((kinds[real] >= 0) & (kinds[real] < nc)).all():
        raise Unfit(f"classes below {nc}")
    rows = np.zeros((int(real.sum()), 5 + nc), np.float32)
    low, high = found[real, :2], found[real, 2:4]
    rows[:, :2], rows[:, 2:4], rows[:, 4] = (low + high) / 2, high - low, 1
    rows[np.arange(len(rows)), 5 + kinds[real]] = found[real, 4]
    return rows
