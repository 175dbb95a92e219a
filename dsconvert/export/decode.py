"""The Detect tail in ONNX: raw maps to boxes, in float (the same equations as `yolo.decode`)."""

from __future__ import annotations

import numpy as np
from onnx import helper

from dsconvert.export.builder import OnnxBuilder
from dsconvert.yolo.network import Head


def add_decode(b: OnnxBuilder, raw: list[str], head: Head, imgsz: int, output: str) -> None:
    """Raw maps (n, na * no, ny, nx) -> `output` (n, boxes, no): xywh in pixels, objectness, class scores."""
    na, no = head.na, head.nc + 5
    levels = []
    for i, (value, stride, anchors) in enumerate(zip(raw, head.strides, head.anchors, strict=True)):
        side = imgsz // stride
        p = f"detect.{i}"
        split = b.node("Reshape", [value, b.shape(0, na, no, side, side)], f"{p}.split")
        last = b.node("Transpose", [split], f"{p}.last", perm=[0, 1, 3, 4, 2])
        s = b.node("Sigmoid", [last], f"{p}.sigmoid")
        parts = [f"{p}.xy", f"{p}.wh", f"{p}.conf"]
        b.nodes.append(helper.make_node("Split", [s, b.shape(2, 2, no - 4)], parts, axis=4))
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
        joined = b.node("Concat", [xy, wh, f"{p}.conf"], f"{p}.boxes", axis=4)
        levels.append(b.node("Reshape", [joined, b.shape(0, -1, no)], f"{p}.rows"))
    b.node("Concat", levels, output, axis=1)


def box_count(head: Head, imgsz: int) -> int:
    """Rows of the output: 25200 for three levels of three anchors at 640."""
    return sum(head.na * (imgsz // s) ** 2 for s in head.strides)
