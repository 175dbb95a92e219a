"""Read label files as YOLOv5 users have them. docs/datasets.md has the rules.

A row is a class and a box (four numbers), a polygon's corners, or a box with key points. The last two may have the same
number of columns. So all rows of a data set are examined before any is read as one or the other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.base.notes import note
from dsconvert.base.textfile import NotText, read_text
from dsconvert.photos.keypoints import Row, key_points_of, rows_of

Labels = NDArray[np.float64]
MAX_LABEL_BYTES, MAX_LABEL_ROWS = 8 << 20, 100_000
OUTSIDE = 0.01  # share of the image by which a label may exceed it, for rounding
FORM = "a label is a class and four numbers, or a class and a polygon's corners"


@dataclass(frozen=True)
class LabelRules:
    """How labels are read.

    nc: number of classes.
    renumber: the model's number of each class of the data; None: the same.
    key_points: as in `DataYaml`.
    strict: whether unusable labels are refused instead of left out.
    """

    nc: int
    renumber: tuple[int, ...] | None = None
    key_points: tuple[int, int] | None = None
    strict: bool = False


@dataclass(frozen=True)
class ImageLabels:
    """One image's objects.

    boxes: (n, 5) class, centre x, centre y, width, height in 0..1.
    polygons: each object's corners x, y, x, y, ..., or None for one that is only a box; None if none were asked for or
        found.
    """

    boxes: Labels
    polygons: tuple[NDArray[np.float64] | None, ...] | None = None

    @property
    def rows(self) -> list[list[float]]:
        """The labels as written: class, then a box or a polygon's corners."""
        rows: list[list[float]] = self.boxes.tolist()
        if self.polygons is None:
            return rows
        return [r if p is None else [r[0], *p.tolist()] for r, p in zip(rows, self.polygons, strict=True)]


@dataclass(frozen=True)
class Labelled:
    """Images with their usable labels, and the number of label files."""

    paths: tuple[Path, ...]
    labels: tuple[ImageLabels, ...]
    files: int

    @property
    def has_polygons(self) -> bool:
        """Whether polygons were asked for and any object has one."""
        return any(label.polygons is not None for label in self.labels)


def label_path(image: Path) -> Path:
    """Return the label file by YOLOv5's rule: the path's last `images` folder becomes `labels`, the suffix .txt."""
    parts = list(image.parts)
    for i in range(len(parts) - 2, -1, -1):
        if parts[i] == "images":
            parts[i] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def label_files(images: Sequence[Path]) -> list[Path | None]:
    """Return each image's label file, or None.

    It is found by YOLOv5's rule for the path as it is, or else for the path that links lead to. If no image has one,
    files beside the images are taken.
    """
    found = [next((p for p in _places(image) if os.path.exists(p)), None) for image in images]
    if not any(found):
        found = [p if os.path.isfile(p := image.with_suffix(".txt")) else None for image in images]
    return found


def _places(image: Path) -> Iterable[Path]:
    yield label_path(image)
    yield label_path(Path(os.path.realpath(image)))


def read_labelled(images: Sequence[Path], rules: LabelRules, polygons: bool = False) -> Labelled:
    """Read the labels of all images.

    An image with unusable labels is left out as in YOLOv5, with one warning for all, or refused if labels are strict.

    polygons: whether to keep them.

    Raises InputError when no image is left.
    """
    found: list[_File] = []
    bad: dict[int, InputError] = {}
    for i, file in enumerate(files := label_files(images)):
        try:
            found.append(_parsed(file, polygons) if file else _File(Path(), []))
        except InputError as error:
            if rules.strict:
                raise
            bad[i] = error
            found.append(_File(Path(), []))
    points = _key_points([row for parsed in found for row in parsed.rows], rules)
    paths, labels, twice = [], [], 0
    for i in (i for i in range(len(found)) if i not in bad):
        try:
            labels.append(_labels(found[i], rules, points, polygons))
        except InputError as error:
            if rules.strict:
                raise
            bad[i] = error
        else:
            paths.append(images[i])
            twice += len(found[i].rows) - len(labels[-1].boxes)
    if bad and not paths:
        raise InputError(f"None of the {len(bad)} label files can be used; the first: {bad[min(bad)]}")
    if bad:
        note(f"{len(bad)} of {len(images)} images are left out, as their labels cannot be used; the first: "
             f"{bad[min(bad)]}")  # fmt: skip
    if twice:
        note(f"{twice} labels stand twice in their file; each counts once.")
    return Labelled(tuple(paths), tuple(labels), sum(file is not None for file in files))


def read_labels(path: Path, nc: int) -> Labels:
    """Return (n, 5) class, centre x, centre y, width, height in 0..1; polygons become their boxes; no file gives no
    objects.

    Raises InputError, with file and line, if a row is malformed or its class is not 0..nc-1.
    """
    return _one(path, nc, False).boxes


