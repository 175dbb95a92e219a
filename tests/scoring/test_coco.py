"""COCO metrics: answers worked out by hand, and pycocotools on random data."""

from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from dsconvert.base.errors import InputError
from dsconvert.scoring.coco import coco_metrics

SHAPE = (200, 300)  # height, width
A, B, C, D = ([x, 10, x + 30, 60] for x in (5, 55, 105, 155))  # four boxes apart
FAR = [230, 100, 280, 150]  # touches none of them
# Means of at most 1010 float64 numbers: their rounding is far below this.
EXACT = {"abs": 1e-12}


def found(*rows):
    """Rows (box, score, class) -> one image's detections."""
    return np.array([[*box, score, kind] for box, score, kind in rows], np.float64).reshape(-1, 6)


def true(*rows):
    """Rows (box, class) -> one image's truths."""
    return np.array([[kind, *box] for box, kind in rows], np.float64).reshape(-1, 5)


def metrics(detections, truths, nc=2):
    return coco_metrics(detections, truths, [SHAPE] * len(truths), nc)


def test_perfect_detections_score_one():
    result = metrics(
        [found((A, 0.9, 0), (B, 0.8, 1)), found((C, 0.7, 0)), found()], [true((A, 0), (B, 1)), true((C, 0)), true()]
    )
    assert result.map50_95 == pytest.approx(1, **EXACT)
    assert result.map50 == pytest.approx(1, **EXACT)
    assert (result.precision, result.recall) == (1, 1)
    assert result.images == 3
    assert result.per_class == {0: pytest.approx(1, **EXACT), 1: pytest.approx(1, **EXACT)}


def test_one_of_two_objects_found():
    # precision 1 up to recall 0.5: 51 of the 101 levels
    result = metrics([found((A, 0.9, 0))], [true((A, 0), (B, 0))])
    assert result.map50_95 == pytest.approx(51 / 101, **EXACT)
    assert result.map50 == pytest.approx(51 / 101, **EXACT)
    assert (result.precision, result.recall) == (1, 0.5)


def test_wrong_class_wrong_place_and_wrong_image_score_nothing():
    for detections in (
        [found((A, 0.9, 1)), found()],
        [found((FAR, 0.9, 0)), found()],
        [found(), found((A, 0.9, 0))],
    ):
        result = metrics(detections, [true((A, 0)), true((B, 0))])
        assert (result.map50_95, result.map50, result.precision, result.recall) == (0, 0, 0, 0)
        assert result.per_class == {0: 0}  # class 1 has no objects, so no average precision


def test_no_detections_at_all_score_nothing():
    result = metrics([found(), found()], [true((A, 0)), true((B, 1))])
    assert (result.map50_95, result.map50, result.precision, result.recall) == (0, 0, 0, 0)
    assert result.per_class == {0: 0, 1: 0}


def test_a_better_scored_false_alarm_halves_the_precision():
    result = metrics([found((FAR, 0.9, 0), (A, 0.5, 0))], [true((A, 0))])
    assert result.map50 == pytest.approx(0.5, **EXACT)
    assert result.map50_95 == pytest.approx(0.5, **EXACT)
    # the same with the scores exchanged: the false alarm comes after the object and costs nothing
    assert metrics([found((FAR, 0.5, 0), (A, 0.9, 0))], [true((A, 0))]).map50 == pytest.approx(1, **EXACT)


def test_a_second_detection_of_one_object_is_a_false_alarm():
    # in order of score: A, A again, B; precision 1 to recall 0.5 (51 levels), then 2/3 (50 levels)
    result = metrics([found((A, 0.9, 0), (A, 0.8, 0), (B, 0.7, 0))], [true((A, 0), (B, 0))])
    assert result.map50 == pytest.approx((51 + 50 * 2 / 3) / 101, **EXACT)


@pytest.mark.parametrize(("columns", "thresholds"), [(48, 0), (52, 1), (72, 5), (98, 10)])
def test_overlap_counts_at_every_threshold_up_to_it(columns, thresholds):
    # of 100 columns found: IoU 0.72, say, is enough at 0.50, 0.55, 0.60, 0.65 and 0.70 of the ten thresholds
    result = metrics([found(([0, 0, columns, 100], 0.9, 0))], [true(([0, 0, 100, 100], 0))])
    assert result.map50 == pytest.approx(min(thresholds, 1), **EXACT)
    assert result.map50_95 == pytest.approx(thresholds / 10, **EXACT)


def test_classes_count_alike_however_many_objects_they_have():
    # class 0: all three found; class 1: its one object missed
    result = metrics(
        [found((A, 0.9, 0), (B, 0.9, 0), (C, 0.9, 0), (FAR, 0.5, 1))],
        [true((A, 0), (B, 0), (C, 0), (D, 1))],
    )
    assert result.map50 == pytest.approx(0.5, **EXACT)
    assert result.per_class == {0: pytest.approx(1, **EXACT), 1: 0}


def test_precision_and_recall_where_f1_is_best():
    # right, right, wrong, right, wrong of four objects. F1 after each: 0.4, 0.67, 0.57, 0.75, 0.67
    result = metrics(
        [found((A, 0.9, 0), (B, 0.8, 0), (FAR, 0.7, 0), (C, 0.6, 0), ([5, 120, 25, 140], 0.5, 0))],
        [true((A, 0), (B, 0), (C, 0), (D, 0))],
    )
    assert result.precision == pytest.approx(3 / 4, **EXACT)
    assert result.recall == pytest.approx(3 / 4, **EXACT)
    # and the area: precision 1 on 51 levels, 3/4 on the 25 to recall 0.75, then 0
    assert result.map50 == pytest.approx((51 + 25 * 3 / 4) / 101, **EXACT)


