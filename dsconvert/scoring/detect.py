"""Find objects in images, and draw them, or write them as YOLO label lines or a COCO document."""

from __future__ import annotations

import colorsys
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError, Unusable
from dsconvert.base.size import Size, SizeLike
from dsconvert.base.text import Sentence, printable
from dsconvert.export.ends.nms import Nms
from dsconvert.onnxfile.bounds import made_of
from dsconvert.photos.dataset import SUFFIXES
from dsconvert.photos.images import Image, Letterbox
from dsconvert.scoring.accuracy import CONFIDENT, OVERLAP, Predictor
from dsconvert.scoring.masks import PlacedMask, look, prepared
from dsconvert.yolo.boxes import inside, suppressed, to_image

Found = NDArray[np.float32]  # (n, 6): x1, y1, x2, y2 in pixels of the image, score, class; sorted by falling score
NAME_LENGTH = 40  # characters of a class name that are drawn or printed
TINT = 0.4  # share of a mask's colour; the rest is the image
GOLDEN = 0.618034  # step on the colour circle that keeps any number of hues apart


@dataclass(frozen=True)
class DetectOptions:
    """What counts as a detection; the defaults are the same as in YOLOv5's detect.py.

    confidence: least score.
    iou: largest overlap with a better box of the same class.
    most: most boxes an image.
    classes: only these class numbers; None: all.
    agnostic: whether boxes of different classes suppress each other too.

    Raises InputError for values out of range.
    """

    confidence: float = CONFIDENT
    iou: float = OVERLAP
    most: int = 1000
    classes: frozenset[int] | None = None
    agnostic: bool = False

    def __post_init__(self) -> None:
        Nms(self.confidence, self.iou, self.most)  # checks the same limits with the same message

    def beyond(self, limits: Nms) -> Sentence | None:
        """Return the options that a file which suppresses boxes within `limits` cannot satisfy, or None."""
        asked = {
            "{conf_thres} {:g}": limits.confidence if self.confidence < limits.confidence else None,
            "{iou_thres} {:g}": limits.iou if self.iou > limits.iou else None,
            "{max_det} {}": limits.most if self.most > limits.most else None,
        }
        kept = {words: value for words, value in asked.items() if value is not None}
        return Sentence(", ".join(kept), *kept.values()) if kept else None


def find(predict: Predictor, image: Image, imgsz: SizeLike, options: DetectOptions) -> Found:
    """Return the objects in an RGB image (h, w, 3), which is brought to the model's input of `imgsz` pixels."""
    return find_masks(predict, image, imgsz, options)[0]


def find_masks(
    predict: Predictor, image: Image, imgsz: SizeLike, options: DetectOptions
) -> tuple[Found, tuple[PlacedMask, ...] | None]:
    """Return the objects as `find` does, and the masks that a segmentation model gives them."""
    size = Size.of(imgsz)
    batch, box = prepared(predict, image, size)
    predictions, masks = look(predict, batch)

    def sorted_out() -> tuple[Found, tuple[PlacedMask, ...] | None]:
        found, rows = _sorted_out(predictions, box, image.shape[:2], options)
        return found, None if masks is None else tuple(masks.placed(rows, found, box, size, image.shape[:2]))

    return made_of(predict, sorted_out, image.nbytes)


def sort_out(predictions: Found, box: Letterbox, shape: tuple[int, int], options: DetectOptions) -> Found:
    """Turn decoded boxes (boxes, 5 + nc) into the objects in an image of (height, width).

    Each box gets its best class only, as in YOLOv5's detect.py. Boxes wholly in the letterbox's margin are dropped.
    """
    return _sorted_out(predictions, box, shape, options)[0]


def _sorted_out(
    predictions: Found, box: Letterbox, shape: tuple[int, int], options: DetectOptions
) -> tuple[Found, list[int]]:
    """Return the objects, and the rows of `predictions` that they are."""
    sure, rows = suppressed(
        predictions, options.confidence, options.iou, options.most,
        best_class_only=True, classes_kept=options.classes, agnostic=options.agnostic,
    )  # fmt: skip
    placed = to_image(sure, box, shape)
    visible = inside(placed)
    return placed[visible], rows[visible].tolist()


