"""Non-maximum suppression against a plain loop in numpy, and the way back to image pixels."""

from __future__ import annotations

import numpy as np
import pytest

from dsconvert.photos.images import Letterbox, letterbox
from dsconvert.yolo.boxes import non_max_suppression, to_image


def overlap(a, b) -> float:
    """Intersection over union of two x1, y1, x2, y2 boxes."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def brute_force(predictions, confidence, iou, most):
    """Every (box, class) above the confidence, best first; kept unless a kept one of its class overlaps it."""
    every = []
    for x, y, w, h, objectness, *classes in predictions:
        for kind, share in enumerate(classes):
            score = np.float32(objectness) * np.float32(share)
            if objectness > np.float32(confidence) and score > np.float32(confidence):
                x, y, w, h = map(float, (x, y, w, h))
                every.append((x - w / 2, y - h / 2, x + w / 2, y + h / 2, float(score), kind))
    kept = []
    for row in sorted(every, key=lambda r: -r[4]):
        if all(row[5] != other[5] or overlap(row, other) <= iou for other in kept):
            kept.append(row)
    return np.array(kept[:most]).reshape(-1, 6)


def crowd(seed: int, boxes: int, nc: int):
    """Predictions that overlap a lot: boxes scattered about a few places."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(60, 580, (6, 2))
    centre = places[rng.integers(0, 6, boxes)] + rng.normal(0, 8, (boxes, 2))
    return np.concatenate((centre, rng.uniform(40, 80, (boxes, 2)), rng.random((boxes, 1 + nc))), 1).astype(np.float32)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("confidence", "iou", "most"), [(0.001, 0.6, 300), (0.25, 0.45, 300), (0.1, 0.7, 7)])
def test_same_boxes_in_the_same_order_as_a_plain_loop(seed, confidence, iou, most):
    predictions = crowd(seed, 150, 3)
    found = non_max_suppression(predictions, confidence, iou, most)
    wanted = brute_force(predictions, confidence, iou, most)
    assert found.dtype == np.float32
    assert 1 < len(wanted) < 450  # of 450 candidates: the loop dropped some
    assert found.shape == wanted.shape
    # the loop computes in float64, the answer is float32: 24 bits of numbers below 1000
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)


def box(x, y, w, h, objectness, *classes):
    return np.array([[x, y, w, h, objectness, *classes]], np.float32)


def test_one_box_counts_for_every_class_above_the_confidence():
    found = non_max_suppression(box(50, 40, 20, 10, 0.5, 0.5, 1.0, 0.25), confidence=0.2)
    # scores 0.25, 0.5, 0.125: binary fractions, exact
    np.testing.assert_array_equal(found, [[40, 35, 60, 45, 0.5, 1], [40, 35, 60, 45, 0.25, 0]])


def test_confidence_must_be_exceeded_by_objectness_and_by_the_score():
    predictions = np.concatenate([
        box(100, 100, 10, 10, 0.5, 0.5),  # score exactly 0.25: not more than it
        box(200, 100, 10, 10, 0.25, 4.0),  # objectness exactly 0.25, its score above
        box(300, 100, 10, 10, 0.5, 0.625),
    ])  # fmt: skip
    np.testing.assert_array_equal(non_max_suppression(predictions, 0.25), [[295, 95, 305, 105, 0.3125, 0]])


def test_overlap_decides_only_within_a_class():
    # 8 of 12 columns shared: IoU 2/3
    first, second = box(5, 5, 10, 10, 1, 0.5, 0), box(7, 5, 10, 10, 1, 0.25, 0)
    other = box(7, 5, 10, 10, 1, 0, 0.25)
    same = np.concatenate((second, first))
    np.testing.assert_array_equal(non_max_suppression(same, iou=0.6), [[0, 0, 10, 10, 0.5, 0]])
    np.testing.assert_array_equal(non_max_suppression(same, iou=0.7), [[0, 0, 10, 10, 0.5, 0], [2, 0, 12, 10, 0.25, 0]])
    np.testing.assert_array_equal(
        non_max_suppression(np.concatenate((first, other)), iou=0.6),
        [[0, 0, 10, 10, 0.5, 0], [2, 0, 12, 10, 0.25, 1]],
    )


def test_a_dropped_box_drops_nobody():
    # a chain: 1-2 and 2-3 overlap by 2/3, 1-3 by 6/14; 2 is dropped by 1, so 3 stays
    chain = np.concatenate([box(5 + 2 * i, 5, 10, 10, 1, s) for i, s in enumerate((0.75, 0.5, 0.25))])
    assert non_max_suppression(chain, iou=0.6)[:, 0].tolist() == [0, 4]


def test_only_the_best_take_part_and_only_the_best_are_given():
    apart = np.concatenate([box(100 * i, 50, 10, 10, 1, s) for i, s in enumerate((0.25, 0.75, 0.5), 1)])
    assert non_max_suppression(apart)[:, 4].tolist() == [0.75, 0.5, 0.25]
    assert non_max_suppression(apart, most=2)[:, 4].tolist() == [0.75, 0.5]
    assert non_max_suppression(apart, candidates=1)[:, 4].tolist() == [0.75]


def test_nothing_found_is_an_empty_table():
    for predictions in (np.zeros((0, 8), np.float32), box(5, 5, 2, 2, 0.0, 1.0), box(5, 5, 2, 2, 1.0, 0.0)):
        found = non_max_suppression(predictions)
        assert found.shape == (0, 6)
        assert found.dtype == np.float32
        assert to_image(found, Letterbox(1.0, 0, 0), (10, 10)).shape == (0, 6)


def test_back_to_the_image_known_answers():
    # 200 x 100 pixels in a square of 64: gain 0.32, 16 grey rows above
    found = np.array([[16, 24, 48, 40, 0.5, 3], [0, 16, 64, 48, 0.25, 1]], np.float32)
    before = found.copy()
    image = to_image(found, Letterbox(0.32, 0, 16), (100, 200))
    # float32 division: 24 bits of numbers up to 200
    np.testing.assert_allclose(image, [[50, 25, 150, 75, 0.5, 3], [0, 0, 200, 100, 0.25, 1]], rtol=1e-6)
    np.testing.assert_array_equal(found, before)


def test_boxes_are_clipped_to_the_image():
    found = np.array([[-8, 0, 80, 64, 0.5, 0], [20, 4, 30, 10, 0.5, 0]], np.float32)
    image = to_image(found, Letterbox(0.5, 0, 16), (64, 128))
    # the second lies in the grey above the image: nothing of its height is left
    np.testing.assert_array_equal(image, [[0, 0, 128, 64, 0.5, 0], [40, 0, 60, 0, 0.5, 0]])


@pytest.mark.parametrize(("height", "width"), [(90, 160), (160, 90), (33, 64), (20, 20)])
def test_back_undoes_the_letterbox(height, width):
    _, placed = letterbox(np.zeros((height, width, 3), np.uint8), 64)
    there = np.array([[2, 3, width - 4, height - 5, 0.5, 0]], np.float32)
    square = there.copy()
    square[:, :4] = there[:, :4] * placed.gain + np.array([placed.pad_x, placed.pad_y] * 2, np.float32)
    # two float32 roundings of numbers up to 160, divided by a gain of at least 0.4
    np.testing.assert_allclose(to_image(square, placed, (height, width)), there, atol=1e-4)