def label_rows(path: Path, nc: int) -> list[list[float]]:
    """Return the labels as written, in 0..1: class, then centre x, centre y, width, height, or a polygon's corners.

    Raises InputError as `read_labels` does.
    """
    return _one(path, nc, True).rows


def _one(path: Path, nc: int, polygons: bool) -> ImageLabels:
    parsed = _parsed(path, polygons) if os.path.exists(path) else _File(path, [])
    return _labels(parsed, LabelRules(nc), key_points_of(parsed.rows), polygons)


def in_pixels(labels: Labels, h: int, w: int) -> NDArray[np.float64]:
    """Turn class, cx, cy, w, h in 0..1 into class, x1, y1, x2, y2 in pixels of an image of height h and width w."""
    centre, half = labels[:, 1:3], labels[:, 3:5] / 2
    return np.concatenate((labels[:, :1], (centre - half) * (w, h), (centre + half) * (w, h)), 1)


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """The rows of a label file, in order."""

    path: Path
    rows: list[Row]


def _parsed(path: Path, polygons: bool) -> _File:
    """Return a file's rows. Raises InputError for a file that cannot be read, and for rows that are not numbers."""
    try:
        lines = read_text(path, MAX_LABEL_BYTES).splitlines()
    except NotText as error:
        raise InputError(f"{path} is not a readable label file: it {error}.") from None
    except OSError as error:
        raise InputError(f"{path} is not a readable label file: {error.strerror}.") from None
    rows: list[list[float]] = []
    places: list[int] = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words:
            continue
        if len(rows) == MAX_LABEL_ROWS:
            raise InputError(f"{path} has more than {MAX_LABEL_ROWS} labels.")
        try:
            values = [float(word) for word in words]
        except ValueError:
            values = []
        if len(values) < 5 or not all(map(math.isfinite, values)):
            commas = "; numbers have decimal points, no commas" if "," in line else ""
            raise InputError(f"{path}, line {number}: {FORM}{commas}.")
        rows.append(values)
        places.append(number)
    return _File(path, rows_of(rows, places, polygons))


def _labels(file: _File, rules: LabelRules, points: tuple[int, int] | None, polygons: bool) -> ImageLabels:
    """Return a file's labels. Raises InputError for rows that are not valid."""
    boxes = [_box(file.path, row, rules, points) for row in file.rows]
    first: dict[tuple[float, ...], int] = {}  # where each label occurs first
    for i, (box, row) in enumerate(zip(boxes, file.rows, strict=True)):
        first.setdefault((*box, row.columns), i)
    kept = list(first.values())
    outlined = [_polygon(file.rows[i]) for i in kept] if points is None and polygons else []
    return ImageLabels(
        np.array([boxes[i] for i in kept]).reshape(-1, 5),
        tuple(outlined) if any(p is not None for p in outlined) else None,
    )


def _box(path: Path, row: Row, rules: LabelRules, points: tuple[int, int] | None) -> list[float]:
    """Return class, centre x, centre y, width and height of a row."""
    place = f"{path}, line {row.line}"
    if points is not None and row.columns not in (5, 5 + points[0] * points[1]):
        raise InputError(
            f"{place}: a label here is a class, four numbers and {points[0]} key points of {points[1]} numbers each, "
            f"but the line has {row.columns} numbers."
        )
    if points is None and row.columns % 2 == 0:
        raise InputError(f"{place}: {FORM}, but the line has {row.columns} numbers.")
    values = row.first if points is not None or row.columns == 5 else row.around
    if row.kind != int(row.kind) or not 0 <= row.kind < rules.nc:
        raise InputError(f"{place}: class {row.kind:g} is not one of the model's {rules.nc}.")
    if min(values) < -OUTSIDE or max(values) > 1 + OUTSIDE:
        raise InputError(f"{place}: a label's numbers are shares of the image, from 0 to 1.")
    if min(values[2:]) < 0:
        raise InputError(f"{place}: a box's width and height are not negative.")
    return [float(rules.renumber[int(row.kind)] if rules.renumber else row.kind), *values]


def _polygon(row: Row) -> NDArray[np.float64] | None:
    return row.numbers if row.columns > 5 else None


def _key_points(rows: Sequence[Row], rules: LabelRules) -> tuple[int, int] | None:
    """Return the key points that data.yaml declares, or that the rows show; report it if there are any."""
    points = rules.key_points or key_points_of(rows)
    if points is not None and any(row.columns > 5 for row in rows):
        note(f"The labels are boxes with {points[0]} key points of {points[1]} numbers each; only the boxes count.")
    return points