def class_numbers(given: Sequence[str], names: Sequence[str]) -> frozenset[int] | None:
    """Return the class numbers that the user wrote as numbers or names, also separated by commas; None for none.

    names: of the model's classes; empty if unknown.

    Raises InputError for a number or a name that the model does not have.
    """
    parts = [part.strip() for text in given for part in ([text] if text in names else text.split(","))]
    chosen = set()
    for part in parts:
        if part.isdecimal() and len(part) < 6 and (not names or int(part) < len(names)):
            chosen.add(int(part))
        elif part in names:
            chosen.add(list(names).index(part))
        else:
            known = ", ".join(printable(n, NAME_LENGTH) for n in names[:10]) + (", ..." if len(names) > 10 else "")
            raise InputError.naming(
                "{classes}: the model has no class {}; its {} are {}.", part, len(names), known or "unnamed"
            )
    return frozenset(chosen) or None


def class_name(number: int, names: Sequence[str], ascii_only: bool = False) -> str:
    """Return a class's name, safe to print; `class 3` if the model has no name for it."""
    shown = printable(names[number], NAME_LENGTH, ascii_only) if number < len(names) else ""
    return shown or f"class {number}"


def counts(found: Sequence[Found]) -> dict[int, int]:
    """Return the number of objects by class number over all images, the most frequent class first."""
    numbers, how_many = np.unique(np.concatenate([f[:, 5] for f in found]), return_counts=True)
    order = np.argsort(-how_many, kind="stable")
    return {int(numbers[i]): int(how_many[i]) for i in order}


