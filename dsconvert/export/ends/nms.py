"""Write non-maximum suppression as ONNX nodes, with the rules of `yolo.boxes`."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from onnx import TensorProto, helper

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.export.ends.decode import Decoded


@dataclass(frozen=True)
class Nms:
    """The limits of the suppression; the defaults are YOLOv5's for export.

    confidence: least score (objectness * class score), 0 up to but not including 1.
    iou: largest overlap (intersection over union, 0..1) with a better box of the same class.
    most: most boxes an image, at least 1.

    Raises InputError for values outside of these ranges.
    """

    confidence: float = 0.25
    iou: float = 0.45
    most: int = 100

    def __post_init__(self) -> None:
        if not (0 <= self.confidence < 1 and 0 <= self.iou <= 1 and self.most >= 1):
            raise InputError.naming(
                "{conf_thres} must lie in 0..1 (below 1), {iou_thres} in 0..1, and {max_det} must be at least 1."
            )


def add_nms(b: OnnxBuilder, decoded: Decoded, nms: Nms, output: str) -> None:
    """Write the nodes from decoded boxes to `output` (k, 7): image index, x1, y1, x2, y2 in input pixels, score, class.

    Rows are sorted by image, and within an image by score. A box takes part once for every class.
    """
    every = b.node("Mul", [decoded.objectness, decoded.classes], "nms.every")
    scores = b.node("Transpose", [every], "nms.scores", perm=[0, 2, 1])
    limits = [b.constant(np.array([nms.most], np.int64)), *(_one(b, v) for v in (nms.iou, nms.confidence))]
    kept = b.node(
        "NonMaxSuppression", [decoded.box, scores, *limits], "nms.kept", center_point_box=1
    )  # columns of nms.kept: image, class, box
    count = b.node("Shape", [kept], "nms.shape")
    count = b.node("Gather", [count, b.shape(0)], "nms.count")
    score = b.node("GatherND", [scores, kept], "nms.score")
    kept = b.node("Gather", [kept, _order(b, score, count, "nms.best", largest=1)], "nms.ranked")
    image = b.node("Gather", [kept, b.constant(np.array(0, np.int64))], "nms.image0", axis=1)
    # Sort by image, keeping the best first within each. ONNX's TopK keeps the order of equal values, but OpenVINO's
    # does
    # not. So no two values are equal: each is image * count + rank.
    zero, one = (b.constant(np.array(v, np.int64)) for v in (0, 1))
    rows = b.node("Range", [zero, b.node("Squeeze", [count, b.shape(0)], "nms.count0"), one], "nms.rows")
    place = b.node("Add", [b.node("Mul", [image, count], "nms.before"), rows], "nms.place")
    kept = b.node("Gather", [kept, _order(b, place, count, "nms.grouped", largest=0)], "nms.sorted")
    kept = b.node("Compress", [kept, _first_of_each(b, scores, kept, rows, nms.most)], "nms.final", axis=0)
    image, kind = (b.node("Gather", [kept, b.shape(i)], f"nms.column{i}", axis=1) for i in (0, 1))
    box = b.node("GatherND", [decoded.box, b.node("Gather", [kept, b.shape(0, 2)], "nms.at", axis=1)], "nms.box")
    b.nodes.append(helper.make_node("Split", [box, b.shape(2, 2)], ["nms.xy", "nms.wh"], axis=1))
    half = b.node("Mul", ["nms.wh", b.scalar(0.5)], "nms.half")
    score = b.node("Unsqueeze", [b.node("GatherND", [scores, kept], "nms.value"), b.shape(1)], "nms.values")
    columns = [
        b.node("Cast", [image], "nms.image", to=TensorProto.FLOAT),
        b.node("Sub", ["nms.xy", half], "nms.low"),
        b.node("Add", ["nms.xy", half], "nms.high"),
        score,
        b.node("Cast", [kind], "nms.class", to=TensorProto.FLOAT),
    ]
    b.node("Concat", columns, output, axis=1)


def _one(b: OnnxBuilder, value: float) -> str:
    return b.constant(np.array([value], np.float32))


def _order(b: OnnxBuilder, values: str, count: str, name: str, largest: int) -> str:
    """Return indices that sort all `count` values."""
    outputs = [f"{name}.values", f"{name}.order"]
    b.nodes.append(helper.make_node("TopK", [values, count], outputs, axis=0, largest=largest, sorted=1))
    return outputs[1]


def _first_of_each(b: OnnxBuilder, scores: str, kept: str, rows: str, most: int) -> str:
    """Return True for the first `most` rows of every image.

    kept: (count, 3), sorted by image.
    rows: the row numbers 0..count - 1.
    """
    zero, one = (b.constant(np.array(v, np.int64)) for v in (0, 1))
    image = b.node("Gather", [kept, zero], "nms.which", axis=1)
    images = b.node("Gather", [b.node("Shape", [scores], "nms.dims"), zero], "nms.images")
    every = b.node("Range", [zero, images, one], "nms.numbers")
    same = b.node("Equal", [b.node("Unsqueeze", [image, b.shape(1)], "nms.whichs"), every], "nms.same")
    counts = b.node("ReduceSum", [b.node("Cast", [same], "nms.same64", to=TensorProto.INT64), b.shape(0)],
                    "nms.counts", keepdims=0)  # fmt: skip
    starts = b.node("CumSum", [counts, zero], "nms.starts", exclusive=1)
    first = b.node("Gather", [starts, image], "nms.first")
    return b.node("Less", [b.node("Sub", [rows, first], "nms.rank"), b.constant(np.array(most, np.int64))], "nms.keep")
