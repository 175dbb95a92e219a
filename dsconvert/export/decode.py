"""The Detect tail in ONNX: raw maps to boxes, in float (the same equations as `yolo.decode`).

All levels are brought into one table of boxes while they are still bytes, a quarter of the size of floats; only then
are they dequantized, each row with its level's grid, and decoded together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from onnx import helper

from dsconvert.export.builder import OnnxBuilder
from dsconvert.graph.integer import QParams
from dsconvert.yolo.network import Head


@dataclass(frozen=True)
class Decoded:
    """Names of the parts of all boxes: `box` (n, boxes, 4), centre and size in pixels, and `conf` (n, boxes, 1 + nc),
    objectness and class scores."""

    box: str
    conf: str


def add_decode(
    b: OnnxBuilder, raw: Sequence[str], head: Head, imgsz: int, grids: Sequence[QParams] | None = None
) -> Decoded:
    """Raw maps -> boxes.

    `raw` is one map a level (n, na * no, ny, nx), or a box map and a score map a level (see `lower.split_detect`):
    float, or uint8 on the given grids."""
    no = head.nc + 5
    sides = [imgsz // stride for stride in head.strides]
    if len(raw) > len(head.strides):
        box = _table(b, raw[::2], "detect.box", head.na, 4, sides, grids and grids[::2])
        conf = _table(b, raw[1::2], "detect.score", head.na, no - 4, sides, grids and grids[1::2])
    else:
        both = _table(b, raw, "detect", head.na, no, sides, grids)
        box, conf = "detect.box", "detect.conf"
        b.nodes.append(helper.make_node("Split", [both, b.shape(4, no - 4)], [box, conf], axis=2))
    return Decoded(_pixels(b, box, head, sides), conf)


def _pixels(b: OnnxBuilder, box: str, head: Head, sides: Sequence[int]) -> str:
    """Sigmoids s (n, boxes, 4) -> pixels. The centre is 2 stride s + cell, the size s^2 4 anchor: both are
    s * linear + cell + s^2 * square, with zeros where the other has numbers, as taking s apart would cost more."""
    linear = [np.array([2 * stride, 2 * stride, 0, 0], np.float32).reshape(1, 1, 1, 1, 4) for stride in head.strides]
    square = [np.pad(np.array(a, np.float32) * 4, ((0, 0), (2, 0))).reshape(1, -1, 1, 1, 4) for a in head.anchors]
    first = b.node("Mul", [box, _rows(b, [b.constant(v) for v in linear], "detect.linear", head.na, sides)], "detect.s")
    cells = _rows(b, _centres(b, head.strides, sides), "detect.cells", head.na, sides)
    first = b.node("Add", [first, cells], "detect.placed")
    second = b.node("Mul", [box, box], "detect.s2")
    anchors = _rows(b, [b.constant(v) for v in square], "detect.square", head.na, sides)
    second = b.node("Mul", [second, anchors], "detect.sized")
    return b.node("Add", [first, second], "detect.pixels")


def _table(
    b: OnnxBuilder, maps: Sequence[str], name: str, na: int, columns: int, sides: Sequence[int],
    grids: Sequence[QParams] | None,
) -> str:  # fmt: skip
    """Raw maps (n, na * columns, ny, nx), one a level -> their sigmoids (n, boxes, columns)."""
    levels = []
    for i, (value, side) in enumerate(zip(maps, sides, strict=True)):
        split = b.node("Reshape", [value, b.shape(0, na, columns, side, side)], f"{name}.{i}.split")
        last = b.node("Transpose", [split], f"{name}.{i}.last", perm=[0, 1, 3, 4, 2])
        levels.append(b.node("Reshape", [last, b.shape(0, -1, columns)], f"{name}.{i}.rows"))
    joined = b.node("Concat", levels, f"{name}.raw", axis=1)
    if grids is not None:
        counts = [na * side * side for side in sides]
        scales = [np.full(1, g.scale, np.float32) for g in grids]
        zeros = [np.full(1, g.zero_point, np.uint8) for g in grids]
        real = [_each(b, values, f"{name}.{part}", counts) for values, part in ((scales, "scale"), (zeros, "zero"))]
        joined = b.node("DequantizeLinear", [joined, *real], f"{name}.real", axis=1)
    return b.node("Sigmoid", [joined], f"{name}.sigmoid")


def _each(b: OnnxBuilder, values: Sequence[NDArray[np.generic]], name: str, counts: Sequence[int]) -> str:
    """Every value as often as its count says: an engine spreads them out once, at load."""
    parts = [
        b.node("Expand", [b.constant(v), b.shape(count)], f"{name}.{i}")
        for i, (v, count) in enumerate(zip(values, counts, strict=True))
    ]
    return b.node("Concat", parts, name, axis=0)


def _rows(b: OnnxBuilder, values: Sequence[str], name: str, na: int, sides: Sequence[int]) -> str:
    """Values that broadcast to (1, na, side, side, 4), one a level -> (1, boxes, 4), spread out at load."""
    levels = []
    for i, (value, side) in enumerate(zip(values, sides, strict=True)):
        wide = b.node("Expand", [value, b.shape(1, na, side, side, 4)], f"{name}.{i}.wide")
        levels.append(b.node("Reshape", [wide, b.shape(1, -1, 4)], f"{name}.{i}"))
    return b.node("Concat", levels, name, axis=1)


def _centres(b: OnnxBuilder, strides: Sequence[int], sides: Sequence[int]) -> list[str]:
    """Cell centres minus one half, in pixels, and two zeros, (1, 1, side, side, 4) a level."""
    grids = []
    for i, (stride, side) in enumerate(zip(strides, sides, strict=True)):
        steps = (np.arange(side, dtype=np.float32) - np.float32(0.5)) * stride
        spread = b.shape(1, 1, side, side, 1)
        gx = b.node("Expand", [b.constant(steps.reshape(1, 1, 1, side, 1)), spread], f"detect.{i}.gx")
        gy = b.node("Expand", [b.constant(steps.reshape(1, 1, side, 1, 1)), spread], f"detect.{i}.gy")
        zeros = b.node("Expand", [b.constant(np.zeros((1, 1, 1, 1, 2), np.float32)), b.shape(1, 1, side, side, 2)],
                       f"detect.{i}.zeros")  # fmt: skip
        grids.append(b.node("Concat", [gx, gy, zeros], f"detect.{i}.centres", axis=4))
    return grids


def box_count(head: Head, imgsz: int) -> int:
    """Rows of the output: 25200 for three levels of three anchors at 640."""
    return sum(head.na * (imgsz // s) ** 2 for s in head.strides)
