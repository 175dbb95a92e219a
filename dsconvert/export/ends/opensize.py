"""Write the decoding for a file whose input may have any height and width.

The equations are the same as in `decode`. Each level is decoded by itself, because the number of its boxes is known
only when the file runs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from onnx import TensorProto, helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.ends.decode import Decoded
from dsconvert.export.written import Place
from dsconvert.yolo.lower import PARTS
from dsconvert.yolo.network import Head


def add_open_decode(b: OnnxBuilder, raw: Sequence[Place], head: Head) -> Decoded:
    """Write the nodes from raw maps to boxes; the maps have the forms that `decode.add_decode` takes."""
    step, levels = len(head.parts), len(head.strides)
    found: list[list[str]] = []  # for each level, the names of its boxes' parts
    for i in range(levels):
        if len(raw) > levels:
            maps = raw[i * step : (i + 1) * step]
            parts = [
                _columns(b, place, f"detect.{i}.{part}", head.na, columns)
                for part, columns, place in zip(PARTS, head.parts, maps, strict=False)
            ]
        else:
            maps, parts = raw[i : i + 1], [f"detect.{i}.{part}" for part in PARTS[:step]]
            whole = _columns(b, maps[0], f"detect.{i}", head.na, sum(head.parts))
            b.nodes.append(helper.make_node("Split", [whole, b.shape(*head.parts)], parts, axis=3))
        sure = [b.node("Sigmoid", [part], f"{part}.sigmoid") for part in parts[:3]]
        boxes = _pixels(b, sure[0], _cells(b, maps[0].name, head.strides[i], f"detect.{i}"), head, i)
        rows = zip((boxes, *sure[1:], *parts[3:]), head.parts, strict=True)
        found.append([b.node("Reshape", [part, b.shape(0, -1, n)], f"{part}.rows") for part, n in rows])
    box, objectness, classes, *masks = (
        b.node("Concat", [parts[k] for parts in found], f"detect.{name}", axis=1)
        for k, name in enumerate(PARTS[: len(head.parts)])
    )
    if head.class_untrained:  # a score cannot exceed 1, so this makes all of them 1
        classes = b.node("Max", [classes, b.scalar(1.0)], "detect.meant")
    return Decoded(box, objectness, classes, tuple(masks))


def _columns(b: OnnxBuilder, raw: Place, name: str, na: int, columns: int) -> str:
    """Turn a raw map of na * columns channels into real numbers (n, na, cells, columns)."""
    apart = b.node("Reshape", [raw.name, b.shape(0, na, columns, -1)], f"{name}.split")
    last = b.node("Transpose", [apart], f"{name}.last", perm=[0, 1, 3, 2])
    if raw.grid is None:
        return last
    ends = [b.scalar(raw.grid.scale), b.constant(np.array(raw.grid.zero_point, np.uint8))]
    return b.node("DequantizeLinear", [last, *ends], f"{name}.real")


def _cells(b: OnnxBuilder, raw: str, stride: int, name: str) -> str:
    """Make (ny * nx, 4) for a map (n, channels, ny, nx).

    A row is a cell's centre minus half a cell, in pixels, and two zeros.
    """
    shape = b.node("Shape", [raw], f"{name}.shape")
    x, y = (_middles(b, shape, axis, stride, f"{name}.{way}") for axis, way in ((3, "x"), (2, "y")))
    down = b.node("Reshape", [y, b.shape(-1, 1, 1)], f"{name}.down")
    along = b.node("Reshape", [x, b.shape(1, -1, 1)], f"{name}.along")
    both = b.node("Where", [b.constant(np.array([True, False, True, False])), along, down], f"{name}.xyxy")
    flat = b.node("Reshape", [both, b.shape(-1, 4)], f"{name}.flat")
    return b.node("Mul", [flat, b.constant(np.array([1, 1, 0, 0], np.float32))], f"{name}.cells")


def _middles(b: OnnxBuilder, shape: str, axis: int, stride: int, name: str) -> str:
    """Make the centres of the cells along one axis of the shape, minus half a cell, in pixels."""
    count = b.node("Gather", [shape, b.constant(np.array(axis, np.int64))], f"{name}.count")
    most = b.node("Cast", [count], f"{name}.most", to=TensorProto.FLOAT)
    each = b.node("Range", [b.scalar(0.0), most, b.scalar(1.0)], f"{name}.each")
    return b.node("Mul", [b.node("Sub", [each, b.scalar(0.5)], f"{name}.middle"), b.scalar(float(stride))], name)


def _pixels(b: OnnxBuilder, box: str, cells: str, head: Head, level: int) -> str:
    """Turn sigmoids s (n, na, cells, 4) into pixels: s * linear + cell + s^2 * square, as in `decode`."""
    name, stride = f"detect.{level}", head.strides[level]
    linear = b.constant(np.array([2 * stride, 2 * stride, 0, 0], np.float32))
    square = np.array([[[0, 0, 4 * w, 4 * h]] for w, h in head.anchors[level]], np.float32)  # (na, 1, 4)
    placed = b.node("Add", [b.node("Mul", [box, linear], f"{name}.s"), cells], f"{name}.placed")
    sized = b.node("Mul", [b.node("Mul", [box, box], f"{name}.s2"), b.constant(square)], f"{name}.sized")
    return b.node("Add", [placed, sized], f"{name}.pixels")
