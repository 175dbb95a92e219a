"""Rows of label files, and whether long rows are polygons or boxes with key points.

A row of 15 columns may be a polygon of 7 corners, or a box with 5 key points. Long rows count as boxes with key points
if nearly all of them have one length and hold their points inside their boxes. Points of two numbers need one more
sign: read as polygons, most rows must be odd. A polygon is odd if edges cross, if the first corner lies between the
others, or if the second one (width and height) lies far from them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

MOST_POINTS = 1000  # key points of an object
MOST_ROWS = 400  # rows that are examined as polygons
ALIKE = 0.9  # share of the rows that must have one length, and of these that must be valid as boxes with key points
ODD = 0.5  # share of these that must be odd as polygons
NEAR, BEYOND = 0.1, 0.01  # how far a point may lie outside its box, in widths and heights of it; and outside the image
Points = NDArray[np.float64]
# sets of key-point lengths, by whether a row is valid with three numbers a point, and with two
HELD = {(three, two): frozenset([3] * three + [2] * two) for three in (False, True) for two in (False, True)}


@dataclass(frozen=True, slots=True)
class Row:
    """A row of a label file.

    kind: class.
    columns: how many.
    line: its number in the file.
    first: the four numbers behind the class.
    around: the box (centre x, centre y, width, height) around all its points.
    held_as: numbers of a key point (2 or 3) with which the row is valid as a box with key points.
    numbers: all numbers behind the class, if they may be needed.
    """

    kind: float
    columns: int
    line: int
    first: list[float]
    around: list[float]
    held_as: frozenset[int] = frozenset()
    numbers: Points | None = None


def rows_of(values: Sequence[list[float]], lines: Sequence[int], keep: bool) -> list[Row]:
    """Return the rows of a file from all numbers of each row, and its line numbers.

    keep: whether the numbers of long rows will be needed.
    """
    rows: list[Row | None] = [None] * len(values)
    for columns, places in _by_length(values).items():
        if columns == 5:
            for i in places:
                rows[i] = Row(values[i][0], 5, lines[i], values[i][1:], values[i][1:])
            continue
        numbers = np.array([values[i][1:] for i in places])
        points = numbers[:, : (columns - 1) // 2 * 2].reshape(len(places), -1, 2)
        low, high = points.min(1), points.max(1)
        around = np.concatenate(((low + high) / 2, high - low), 1).tolist()
        three, two = _hold(numbers, 3).tolist(), _hold(numbers, 2).tolist()
        for i, box, own, in_threes, in_twos in zip(places, around, numbers, three, two, strict=True):
            held = HELD[in_threes, in_twos]
            needed = own.copy() if held or keep else None
            rows[i] = Row(values[i][0], columns, lines[i], values[i][1:5], box, held, needed)
    return [row for row in rows if row is not None]


def _by_length(values: Sequence[list[float]]) -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for i, row in enumerate(values):
        found.setdefault(len(row), []).append(i)
    return found


def key_points_of(rows: Iterable[Row]) -> tuple[int, int] | None:
    """Return how many key points the objects have and how many numbers each, or None if rows are polygons."""
    long = [row for row in rows if row.columns > 5]
    if not long:
        return None
    columns, count = Counter(row.columns for row in long).most_common(1)[0]
    alike = [row for row in long if row.columns == columns]
    if count < ALIKE * len(long):
        return None
    for each in (3, 2):
        held = [row for row in alike if each in row.held_as]
        if len(held) < ALIKE * count:
            continue
        odd = [each == 3 or _is_odd(row.numbers) for row in held[:MOST_ROWS] if row.numbers is not None]
        if sum(odd) >= ODD * len(odd):
            return (columns - 5) // each, each
    return None


def _hold(numbers: Points, each: int) -> NDArray[np.bool_]:
    """Return for each row whether its numbers are a box in the image with points of `each` numbers in it.

    A point is x and y, and perhaps 0 (not labelled), 1 (hidden) or 2 (seen). Points without a place are zero or
    negative.
    """
    count, rest = divmod(numbers.shape[1] - 4, each)
    if rest or not 0 < count <= MOST_POINTS:
        return np.zeros(len(numbers), np.bool_)
    centre, size = numbers[:, None, :2], numbers[:, None, 2:4]
    low, high = centre - size / 2, centre + size / 2
    points = numbers[:, 4:].reshape(len(numbers), count, each)
    places = points[:, :, :2]
    inside: NDArray[np.bool_] = np.all((places >= low - NEAR * size) & (places <= high + NEAR * size), axis=2)
    good = (size > 0).all((1, 2)) & (low >= -BEYOND).all((1, 2)) & (high <= 1 + BEYOND).all((1, 2))
    missing = (places <= 0).all(2)
    good &= np.all(inside | missing, axis=1) & np.any(inside, axis=1)
    if each == 3:
        good &= np.isin(points[:, :, 2], (0, 1, 2)).all(1)
    return np.asarray(good, np.bool_)


def _is_odd(numbers: Points) -> bool:
    """Return whether nobody would draw this polygon: x, y, x, y, ..."""
    corners = numbers.reshape(-1, 2)
    if corners.min() < -BEYOND or corners.max() > 1 + BEYOND:
        return True
    if len(corners) > 3 and (corners[0] == corners[-1]).all():
        corners = corners[:-1]  # the polygon is closed
    others = np.delete(corners, 1, axis=0)
    low, high = others.min(0), others.max(0)
    if ((corners[1] < low - (high - low)) | (corners[1] > high + (high - low))).any():
        return True
    if len(corners) > 4:
        hull = cv2.convexHull(corners[2:].astype(np.float32))
        x, y = corners[0].tolist()
        if len(hull) > 2 and cv2.pointPolygonTest(hull, (x, y), False) > 0:
            return True
    return _crosses(corners)


def _crosses(corners: Points) -> bool:
    """Return whether two edges of the closed line cross between their ends."""
    a, b = corners, np.roll(corners, -1, 0)

    def side(start: Points, end: Points, point: Points) -> Points:
        along, to = end - start, point - start
        return np.sign(along[..., 0] * to[..., 1] - along[..., 1] * to[..., 0])

    parts: Sequence[Points] = (a[:, None], b[:, None], a[None], b[None])
    p, q, r, s = parts
    return bool(((side(p, q, r) * side(p, q, s) < 0) & (side(r, s, p) * side(r, s, q) < 0)).any())