def test_precision_and_recall_share_one_confidence_among_classes():
    # class 0 needs a confidence of 0.3 or less, where class 1 has its false alarm before its object:
    # F1 is (1 + 2/3) / 2 there, and at 0.5 or more class 0 has nothing
    result = metrics([found((A, 0.3, 0), (FAR, 0.5, 1), (B, 0.4, 1))], [true((A, 0), (B, 1))])
    assert result.precision == pytest.approx((1 + 1 / 2) / 2, **EXACT)
    assert result.recall == pytest.approx(1, **EXACT)


def test_precision_is_of_the_detections_shown():
    # best between 0.3 and 0.8: class 1 shows a right and a wrong one there. COCO's curve, which has the best precision
    # at that recall or any higher, would say 1
    result = metrics(
        [found((A, 0.8, 0), (FAR, 0.3, 0), (B, 0.95, 1), (FAR, 0.9, 1), (C, 0.2, 1))],
        [true((A, 0), (B, 1), (C, 1), (D, 1))],
    )
    assert result.precision == pytest.approx((1 + 1 / 2) / 2, **EXACT)
    assert result.recall == pytest.approx((1 + 1 / 3) / 2, **EXACT)


def test_without_labels_there_is_nothing_to_measure():
    for truths in ([], [true()], [true(), true()]):
        with pytest.raises(InputError, match="no labels"):
            metrics([found((A, 0.9, 0)) for _ in truths], truths)


def test_nothing_is_printed(capfd):
    metrics([found((A, 0.9, 0))], [true((A, 0))])
    assert capfd.readouterr() == ("", "")


def random_case(seed: int, images: int, nc: int):
    """Objects, and detections that find most of them with some error, miss some and invent some."""
    rng = np.random.default_rng(seed)
    detections, truths, shapes = [], [], []
    for _ in range(images):
        h, w = rng.integers(100, 500, 2).tolist()
        count = int(rng.integers(0, 9))
        corner = rng.uniform(0, 0.6, (count, 2)) * (w, h)
        size = rng.uniform(0.02, 0.4, (count, 2)) * (w, h)
        kinds = rng.integers(0, nc - 1, (count, 1))  # the last class never occurs
        boxes = np.concatenate((corner, corner + size), 1)
        truths.append(np.concatenate((kinds, boxes), 1))
        seen = rng.random(count) < 0.8
        near = boxes[seen] + rng.normal(0, 0.06, (int(seen.sum()), 4)) * np.tile(size[seen], 2)
        guessed = np.where(rng.random((int(seen.sum()), 1)) < 0.85, kinds[seen], rng.integers(0, nc))
        false = rng.uniform(0, 0.5, (12, 2)) * (w, h)
        false = np.concatenate((false, false + rng.uniform(5, 40, (12, 2)), rng.integers(0, nc, (12, 1))), 1)
        rows = np.concatenate((np.concatenate((near, guessed), 1), false))
        scores = rng.random((len(rows), 1))
        scores[: len(near)] = scores[: len(near)] ** 0.5
        detections.append(np.concatenate((rows[:, :4], scores, rows[:, 4:]), 1))
        shapes.append((h, w))
    return detections, truths, shapes


@pytest.mark.parametrize("seed", range(3))
def test_average_precision_equals_that_of_pycocotools(seed):
    coco_module = pytest.importorskip("pycocotools.coco")
    evaluation = pytest.importorskip("pycocotools.cocoeval")
    nc = 4
    detections, truths, shapes = random_case(seed, 30, nc)
    boxes = [(i + 1, int(k), x1, y1, x2 - x1, y2 - y1) for i, t in enumerate(truths) for k, x1, y1, x2, y2 in t]
    with contextlib.redirect_stdout(io.StringIO()):
        truth = coco_module.COCO()
        truth.dataset = {
            "images": [{"id": i + 1, "height": h, "width": w} for i, (h, w) in enumerate(shapes)],
            "categories": [{"id": k + 1, "name": str(k)} for k in range(nc)],
            "annotations": [
                {"id": n, "image_id": i, "category_id": k + 1, "bbox": [x, y, w, h], "area": w * h, "iscrowd": 0}
                for n, (i, k, x, y, w, h) in enumerate(boxes, 1)
            ],
        }
        truth.createIndex()
        results = truth.loadRes([
            {"image_id": i + 1, "category_id": int(k) + 1, "bbox": [x1, y1, x2 - x1, y2 - y1], "score": s}
            for i, rows in enumerate(detections)
            for x1, y1, x2, y2, s, k in rows.tolist()
        ])  # fmt: skip
        run = evaluation.COCOeval(truth, results, "bbox")
        run.evaluate()
        run.accumulate()
        run.summarize()
    result = coco_metrics(detections, truths, shapes, nc)
    assert 0.1 < run.stats[0] < 0.9  # the case is neither hopeless nor perfect
    # the same tables in float64, averaged in another order
    assert result.map50_95 == pytest.approx(run.stats[0], abs=1e-9)
    assert result.map50 == pytest.approx(run.stats[1], abs=1e-9)
    by_class = {k: run.eval["precision"][:, :, k, 0, -1].mean() for k in range(nc - 1)}
    assert result.per_class == pytest.approx(by_class, abs=1e-9)
