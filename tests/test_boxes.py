"""Non-maximum suppression against brute force, and boxes back in image pixels."""

from __future__ import annotations

import numpy as np
import pytest

from dsconvert.yolo.boxes import non_max_suppression, to_image
from dsconvert.yolo.images import Letterbox


def brute_force(predictions: np.ndarray, confidence: float, iou: float) -> set[tuple[int, int]]:
    """(row, class) pairs that survive: greedy, class by class, in float64."""
    kept = set()
    p = predictions.astype(np.float64)
    for kind in range(p.shape[1] - 5):
        scores = (predictions[:, 4] * predictions[:, 5 + kind]).astype(np.float64)
        order = [i for i in np.argsort(-scores, kind="stable") if scores[i] > confidence]
        chosen: list[int] = []
        for i in order:
            if all(overlap(p[i, :4], p[j, :4]) <= iou for j in chosen):
                chosen.append(i)
        kept |= {(i, kind) for i in chosen}
    return kept


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    low = np.maximum(a[:2] - a[2:] / 2, b[:2] - b[2:] / 2)
    high = np.minimum(a[:2] + a[2:] / 2, b[:2] + b[2:] / 2)
    common = np.prod(np.maximum(high - low, 0))
    return float(common / (a[2] * a[3] + b[2] * b[3] - common))


@pytest.mark.parametrize("seed", range(5))
def test_same_survivors_as_brute_force(seed):
    rng = np.random.default_rng(seed)
    p = np.concatenate(
        (rng.uniform(20, 80, (60, 2)), rng.uniform(5, 40, (60, 2)), rng.uniform(0, 1, (60, 4))), 1
    ).astype(np.float32)
    found = non_max_suppression(p, 0.05, 0.5)
    centres = {tuple(np.round(row[:4], 3)): i for i, row in enumerate(p)}
    got = set()
    for x1, y1, x2, y2, score, kind in found:
        key = min(centres, key=lambda c: abs(c[0] - (x1 + x2) / 2) + abs(c[1] - (y1 + y2) / 2))
        i = centres[key]
        got.add((i, int(kind)))
        assert score == pytest.approx(p[i, 4] * p[i, 5 + int(kind)], rel=1e-6)  # one float32 product
        assert x2 - x1 == pytest.approx(p[i, 2], rel=1e-4)  # float32 corners up to 100 pixels
    assert got == brute_force(p, 0.05, 0.5)
    assert list(found[:, 4]) == sorted(found[:, 4], reverse=True)


def test_one_box_may_carry_two_classes_and_weak_ones_go():
    p = np.array([[50, 50, 10, 10, 1.0, 0.9, 0.8, 0.0005]], np.float32)
    found = non_max_suppression(p)
    assert found[:, 5].tolist() == [0, 1]
    assert found[0, :4].tolist() == [45, 45, 55, 55]


def test_no_more_than_the_most_and_nothing_from_nothing():
    p = np.array([[20 * i, 10, 10, 10, 1.0, 0.5 + i / 100] for i in range(20)], np.float32)
    assert len(non_max_suppression(p, most=7)) == 7
    assert non_max_suppression(p, most=7)[0, 4] == pytest.approx(0.69)
    assert non_max_suppression(np.zeros((5, 8), np.float32)).shape == (0, 6)


def test_back_to_the_image_and_clipped():
    boxes = np.array([[10, 30, 74, 94, 0.9, 1], [-5, 0, 700, 700, 0.5, 0]], np.float32)
    # an image of 200 x 100 (h x w) at gain 0.5, 10 pixels padded left, 20 above
    out = to_image(boxes, Letterbox(0.5, 10, 20), (200, 100))
    assert out[0].tolist() == pytest.approx([0, 20, 100, 148, 0.9, 1])  # (74 - 10) / 0.5 = 128, clipped to 100
    assert out[1, :4].tolist() == [0, 0, 100, 200]
