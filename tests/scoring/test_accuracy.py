"""Measuring predictors on images: against labels, and against the first predictor."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from dsconvert.base.errors import InputError
from dsconvert.scoring.accuracy import Predictor, detect_all, evaluate_predictors

# in a 64 x 64 letterbox of a 32 x 64 (h x w) image: 16 rows of padding above; x, y, w, h, objectness, two classes
BOX = [20, 30, 10, 8, 0.9, 1.0, 0.0]


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((32, 64, 3), np.uint8))
    # the same box in the image's own fractions: y = 30 - 16 = 14 of 32
    (tmp_path / "labels/a.txt").write_text(f"0 {20 / 64} {14 / 32} {10 / 64} {8 / 32}\n")
    return [tmp_path / "images/a.png"]


def always(*rows: list[float]) -> Predictor:
    predictions = np.array(rows, np.float32).reshape(1, -1, 7)
    return lambda batch: predictions


def test_boxes_come_back_to_the_image_and_meet_the_labels(paths):
    right, wrong, none = evaluate_predictors([always(BOX), always([*BOX[:5], 0.0, 1.0]), always()], paths, 64, 2)
    assert (right.map50_95, right.recall) == (1, 1)
    assert wrong.map50_95 == none.map50_95 == 0


def test_without_labels_the_first_predictor_is_the_truth(paths):
    (paths[0].parents[1] / "labels/a.txt").unlink()
    shifted = [25, *BOX[1:]]  # IoU 5 / 15: below every threshold
    first, same, other = evaluate_predictors([always(BOX), always(BOX), always(shifted)], paths, 64, 2, labelled=False)
    assert first.map50_95 == same.map50_95 == 1
    assert other.map50 == 0


def test_an_unsure_first_predictor_is_no_truth(paths):
    found = detect_all([always([*BOX[:4], 0.2, 1.0, 0.0])], paths, 64, 2, labelled=False)
    assert (found.measurable, [len(boxes) for boxes in found.found[0]]) == (False, [1] * len(paths))
    with pytest.raises(InputError, match="nothing to measure"):
        found.metrics()
    with pytest.raises(InputError, match="finds nothing"):
        evaluate_predictors([always([*BOX[:4], 0.2, 1.0, 0.0])], paths, 64, 2, labelled=False)


def test_without_labels_a_predictor_agrees_wholly_with_itself(paths):
    """Whatever it finds: boxes that overlap by an IoU of 0.54, unsure ones, several classes of one box, one wholly in
    the margin (above row 16), and more of a class than COCO counts."""
    some = always(
        BOX, [23, *BOX[1:4], 0.8, 1.0, 0.0], [40, 30, 10, 8, 1.0, 0.7, 0.65], [50, 34, 9, 9, 1.0, 0.2, 0.1],
        [30, 4, 10, 8, 0.95, 1.0, 0.0],
    )  # fmt: skip
    crowd = always(*([2 * (i % 32) + 1, 2 * (i // 32) + 18, 1.5, 1.5, 0.9 - i / 500, 1, 0] for i in range(160)))
    for model in (some, crowd):
        for found in evaluate_predictors([model, model], paths, 64, 2, labelled=False):
            assert (found.map50_95, found.map50, found.precision, found.recall) == (1, 1, 1, 1)


def test_a_network_agrees_wholly_with_itself(work, call):
    """The random network finds hundreds of boxes in each picture, most of them unsure."""
    done = call("eval", "best.pt", "best.pt", "--data", "images", "--imgsz", 64, "--json", cwd=work)
    assert done.code == 0, done.err
    for row in json.loads(done.out)["models"]:
        assert (row["map50_95"], row["map50"], row["precision"], row["recall"]) == (1, 1, 1, 1)


def test_how_far_boxes_may_overlap_depends_on_who_says_what_is_true(paths):
    """An IoU of 0.54 lies between val.py's limit, against labels, and detect.py's, against a model's own boxes."""
    near = always([*BOX[:4], 0.8, *BOX[5:]], [BOX[0] + 3, *BOX[1:4], 0.4, *BOX[5:]])

    def kept(labelled: bool, overlap: float | None) -> int:
        return len(detect_all([near], paths[:1], 64, 2, labelled, overlap=overlap).found[0][0])

    assert [kept(labelled=True, overlap=limit) for limit in (None, 0.6, 0.45)] == [2, 2, 1]
    assert [kept(labelled=False, overlap=limit) for limit in (None, 0.6, 0.45)] == [1, 2, 1]


def test_what_scores_too_little_or_overlaps_too_much_does_not_count(paths):
    """As val.py has it: what is dropped is no false alarm, and cannot find an object."""
    right, beside = [*BOX[:4], 0.4, *BOX[5:]], [BOX[0] + 4, *BOX[1:4], 0.8, *BOX[5:]]

    def boxes(*limits: float) -> list[float]:
        found = detect_all([always(right, beside)], paths[:1], 64, 2, True, None, *limits)
        return [round(float(score), 3) for score in found.found[0][0][:, 4]]

    assert boxes() == boxes(0.001, 0.6) == [0.8, 0.4]
    assert boxes(0.5) == [0.8]
    assert boxes(0.001, 0.2) == [0.8]
    assert boxes(0.9) == []
