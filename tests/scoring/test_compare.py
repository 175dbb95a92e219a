"""Agreement of two models: known answers, a plain loop, and what swapping or equating the models must do."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsconvert.base.errors import InputError
from dsconvert.scoring.accuracy import Predictor
from dsconvert.scoring.compare import MOST_SHIFT, ScoreShift, agreement, compare, match, score_shift
from dsconvert.scoring.detect import DetectOptions

SQUARE = np.zeros((64, 64, 3), np.uint8)


def always(*rows: list[float]) -> Predictor:
    """x, y, w, h, objectness, then the classes."""
    predictions = np.array(rows, np.float32).reshape(1, -1, 7)
    return lambda batch: predictions


def boxes(*rows: list[float]) -> np.ndarray:
    """x1, y1, x2, y2, score, class."""
    return np.array(rows, np.float32).reshape(-1, 6)


def iou(a, b) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(w, 0) * max(h, 0)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


@st.composite
def crowds(draw):
    corner, size = st.integers(0, 12), st.integers(4, 12)
    rows = draw(st.lists(st.tuples(corner, corner, size, size, st.integers(1, 9), st.integers(0, 1)), max_size=8))
    return boxes(*([x, y, x + w, y + h, s / 10, c] for x, y, w, h, s, c in rows))


@given(crowds(), crowds())
def test_pairs_are_those_of_a_plain_loop(a, b):
    free = {(i, j) for i in range(len(a)) for j in range(len(b)) if a[i][5] == b[j][5] and iou(a[i], b[j]) >= 0.5}
    pairs = []
    while free:
        best = max(free, key=lambda p: (iou(a[p[0]], b[p[1]]), -p[0], -p[1]))
        pairs.append(best)
        free = {p for p in free if p[0] != best[0] and p[1] != best[1]}
    found = match(a, b)
    assert list(zip(found.first, found.second, strict=True)) == pairs
    np.testing.assert_allclose(found.iou, [iou(a[i], b[j]) for i, j in pairs])


@given(st.lists(st.tuples(crowds(), crowds()), min_size=1, max_size=3))
def test_swapping_the_models_swaps_the_answer(pairs):
    there, back = agreement(pairs, None), agreement([(b, a) for a, b in pairs], None)
    assert there.matched <= min(sum(len(a) for a, _ in pairs), sum(len(b) for _, b in pairs))
    assert there.matched + there.only_first == sum(len(a) for a, _ in pairs) == back.matched + back.only_second
    if all(len({*match(a, b).iou}) == len(match(a, b).iou) for a, b in pairs):  # ties may be broken the other way
        assert (there.matched, there.only_first) == (back.matched, back.only_second)


def test_shifts_overlaps_and_shares_by_hand():
    first = boxes([0, 0, 10, 10, 0.5, 0], [20, 20, 30, 30, 0.5, 1], [40, 40, 50, 50, 0.5, 0], [0, 40, 9, 49, 0.5, 1])
    # moved by half its width less a bit, surer; the same, less sure; of another class
    second = boxes([0, 0, 10, 5, 0.75, 0], [20, 20, 30, 30, 0.125, 1], [40, 40, 50, 50, 0.5, 1])
    found = agreement([(first, second), (boxes(), boxes())], 0.25)
    assert (found.matched, found.only_first, found.only_second) == (2, 2, 1)
    assert found.share == 2 / 5
    assert found.mean_iou == 0.75  # of 1/2 and 1
    assert (found.mean_shift, found.largest_shift) == (-0.0625, -0.375)
    assert found.map50_95 == 0.25
    assert [(i.matched, i.only_first, i.only_second) for i in found.images] == [(2, 2, 1), (0, 0, 0)]


def test_an_overlap_of_just_a_half_matches():
    assert match(boxes([0, 0, 10, 10, 0.5, 0]), boxes([0, 0, 10, 5, 0.5, 0])).iou == [0.5]
    assert match(boxes([0, 0, 10, 10, 0.5, 0]), boxes([0, 0, 10, 4.9, 0.5, 0])).iou == []


def test_a_model_agrees_with_itself():
    model = always([20, 30, 10, 8, 1, 0.5, 0], [40, 30, 10, 8, 1, 0, 0.75])
    found = compare(model, model, [SQUARE, SQUARE], 64, DetectOptions())
    assert (found.share, found.matched, found.mean_iou, found.mean_shift) == (1, 4, 1, 0)
    assert found.map50_95 == 1
    assert len(found.images) == 2


def test_the_first_models_sure_objects_are_the_truth_of_the_average_precision():
    sure, unsure = [20, 30, 10, 8, 1, 0.5, 0], [40, 30, 10, 8, 1, 0.125, 0]
    assert compare(always(sure, unsure), always(sure), [SQUARE], 64, DetectOptions()).map50_95 == 1
    lost = compare(always(sure), always(), [SQUARE], 64, DetectOptions())
    assert (lost.map50_95, lost.share, lost.mean_iou, lost.largest_shift) == (0, 0, None, None)
    new = compare(always(), always(sure), [SQUARE], 64, DetectOptions())
    assert (new.map50_95, new.only_second) == (None, 1)


def test_nothing_found_is_no_agreement():
    with pytest.raises(InputError, match="Neither"):
        compare(always([20, 30, 10, 8, 1, 0.125, 0]), always(), [SQUARE], 64, DetectOptions())


def overlapping() -> Predictor:
    """Boxes of one class that overlap by an IoU of 0.54 (YOLOv5's val.py keeps both, its detect.py does not), unsure
    ones, two classes for one box, and one that lies wholly in the margin of a wide image."""
    return always(
        [20, 30, 10, 8, 1, 0.9, 0], [23, 30, 10, 8, 1, 0.6, 0], [40, 30, 10, 8, 1, 0.7, 0.65],
        [50, 34, 9, 9, 1, 0.2, 0.1], [30, 2, 10, 3, 1, 0.95, 0],
        [62, 30, 12, 8, 1, 0.5, 0], [62, 30, 14, 8, 0.3, 0.9, 0],
    )  # fmt: skip


@pytest.mark.parametrize("options", [DetectOptions(), DetectOptions(0.0, 0.9), DetectOptions(0.6, 0.1, 3)])
def test_a_model_agrees_wholly_with_itself_whatever_it_finds(options):
    found = compare(overlapping(), overlapping(), [SQUARE, np.zeros((32, 64, 3), np.uint8)], 64, options)
    assert (found.map50_95, found.share, found.mean_shift, found.largest_shift) == (1, 1, 0, 0)
    assert found.scores.first_best == found.scores.second_best
    assert found.scores.first_boxes == found.scores.second_boxes


def test_a_model_agrees_wholly_with_itself_on_more_objects_than_coco_counts():
    crowd = always(*([4 * (i % 16) + 2, 4 * (i // 16) + 2, 3, 3, 0.9 - i / 500, 1, 0] for i in range(160)))
    found = compare(crowd, crowd, [SQUARE], 64, DetectOptions())
    assert (found.map50_95, found.matched) == (1, 160)


def test_unsure_boxes_of_the_second_model_still_count():
    """An object that the second is just not sure of is late in the list, not missing."""
    first, second = [20, 30, 10, 8, 1, 0.26, 0], [20, 30, 10, 8, 1, 0.24, 0]
    found = compare(always(first), always(second), [SQUARE], 64, DetectOptions())
    assert (found.map50_95, found.share) == (1, 0)


def test_scores_by_hand():
    """Best scores 0.75, 0.5 and none of the first, 0.5, none and 0.25 of the second; more than 0.25 counts."""
    first = [boxes([0, 0, 9, 9, 0.75, 0], [0, 0, 9, 9, 0.125, 0]), boxes([0, 0, 9, 9, 0.5, 0]), boxes()]
    second = [boxes([0, 0, 9, 9, 0.5, 0], [0, 0, 9, 9, 0.375, 0]), boxes(), boxes([0, 0, 9, 9, 0.25, 1])]
    found = score_shift(first, second)
    assert found == ScoreShift(1.25 / 3, 0.75 / 3, 2, 2)
    assert found.shift == pytest.approx(-0.5 / 3)
    assert score_shift(second, first).shift == -found.shift
    # a file that keeps what is above 0.25 alone is compared above it
    assert score_shift(first, second, 0.25) == ScoreShift(1.25 / 3, 0.5 / 3, 2, 2)
    assert score_shift([], []) == ScoreShift(0, 0, 0, 0)


@pytest.mark.parametrize(
    ("second", "large"), [(0.70, False), (0.699, True), (0.76, False), (0.761, True), (0.73, False)]
)
def test_a_shift_of_more_than_three_hundredths_is_said(second, large):
    """0.03 itself is not more, though 0.73 less 0.70 is in float32."""
    assert MOST_SHIFT == 0.03
    found = score_shift([boxes([0, 0, 9, 9, 0.73, 0])], [boxes([0, 0, 9, 9, second, 0])])
    assert found.large == large
    said = found.warning("best.pt", "best.onnx")
    assert (said is not None) == large
    if said:
        assert f"0.73 on average with best.pt and {second:.2f} with best.onnx" in said


def test_the_command_says_how_sure_both_are(work, call):
    """A network beside one whose objectness is lower."""
    from pt_writer import yolov5_bytes

    from dsconvert.yolo.checkpoint import load_checkpoint

    loaded = load_checkpoint(work / "best.pt")
    for conv in loaded.network.detect.m:
        conv.bias.data.view(3, 7)[:, 4] -= 0.5
    (work / "unsure.pt").write_bytes(yolov5_bytes(loaded.network, loaded.head))
    same = call("compare", "best.pt", "best.pt", "images", "--imgsz", 64, "--json", cwd=work)
    assert same.code == 0, same.err
    found = json.loads(same.out)
    assert (found["map50_95"], found["agreement"], found["mean_confidence_shift"]) == (1, 1, 0)
    assert found["mean_best_score_first"] == found["mean_best_score_second"]
    assert "Warning" not in same.err
    apart = call("compare", "best.pt", "unsure.pt", "images", "--imgsz", 64, "--json", "--conf-thres", 0.01, cwd=work)
    assert apart.code == 0, apart.err
    other = json.loads(apart.out)
    assert other["mean_best_score_first"] == found["mean_best_score_first"]
    assert other["mean_best_score_second"] < found["mean_best_score_first"] - 0.03
    assert other["confident_boxes_second"] < other["confident_boxes_first"] == found["confident_boxes_first"]
    assert "Warning: the best score of an image is" in apart.err
    shown = call("compare", "best.pt", "unsure.pt", "images", "--imgsz", 64, "--quiet", cwd=work)
    assert "best score of an image, mean" in shown.out
    assert "boxes above 0.25" in shown.out
