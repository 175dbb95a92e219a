"""Outputs of every family become boxes: known answers, one object at a time."""

from __future__ import annotations

import numpy as np
import pytest

from dsconvert.base.size import USUAL, Size
from dsconvert.onnxfile import rules
from dsconvert.onnxfile.decoding import (
    COLUMNS,
    ENDS,
    ROWS,
    OtherFamily,
    boxes_of,
    check_scores,
    classes_of,
    families_like,
    layout_of,
    usual_names,
)
from dsconvert.onnxfile.presets import presets
from dsconvert.onnxfile.rules import RULES, Unfit, has_cells

SIZE = Size(64, 96)  # 8 x 12, 4 x 6 and 2 x 3 cells
COUNTS = {8: 96, 16: 24, 32: 6}
NC = 3


def at(stride: int, row: int, column: int) -> int:
    """Index of a cell among those of all strides."""
    before = sum(n for s, n in COUNTS.items() if s < stride)
    return before + row * (SIZE.width // stride) + column


def test_yolox():
    out = np.zeros((1, sum(COUNTS.values()), 5 + NC), np.float32)
    out[0, at(16, 2, 3)] = 0.25, 0.5, np.log(2), np.log(1.5), 0.9, 0.1, 0.8, 0.3
    found = boxes_of("yolox", [out], SIZE, NC)
    np.testing.assert_allclose(found[at(16, 2, 3)], [52, 40, 32, 24, 0.9, 0.1, 0.8, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found[at(8, 7, 11), :4], [88, 56, 8, 8])
    out[0, 0, 2] = 1e9
    assert np.isfinite(boxes_of("yolox", [out], SIZE, NC)).all()


def test_yolox_with_its_decoding_is_left_as_it_is():
    out = np.zeros((1, sum(COUNTS.values()), 5 + NC), np.float32)
    out[0, 0, :4] = 50, 30, 40, 28
    assert np.array_equal(boxes_of("yolox", [out], SIZE, NC), out[0])


def sides(count: int, bins: int, index: int, values: tuple[int, ...]) -> np.ndarray:
    """A map of distances (count, 4 bins) that are surely 1, but for one cell's."""
    logits = np.full((count, 4, bins), -40, np.float32)
    logits[:, :, 1] = 40
    logits[index] = -40
    logits[index, range(4), values] = 40
    return logits.reshape(count, -1)


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("order", [1, -1])
def test_distances(batch, order):
    maps = []
    for stride, count in COUNTS.items():
        scores = np.zeros((count, NC), np.float32)
        cell = at(16, 1, 4) - at(16, 0, 0) if stride == 16 else 0
        if stride == 16:
            scores[cell] = 0.1, 0.2, 0.7
        maps += [scores, sides(count, 8, cell, (3, 0, 2, 1))]
    maps = [m[None] if batch else m for m in maps][::order]
    found = boxes_of("distances", maps, SIZE, NC)
    # around ((4 + 1/2) 16, (1 + 1/2) 16) = (72, 24): from 72 - 48 to 72 + 32, and from 24 to 24 + 16
    np.testing.assert_allclose(found[at(16, 1, 4)], [64, 32, 80, 16, 1, 0.1, 0.2, 0.7], atol=1e-4)
    assert found.shape == (126, 5 + NC)
    np.testing.assert_allclose(found[at(32, 1, 1), :4], [48, 48, 64, 64], atol=1e-4)


def test_a_distance_is_the_mean_bin():
    np.testing.assert_allclose(rules.expected(np.log(np.array([[1.0, 2, 1], [1, 1, 2]]))), [1, 1.25])
    assert np.isfinite(rules.expected(np.array([[1e30, -1e30, 0]], np.float32))).all()


def test_fastestdet():
    out = np.zeros((1, 5 + NC, 4, 6), np.float32)
    out[0, :, 2, 5] = 0.5, np.arctanh(0.5), np.arctanh(-0.25), 0, np.log(3), 0.2, 0.7, 0.1
    found = boxes_of("fastestdet", [out], SIZE, NC)[2 * 6 + 5]
    np.testing.assert_allclose(found[:4], [(5.5) * 16, (1.75) * 16, 48, 48], rtol=1e-5)
    np.testing.assert_allclose(found[4] * found[5:], 0.5**0.6 * np.array([0.2, 0.7, 0.1]) ** 0.4, rtol=1e-5)


def test_v5lite():
    out = np.full((1, 3 * 126, 5 + NC), 0.5, np.float32)
    row = 3 * 96 + 2 * 24 + 1 * 6 + 4  # stride 16, its third anchor, row 1, column 4
    out[0, row] = 0.75, 0.25, 0.5, 1, 0.9, 0.1, 0.2, 0.3
    found = boxes_of("v5lite", [out], SIZE, NC)
    np.testing.assert_allclose(found[row], [(4 + 1) * 16, (1 + 0) * 16, 59, 4 * 119, 0.9, 0.1, 0.2, 0.3], rtol=1e-6)
    np.testing.assert_allclose(found[0, :4], [4, 4, 10, 13])


@pytest.mark.parametrize(("rule", "beside"), [("dfl", 0), ("faces", 15)])
def test_heads_of_yolov8(rule, beside):
    nc = NC if rule == "dfl" else 1
    maps = []
    for stride, count in COUNTS.items():
        cell = 10 if stride == 8 else 0
        logits = np.full((count, nc + beside), -30, np.float32)
        logits[cell, :nc] = 0
        rows = np.concatenate((sides(count, 16, cell, (2, 4, 6, 15)), logits), 1)
        maps.append(rows.T.reshape(1, -1, SIZE.height // stride, SIZE.width // stride))
    found = boxes_of(rule, maps[::-1], SIZE, 0)
    assert found.shape == (126, 5 + nc)
    # around (84, 4): x from 84 - 16 to 84 + 48, y from 4 - 32 to 4 + 120
    np.testing.assert_allclose(found[10, :5], [100, 48, 64, 152, 1], atol=1e-3)
    np.testing.assert_allclose(found[10, 5:], 0.5)
    assert found[11, 5:].max() < 1e-9


def test_v5lite_with_its_decoding_is_left_as_it_is():
    out = np.full((1, 378, 5 + NC), 0.5, np.float32)
    out[0, :, :4] = 40
    assert np.array_equal(boxes_of("v5lite", [out], SIZE, NC), out[0])


def test_columns_of_yolov8():
    out = np.zeros((1, 4 + NC, 126), np.float32)
    out[0, :, 7] = 50, 30, 20, 10, 0.1, 0.2, 0.9
    found = boxes_of(None, [out], SIZE, NC)
    assert found.shape == (126, 5 + NC)
    np.testing.assert_allclose(found[7], [50, 30, 20, 10, 1, 0.1, 0.2, 0.9])
    assert np.array_equal(boxes_of(None, [out], SIZE, 0), found)


@pytest.mark.parametrize("batch", [True, False])
def test_rows_of_an_end_to_end_file(batch):
    out = np.zeros((1, 300, 6), np.float32)
    out[0, 0] = 10, 20, 50, 40, 0.9, 2
    out[0, 1] = 0, 0, 5, 5, 0.3, 0
    found = boxes_of(None, [out if batch else out[0]], SIZE, NC)
    np.testing.assert_allclose(found, [[30, 30, 40, 20, 1, 0, 0, 0.9], [2.5, 2.5, 5, 5, 1, 0.3, 0, 0]])
    out[0, 2] = 0, 0, 5, 5, 0.3, 3
    with pytest.raises(Unfit, match="classes below 3"):
        boxes_of(None, [out], SIZE, NC)
    assert boxes_of(None, [out], SIZE, 0).shape == (3, 85)


def test_rows_of_yolov5_of_one_class_are_no_end_to_end_file():
    rng = np.random.default_rng(0)
    scale = np.array([30, 30, 30, 30, 1, 1], np.float32)
    out = rng.random((1, 3 * 126, 6), np.float32) * scale
    assert np.array_equal(boxes_of(None, [out], SIZE, 0), out[0])
    few = rng.random((1, 50, 6), np.float32) * scale  # as many as no cells: what is no class tells
    assert np.array_equal(boxes_of(None, [few], SIZE, 1), few[0])


LAYOUTS = [
    ((1, 25200, 85), (640, 640), 80, ROWS), ((1, 25200, 85), (640, 640), 0, ROWS), ((1, "n", 85), (640, 640), 0, ROWS),
    ((1, 84, 8400), (640, 640), 0, COLUMNS), ((1, 84, "n"), (640, 640), 0, COLUMNS),
    ((1, 5, 8400), (640, 640), 0, COLUMNS),
    ((1, 84, 84), (64, 64), 0, COLUMNS), ((1, 84, 85), (64, 64), 0, ROWS), ((1, 63, 85), (32, 32), 0, ROWS),
    ((1, 84, 21), (32, 32), 80, COLUMNS), ((1, 300, 6), (640, 640), 0, ENDS),
    ((1, 300, 6), (384, 640), 80, ENDS), ((1, 25200, 6), (640, 640), 0, ROWS), ((1, 3549, 6), (416, 416), 0, ROWS),
    ((1, 116, 8400), (640, 640), 80, None), ((1, 1000), (224, 224), 0, None), ((1, 80, 80, 80), (640, 640), 0, None),
    ((1, "n", 6), (640, 640), 1, ROWS), ((300, 6), (640, 640), 0, ENDS), ((1, 4, 9000), (640, 640), 0, None),
    ((1, 64, 5), (64, 64), 0, None),
]  # fmt: skip


@pytest.mark.parametrize(("shape", "size", "named", "layout"), LAYOUTS)
def test_what_a_shape_tells(shape, size, named, layout):
    assert layout_of(shape, Size(*size), named) == layout


def test_how_many_classes_a_shape_tells_of():
    for shape, count in {(1, 25200, 85): 80, (1, 6, 8400): 2, (1, 300, 6): 80, (1, 1000): 0, (1, "n", "m"): 0}.items():
        assert classes_of(shape, USUAL) == count
    assert len(usual_names()) == 80
    assert (usual_names()[0], usual_names()[16], usual_names()[79]) == ("person", "dog", "toothbrush")


def test_rows_of_other_families_are_told_from_yolov5s():
    raw = np.random.default_rng(0).normal(size=(1, 126, 5 + NC)).astype(np.float32)
    lite = np.full((1, 378, 5 + NC), 0.5, np.float32)
    share = np.full((1, 5 + NC, 4, 6), 1 / NC, np.float32)
    level = [np.full((96, NC), 0.5, np.float32), sides(96, 8, 0, (1, 2, 3, 4))]
    heads = [np.zeros((1, 64 + NC, 8, 12), np.float32)]
    for outputs, names in (([raw], ("yolox",)), ([lite], ("v5lite",)), ([share], ("fastestdet",)),
                           (level, ("nanodet", "picodet")), (heads, ("yolov8-heads", "yolov8-face"))):  # fmt: skip
        with pytest.raises(OtherFamily) as caught:
            boxes_of(None, outputs, SIZE, NC)
        assert caught.value.names == families_like(outputs, SIZE) == names
        assert set(names) <= presets().keys()


def test_yolov5s_and_yolov8s_outputs_are_like_no_other_familys():
    rows = np.full((1, 378, 5 + NC), 0.5, np.float32)
    rows[0, :, :4] = 30
    raw = [np.zeros((1, 3, 8, 12, 5 + NC), np.float32)] * 3  # which YOLOv5's export may add
    for outputs in ([rows], [rows, *raw], [rows.transpose(0, 2, 1)], [np.zeros((1, 300, 6), np.float32)]):
        assert families_like(outputs, SIZE) == ()
    assert np.array_equal(boxes_of(None, [rows, *raw], SIZE, NC), rows[0])


def test_key_points_are_no_scores():
    pose = np.full((1, 4 + 1 + 51, 126), 0.5, np.float32)
    pose[0, 5:] = 40
    faces = np.full((1, 378, 16), 0.5, np.float32)
    faces[0, :, :15] = 40
    faces[0, :, 4] = 0.5
    for out in (pose, faces):
        with pytest.raises(Unfit, match=r"scores in 0\.\.1"):
            check_scores(boxes_of(None, [out], SIZE, 0))
    check_scores(np.array([[9, 9, 9, 9, 1.02, -0.02]], np.float32))  # a quantized file's
    check_scores(np.zeros((0, 7), np.float32))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "shapes", [[(1, 126)], [(1, 5, 6)], [(1, 1, 2, 3)], [(1, 100, 85)], [(0, 0, 0)], [(7, 9), (7, 9)], [(1,)], [()]]
)
def test_outputs_that_do_not_fit_a_rule_are_refused(rule, shapes):
    with pytest.raises(Unfit):
        boxes_of(rule, [np.zeros(shape, np.float32) for shape in shapes], SIZE, 0)


def test_cells():
    assert has_cells(8400, USUAL)
    assert has_cells(25200, USUAL)
    assert not has_cells(300, USUAL)
    assert not has_cells(300, Size(384, 640))
    assert rules.grid(Size(65, 64), 32) == (3, 2)
