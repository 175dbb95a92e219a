"""Write the decoding of raw maps to boxes as ONNX nodes, in float, with the equations of `yolo.decode`.

The maps of all levels are joined into one table of boxes while they are still bytes, a quarter of float's size. Then
the table is dequantized, each row with its level's grid, and decoded in one go.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.size import Size
from dsconvert.export.written import Place
from dsconvert.yolo.lower import PARTS
from dsconvert.yolo.network import Head

SHORT = 16  # bytes a box, up to which one Transpose is faster than a Split


@dataclass(frozen=True)
class Decoded:
    """Names of the parts of all boxes.

    box: (n, boxes, 4), centre and size in pixels.
    objectness: (n, boxes, 1), 0..1.
    classes: (n, boxes, nc), 0..1; all 1 where the only class is untrained.
    masks: (n, boxes, nm), the mask coefficients; empty for a detector.
    """

    box: str
    objectness: str
    classes: str
    masks: tuple[str, ...] = ()

    def all(self) -> list[str]:
        """Return the names in the order of an output row."""
        return [self.box, self.objectness, self.classes, *self.masks]


def add_decode(b: OnnxBuilder, raw: Sequence[Place], head: Head, imgsz: Size) -> Decoded:
    """Write the nodes from raw maps to boxes.

    raw: one map a level, of na * no channels; or one map a level for each part of a box (see `lower.split_detect`).
    """
    grids = [imgsz.over(stride) for stride in head.strides]
    step = len(head.parts)
    if len(raw) > len(head.strides):
        box, objectness, classes, *masks = (
            _table(b, raw[i::step], f"detect.{part}", head.na, columns, grids, part != "mask")
            for i, (part, columns) in enumerate(zip(PARTS, head.parts, strict=False))
        )
    else:
        whole = _table(b, raw, "detect", head.na, sum(head.parts), grids, not head.nm)
        box, objectness, classes, *masks = names = [f"detect.{part}" for part in PARTS[:step]]
        b.nodes.append(helper.make_node("Split", [whole, b.shape(*head.parts)], names, axis=2))
        if masks:
            box, objectness, classes = (b.node("Sigmoid", [name], f"{name}.sigmoid") for name in names[:3])
    if head.class_untrained:  # a score cannot exceed 1, so this makes all of them 1
        classes = b.node("Max", [classes, b.scalar(1.0)], "detect.meant")
    return Decoded(_pixels(b, box, head, grids), objectness, classes, tuple(masks))


def _pixels(b: OnnxBuilder, box: str, head: Head, grids: Sequence[Size]) -> str:
    """Turn sigmoids s (n, boxes, 4) into pixels.

        centre = 2 stride s + cell,    size = 4 anchor s^2

    Both are written as s * linear + cell + s^2 * square, with zeros where a term does not apply: cutting s into centre
    and size would cost more time.
    """
    linear = [[(2 * stride, 2 * stride, 0, 0)] * head.na for stride in head.strides]
    square = [[(0, 0, 4 * w, 4 * h) for w, h in level] for level in head.anchors]
    first = b.node("Mul", [box, _rows(b, linear, "detect.linear", grids)], "detect.s")
    first = b.node("Add", [first, _cells(b, head, grids)], "detect.placed")
    second = b.node("Mul", [box, box], "detect.s2")
    second = b.node("Mul", [second, _rows(b, square, "detect.square", grids)], "detect.sized")
    return b.node("Add", [first, second], "detect.pixels")


def _table(
    b: OnnxBuilder, maps: Sequence[Place], name: str, na: int, columns: int, grids: Sequence[Size], sigmoid: bool = True
) -> str:
    """Join raw maps of na * columns channels, one a level, into (n, boxes, columns).

    sigmoid: whether to apply the sigmoid.
    """
    run, runs = _runs(grids)
    levels: list[str] = []
    for i, (raw, grid) in enumerate(zip(maps, grids, strict=True)):
        if raw.last:
            levels += _by_anchor(b, raw, f"{name}.{i}", na, columns, grid, (run, runs[i]))
            continue
        last = raw.name
        if columns > 1:  # with one number a box there is nothing to reorder
            split = b.node("Reshape", [raw.name, b.shape(0, na, columns, *grid.pair)], f"{name}.{i}.split")
            last = b.node("Transpose", [split], f"{name}.{i}.last", perm=[0, 1, 3, 4, 2])
        levels.append(b.node("Reshape", [last, b.shape(0, na * runs[i], run * columns)], f"{name}.{i}.runs"))
    joined = b.node("Concat", levels, f"{name}.raw", axis=1)
    steps = [raw.grid for raw in maps if raw.grid is not None]
    if steps:
        repeats = [na * count for count in runs]
        scale = b.constant(np.repeat(np.array([g.scale for g in steps], np.float32), repeats))
        zero = b.constant(np.repeat(np.array([g.zero_point for g in steps], np.uint8), repeats))
        joined = b.node("DequantizeLinear", [joined, scale, zero], f"{name}.real")  # axis 1
    if sigmoid:
        joined = b.node("Sigmoid", [joined], f"{name}.sigmoid")
    return b.node("Reshape", [joined, b.shape(0, -1, columns)], f"{name}.rows")


def _by_anchor(
    b: OnnxBuilder, raw: Place, name: str, na: int, columns: int, grid: Size, places: tuple[int, int]
) -> list[str]:
    """Reorder a map with channels last into runs of boxes by anchor, to be joined along axis 1.

    Boxes of few bytes are reordered by one Transpose. Larger ones are cut out anchor by anchor, which is faster then.

    places: (run, runs), see `_runs`.
    """
    run, runs = places
    if columns <= SHORT and not raw.more:
        apart = b.node("Reshape", [raw.name, b.shape(0, *grid.pair, na, columns)], f"{name}.split")
        turned = b.node("Transpose", [apart], f"{name}.last", perm=[0, 3, 1, 2, 4])
        return [b.node("Reshape", [turned, b.shape(0, na * runs, run * columns)], f"{name}.runs")]
    cut, shape = [f"{name}.{i}.columns" for i in range(na)], b.shape(0, runs, run * columns)
    rest = ([f"{name}.rest"], [raw.more]) if raw.more else ([], [])
    sizes = b.shape(*[columns] * na, *rest[1])
    b.nodes.append(helper.make_node("Split", [raw.name, sizes], [*cut, *rest[0]], axis=3))
    return [b.node("Reshape", [part, shape], f"{name}.{i}.runs") for i, part in enumerate(cut)]


def _runs(grids: Sequence[Size]) -> tuple[int, list[int]]:
    """Return the longest run of boxes that divides every level's grid, and the number of runs of each grid.

    All boxes of a run have one level and one anchor. So numbers that depend on these are stored once a run, and the
    engine expands them at load.
    """
    run = math.gcd(*(grid.pixels for grid in grids))
    return run, [grid.pixels // run for grid in grids]


def _rows(b: OnnxBuilder, values: Sequence[Sequence[tuple[float, ...]]], name: str, grids: Sequence[Size]) -> str:
    """Expand four numbers for every level and anchor to (boxes, 4)."""
    run, runs = _runs(grids)
    short = np.array([row for level, count in zip(values, runs, strict=True) for row in level for _ in range(count)])
    wide = b.node(
        "Expand", [b.constant(short.astype(np.float32)[:, None]), b.shape(len(short), run, 4)], f"{name}.wide"
    )
    return b.node("Reshape", [wide, b.shape(-1, 4)], name)


def _cells(b: OnnxBuilder, head: Head, grids: Sequence[Size]) -> str:
    """Make (boxes, 4) of each cell's centre minus half a cell, in pixels, and two zeros."""
    levels = []
    is_x = b.constant(np.array([True, False, True, False]))
    for i, (stride, grid) in enumerate(zip(head.strides, grids, strict=True)):
        shapes = (1, grid.width, 1), (grid.height, 1, 1)
        x, y = (b.constant(_middles(max(shape), stride).reshape(shape)) for shape in shapes)
        both = b.node("Where", [is_x, x, y], f"detect.{i}.xyxy")
        levels += [b.node("Reshape", [both, b.shape(-1, 4)], f"detect.{i}.cells")] * head.na
    joined = b.node("Concat", levels, "detect.xyxy", axis=0)
    return b.node("Mul", [joined, b.constant(np.array([1, 1, 0, 0], np.float32))], "detect.cells")


def _middles(count: int, stride: int) -> NDArray[np.float32]:
    """Return the centres of `count` cells in a row minus half a cell, in pixels."""
    return np.asarray((np.arange(count, dtype=np.float32) - np.float32(0.5)) * stride)


def box_count(head: Head, imgsz: Size) -> int:
    """Return the number of output rows: 25200 for three levels of three anchors at 640 pixels."""
    return sum(head.na * imgsz.over(s).pixels for s in head.strides)
