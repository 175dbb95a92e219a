"""The Detect tail in ONNX: raw maps to boxes, in float (the same equations as `yolo.decode`)."""

from __future__ import annotations

import numpy as np
from onnx import helper

from dsconvert.export.builder import OnnxBuilder
from dsconvert.yolo.network import Head


def add_decode(b: OnnxBuilder, raw: list[str], head: Head, imgsz: int, output: str) -> None:
    """Raw maps -> `output` (n, boxes, no): xywh in pixels, objectness, class scores.

    `raw` is one map a level (n, na * no, ny, nx), or a box map and a score map a level (see `lower.split_detect`)."""
    na, no = head.na, head.nc + 5
    levels = []
    apart = len(raw) > len(head.strides)
    for i, (stride, anchors) in enumerate(zip(head.strides, head.anchors, strict=True)):
        side = imgsz // stride
        p, conf = f"detect.{i}", f"detect.{i}.conf"
        if apart:
            box = _rows(b, raw[2 * i], f"{p}.box", na, side)
            b.nodes.append(helper.make_node("Split", [box, b.shape(2, 2)], [f"{p}.xy", f"{p}.wh"], axis=4))
            conf = _rows(b, raw[2 * i + 1], f"{p}.score", na, side)
        else:
            both = _rows(b, raw[i], p, na, side)
            parts = [f"{p}.xy", f"{p}.wh", conf]
            b.nodes.append(helper.make_node("Split", [both, b.shape(2, 2, no - 4)], parts, axis=4))
        # cell centres minus one half, in pixels: two small rows the engine spreads out once at load
        steps = (np.arange(side, dtype=np.float32) - np.float32(0.5)) * stride
        spread = b.shape(1, 1, side, side, 1)
        gx = b.node("Expand", [b.constant(steps.reshape(1, 1, 1, side, 1)), spread], f"{p}.gx")
        gy = b.node("Expand", [b.constant(steps.reshape(1, 1, side, 1, 1)), spread], f"{p}.gy")
        grid = b.node("Concat", [gx, gy], f"{p}.grid", axis=4)
        xy = b.node("Mul", [f"{p}.xy", b.scalar(2 * stride)], f"{p}.xy2")
        xy = b.node("Add", [xy, grid], f"{p}.xypx")
        square = b.node("Mul", [f"{p}.wh", f"{p}.wh"], f"{p}.wh2")
        sizes = np.array(anchors, np.float32).reshape(1, na, 1, 1, 2) * 4
        wh = b.node("Mul", [square, b.constant(sizes)], f"{p}.whpx")
        joined = b.node("Concat", [xy, wh, conf], f"{p}.boxes", axis=4)
        levels.append(b.node("Reshape", [joined, b.shape(0, -1, no)], f"{p}.rows"))
    b.node("Concat", levels, output, axis=1)


def _rows(b: OnnxBuilder, value: str, name: str, na: int, side: int) -> str:
    """A raw map (n, na * c, ny, nx) -> its sigmoid (n, na, ny, nx, c)."""
    split = b.node("Reshape", [value, b.shape(0, na, -1, side, side)], f"{name}.split")
    last = b.node("Transpose", [split], f"{name}.last", perm=[0, 1, 3, 4, 2])
    return b.node("Sigmoid", [last], f"{name}.sigmoid")


def box_count(head: Head, imgsz: int) -> int:
    """Rows of the output: 25200 for three levels of three anchors at 640."""
    return sum(head.na * (imgsz // s) ** 2 for s in head.strides)