def yolo_lines(
    found: Found, shape: tuple[int, int], with_score: bool, masks: Sequence[PlacedMask] | None = None
) -> str:
    """Return one label line for each object, as YOLOv5 writes them: class, centre x, centre y, width, height.

    Values are shares of the image (h, w), with six digits.

    with_score: whether the score follows.
    masks: if given, the corners of each mask's outline replace the box.
    """
    h, w = shape
    lines = []
    for i, (x1, y1, x2, y2, score, kind) in enumerate(found.tolist()):
        values = [(x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h]
        if masks is not None:
            values = (masks[i].polygon() / (w, h)).flatten().tolist()
        values += [score] if with_score else []
        lines.append(" ".join([str(int(kind)), *(f"{v:.6g}" for v in values)]) + "\n")
    return "".join(lines)


def coco_document(
    files: Sequence[str], shapes: Sequence[tuple[int, int]], found: Sequence[Found], names: Sequence[str],
    outlines: Sequence[Sequence[Sequence[float]]] = (),
) -> dict[str, Any]:  # fmt: skip
    """Return a COCO document: images with their file names, categories, and annotations with a score.

    Class numbers are the model's (from 0). Boxes are x, y, width, height in pixels.

    outlines: by image and object, the outline of each mask x, y, x, y, ... in pixels; empty for boxes alone.
    """
    annotations: list[dict[str, Any]] = []
    for image, boxes in enumerate(found):
        for i, (x1, y1, x2, y2, score, kind) in enumerate(boxes.tolist()):
            w, h = x2 - x1, y2 - y1
            mask = {"segmentation": [[*outlines[image][i]]]} if outlines else {}
            annotations.append({
                "id": len(annotations) + 1, "image_id": image, "category_id": int(kind),
                "bbox": [round(v, 3) for v in (x1, y1, w, h)], "area": round(w * h, 3), "iscrowd": 0,
                "score": round(score, 5), **mask,
            })  # fmt: skip
    unnamed = {a["category_id"] for a in annotations} - set(range(len(names)))
    categories = [*enumerate(names), *((i, f"class {i}") for i in sorted(unnamed))]
    return {
        "images": [
            {"id": i, "file_name": name, "width": w, "height": h}
            for i, (name, (h, w)) in enumerate(zip(files, shapes, strict=True))
        ],
        "categories": [{"id": i, "name": name} for i, name in categories],
        "annotations": annotations,
    }


def draw(
    image: Image, found: Found, names: Sequence[str], thickness: int = 3, labels: bool = True, scores: bool = True,
    masks: Sequence[PlacedMask] | None = None,
) -> Image:  # fmt: skip
    """Return a copy of an RGB image with a box around every object, and name and score above it in the class's colour.

    masks: if given, one for each object, tint the image in the same colour.
    """
    drawn = image.copy()
    for mask, kind in zip(masks or (), found[:, 5].tolist(), strict=False):
        part = drawn[mask.window]
        part[mask.inside] = np.rint((1 - TINT) * part[mask.inside] + TINT * np.array(_colour(int(kind))))
    for x1, y1, x2, y2, score, kind in found[::-1].tolist():  # the best is drawn last, on top
        number = int(kind)
        colour = _colour(number)
        low, high = (round(x1), round(y1)), (round(x2), round(y2))
        cv2.rectangle(drawn, low, high, colour, thickness, cv2.LINE_AA)
        if labels:
            text = class_name(number, names) + (f" {score:.2f}" if scores else "")
            _label(drawn, text, low, colour, thickness)
    return drawn


def _colour(number: int) -> tuple[int, ...]:
    return tuple(round(255 * v) for v in colorsys.hsv_to_rgb((number * GOLDEN) % 1, 0.85, 1.0))


def _label(drawn: Image, text: str, corner: tuple[int, int], colour: tuple[int, ...], thickness: int) -> None:
    """Draw text on a filled background above the corner, or below it at the image's upper edge."""
    scale, pen = max(thickness, 1) / 6 + 0.2, max(thickness - 2, 1)
    (w, h), base = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, scale, pen)
    left = max(0, min(corner[0], drawn.shape[1] - w))
    top = corner[1] - h - base if corner[1] >= h + base else corner[1]
    cv2.rectangle(drawn, (left, top), (left + w, top + h + base), colour, cv2.FILLED)
    bright = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    ink = (0, 0, 0) if bright else (255, 255, 255)
    cv2.putText(drawn, text, (left, top + h), cv2.FONT_HERSHEY_SIMPLEX, scale, ink, pen, cv2.LINE_AA)


def encoded(image: Image, suffix: str) -> bytes:
    """Return the RGB image as a file of that kind (`.jpg`). Raises Unusable when OpenCV cannot write it."""
    try:
        done, data = cv2.imencode(suffix.lower(), np.ascontiguousarray(image[..., ::-1]))
    except cv2.error:
        done = False
    if not done:
        raise Unusable(f"An image of {image.shape[1]}x{image.shape[0]} pixels cannot be written as {suffix}.")
    return data.tobytes()


def names_below(paths: Sequence[Path]) -> list[PurePath]:
    """Return each path relative to the folder that contains all of them.

    Different files get different names, and no name leads out of the folder.
    """
    absolute = [os.path.abspath(p) for p in paths]
    root = os.path.commonpath([os.path.dirname(p) for p in absolute])
    return [PurePath(os.path.relpath(p, root)) for p in absolute]


def picture_name(name: PurePath) -> PurePath:
    """Return the name of the drawn image: the same, with `.jpg` added to a suffix that is not an image's."""
    return name if name.suffix.lower() in SUFFIXES else name.with_name(f"{name.name}.jpg")


def label_names(images: Sequence[PurePath]) -> list[PurePath]:
    """Return `a/b.txt` for `a/b.jpg`; a later image with the same stem keeps its suffix: `a/b.png.txt`."""
    taken: dict[PurePath, None] = {}
    for image in images:
        name, number = image.with_suffix(".txt"), 0
        while name in taken:
            number += 1
            name = image.with_name(f"{image.name}{number if number > 1 else ''}.txt")
        taken[name] = None
    return list(taken)
