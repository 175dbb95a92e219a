"""COCO metrics: hand-computed cases, and pycocotools where it is installed."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from dsconvert.errors import InputError
from dsconvert.evaluate.coco import _ground_truth, _results, coco_metrics

SHAPE = (100, 100)
BOX, OTHER = [10, 10, 30, 30], [50, 50, 90, 90]


def found(*rows: tuple[list[int], float, int]) -> np.ndarray:
    return np.array([[*box, score, kind] for box, score, kind in rows], np.float32).reshape(-1, 6)


def truth(*rows: tuple[int, list[int]]) -> np.ndarray:
    return np.array([[kind, *box] for kind, box in rows], float).reshape(-1, 5)


def test_perfect_detections():
    m = coco_metrics([found((BOX, 0.9, 0), (OTHER, 0.8, 1))], [truth((0, BOX), (1, OTHER))], [SHAPE], 3)
    assert (m.map50_95, m.map50, m.precision, m.recall, m.images) == (1, 1, 1, 1, 1)
    assert m.per_class == {0: 1, 1: 1}  # the absent class does not count


def test_half_of_the_objects_found():
    m = coco_metrics([found((BOX, 0.9, 0))], [truth((0, BOX), (0, OTHER))], [SHAPE], 1)
    # precision 1 up to recall 0.5: 51 of the 101 recall levels
    assert m.map50 == pytest.approx(51 / 101)
    assert m.precision == pytest.approx(1)
    assert m.recall == pytest.approx(0.5)


def test_a_false_alarm_above_the_hit_halves_precision():
    m = coco_metrics([found((OTHER, 0.9, 0), (BOX, 0.8, 0))], [truth((0, BOX))], [SHAPE], 1)
    assert m.map50 == pytest.approx(0.5)
    assert (m.precision, m.recall) == (pytest.approx(0.5), pytest.approx(1))


def test_wrong_class_and_no_detection_score_nothing():
    for detections in (found((BOX, 0.9, 1)), found()):
        m = coco_metrics([detections], [truth((0, BOX))], [SHAPE], 2)
        assert (m.map50_95, m.map50, m.recall) == (0, 0, 0)


def test_loose_box_counts_up_to_its_iou():
    # 20 x 20 against 20 x 26: IoU 400 / 520 = 0.77, so thresholds 0.50 to 0.75 of the ten
    m = coco_metrics([found(([10, 10, 30, 36], 0.9, 0))], [truth((0, BOX))], [SHAPE], 1)
    assert m.map50_95 == pytest.approx(0.6)


def test_no_labels_is_said():
    with pytest.raises(InputError, match="no labels"):
        coco_metrics([found((BOX, 0.9, 0))], [truth()], [SHAPE], 1)


def test_random_data_as_pycocotools(capsys):
    pycoco = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    rng = np.random.default_rng(0)
    truths, detections, shapes = [], [], []
    for _ in range(20):
        corner, size = rng.uniform(0, 50, (6, 2)), rng.uniform(10, 50, (6, 2))
        boxes = np.concatenate((corner, corner + size), 1)
        kinds = rng.integers(0, 3, 6)
        truths.append(np.concatenate((kinds[:, None], boxes), 1))
        noisy = np.concatenate((boxes + rng.normal(0, 3, boxes.shape), rng.random((6, 1)), kinds[:, None]), 1)
        detections.append(noisy.astype(np.float32)[rng.random(6) < 0.8])
        shapes.append(SHAPE)
    mine = coco_metrics(detections, truths, shapes, 3)
    assert capsys.readouterr().out == ""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = pycoco.COCO()
        coco.dataset = _ground_truth(truths, shapes, 3)
        coco.createIndex()
        run = evaluation.COCOeval(coco, coco.loadRes(_results(detections)), "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    assert (mine.map50_95, mine.map50) == pytest.approx((run.stats[0], run.stats[1]), abs=1e-12)  # the same sums
