"""`eval`'s P, R and mAP against a plain implementation of their definitions, which shares no code with ours."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from conftest import SHARED
from hypothesis import given, settings
from hypothesis import strategies as st
from test_coco import random_case

from dsconvert.photos.dataset import read_data_yaml
from dsconvert.scoring.accuracy import detect_all
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.coco import best_f1, coco_metrics, matched, overlaps
from dsconvert.scoring.masks import mask_f1, outlines

COCO500, YOLOV5N = SHARED / "coco" / "coco500.yaml", SHARED / "checkpoints" / "yolov5n.pt"
# Both sides average the same fractions in float64, in another order.
SAME = {"abs": 1e-9}
OBJECT = [10, 10, 60, 60]


def iou(a, b) -> float:
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - w * h)


class Plain:
    """Loops over images, classes, boxes and objects."""

    def __init__(self, detections, truths, limit=100):
        self.objects = {int(k): sum(int((t[:, 0] == k).sum()) for t in truths) for t in truths for k in t[:, 0]}
        self.lists: dict[int, list[list[tuple[float, list[float]]]]] = {k: [] for k in self.objects}
        for kind, lists in self.lists.items():
            for found, truth in zip(detections, truths, strict=True):
                rows = sorted((r for r in found.tolist() if r[5] == kind), key=lambda r: -r[4])
                objects = [t[1:] for t in truth.tolist() if t[0] == kind]
                lists.append([(r[4], [iou(r, o) for o in objects]) for r in rows])
        self.limit = limit

    def hits(self, kind, least, limit):
        """(score, right or wrong), image by image and there the surest first."""
        answers = []
        for rows in self.lists[kind]:
            taken = set()
            for score, over in rows[:limit]:
                free = [j for j, o in enumerate(over) if j not in taken and o >= least]
                best = max(free, key=lambda j: (over[j], j), default=None)
                taken.add(best)
                answers.append((score, best is not None))
        return answers

    def average_precision(self, kind, least):
        ranked = sorted(self.hits(kind, least, self.limit), key=lambda a: -a[0])
        right, curve = 0, []
        for place, (_, good) in enumerate(ranked, 1):
            right += good
            curve.append((right / self.objects[kind], right / place))
        best, precisions = 0.0, []
        for level in np.linspace(0, 1, 101)[::-1]:  # the best precision at that recall or any higher
            while curve and curve[-1][0] >= level:
                best = max(best, curve.pop()[1])
            precisions.append(best)
        return sum(precisions) / 101

    def mean_ap(self, leasts):
        return float(np.mean([self.average_precision(k, v) for k in self.objects for v in leasts]))

    def precision_recall(self):
        """Exact, at the lowest of the 999 confidences that have the best mean F1."""
        answers = {kind: self.hits(kind, 0.5, None) for kind in self.objects}
        best = None
        for confidence in np.linspace(0, 1, 1001)[1:-1]:
            each = []
            for kind, rows in answers.items():
                shown = [good for score, good in rows if score >= confidence]
                right, wrong = sum(shown), len(shown) - sum(shown)
                missed = self.objects[kind] - right
                each.append((
                    Fraction(2 * right, 2 * right + wrong + missed), Fraction(right, max(len(shown), 1)),
                    Fraction(right, right + missed),
                ))  # fmt: skip
            f1, p, r = (sum(c) / len(each) for c in zip(*each, strict=True))
            if best is None or f1 > best[0]:
                best = f1, p, r
        return float(best[1]), float(best[2])


def check(detections, truths, shapes, nc):
    ours, plain = coco_metrics(detections, truths, shapes, nc), Plain(detections, truths)
    assert (ours.precision, ours.recall) == pytest.approx(plain.precision_recall(), **SAME)
    assert ours.map50 == pytest.approx(plain.mean_ap([0.5]), **SAME)
    assert ours.map50_95 == pytest.approx(plain.mean_ap(np.linspace(0.5, 0.95, 10)), **SAME)
    assert set(ours.per_class) == set(plain.objects)
    return ours


def found(*rows):
    return np.array([[*box, score, kind] for box, score, kind in rows], np.float64).reshape(-1, 6)


def true(*rows):
    return np.array([[kind, *box] for box, kind in rows], np.float64).reshape(-1, 5)


@st.composite
def scenes(draw):
    """Up to three images of up to three classes: objects and boxes on a coarse grid, many alike, scores that tie and
    that lie on confidences; images without objects, classes without objects or boxes."""
    nc, corner, size = draw(st.integers(1, 3)), st.integers(0, 4), st.integers(2, 5)
    kind, score = st.integers(0, nc - 1), st.sampled_from([0.001, 0.2, 0.25, 0.2505, 0.5, 0.75, 0.999, 1.0])
    boxes = st.tuples(corner, corner, size, size).map(lambda b: [10 * b[0], 10 * b[1], 10 * (b[0] + b[2]), 10 * (b[1] + b[3])])  # noqa: E501  # fmt: skip
    count = draw(st.integers(1, 3))
    truths = [true(*draw(st.lists(st.tuples(boxes, kind), max_size=4))) for _ in range(count)]
    truths[0] = np.concatenate((truths[0], true((draw(boxes), draw(kind)))))
    detections = [found(*draw(st.lists(st.tuples(boxes, score, kind), max_size=7))) for _ in range(count)]
    return detections, truths, [(100, 100)] * count, nc


@settings(deadline=None)
@given(scenes())
def test_small_scenes_equal_the_definitions(scene):
    check(*scene)


@pytest.mark.parametrize(("seed", "nc"), [(0, 4), (1, 2), (2, 8)])
def test_drawn_scenes_equal_the_definitions(seed, nc):
    ours = check(*random_case(seed, 12, nc), nc)
    assert 0.1 < ours.precision < 0.95  # the case is neither hopeless nor perfect
    assert 0.1 < ours.recall < 0.95


@settings(deadline=None)
@given(scenes())
def test_no_object_is_found_twice(scene):
    detections, truths, shapes, nc = scene
    for d, t in zip(detections, truths, strict=True):
        hits = matched(d, t, overlaps(d[:, :4], t[:, 1:]))
        for kind in range(nc):
            assert hits[d[:, 5] == kind].sum() <= (t[:, 0] == kind).sum()
    ours = coco_metrics(detections, truths, shapes, nc)
    assert 0 <= ours.precision <= 1
    assert 0 <= ours.recall <= 1


def test_several_boxes_on_one_object():
    """IoU 0.61 at the better score, and 0.96: the first finds the object, the second is a false alarm. Best is to show
    the first alone; where both are shown, half of them is right."""
    boxes = found(([22, 10, 72, 60], 0.9, 0), ([11, 10, 61, 60], 0.8, 0))
    ours = check([boxes], [true((OBJECT, 0))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == (1, 1)
    # another class's two objects are found at 0.7 and 0.6 only, so that both boxes are shown
    boxes = np.concatenate((boxes, found((OBJECT, 0.7, 1), ([10, 70, 60, 90], 0.6, 1))))
    ours = check([boxes], [true((OBJECT, 0), (OBJECT, 1), ([10, 70, 60, 90], 1))], [(100, 100)], 2)
    assert (ours.precision, ours.recall) == ((0.5 + 1) / 2, 1)


def test_the_surer_box_takes_the_object_and_the_other_the_next():
    """Objects side by side: the surest box takes the one it overlaps most; the next one, whose best is taken, takes
    the other, which it overlaps enough."""
    objects = true(([0, 0, 100, 100], 0), ([20, 0, 120, 100], 0))
    boxes = found(([1, 0, 101, 100], 0.9, 0), ([2, 0, 102, 100], 0.8, 0))
    assert matched(boxes, objects, overlaps(boxes[:, :4], objects[:, 1:])).tolist() == [True, True]
    ours = check([boxes], [objects], [(200, 200)], 1)
    assert (ours.precision, ours.recall) == (1, 1)


def test_of_two_equal_overlaps_the_last_is_taken_as_in_coco():
    """An IoU of 7/13 with both objects; the second box finds the first object alone."""
    objects = true(([0, 0, 100, 100], 0), ([60, 0, 160, 100], 0))
    boxes = found(([30, 0, 130, 100], 0.9, 0), ([0, 0, 100, 100], 0.8, 0))
    ours = check([boxes], [objects], [(200, 200)], 1)
    assert (ours.precision, ours.recall) == (1, 1)
    assert check([boxes], [objects[::-1]], [(200, 200)], 1).recall == 0.5


@pytest.mark.parametrize(("width", "right"), [(50, 1), (49, 0)])
def test_an_overlap_of_a_half_is_enough(width, right):
    ours = check([found(([0, 0, width, 100], 0.9, 0))], [true(([0, 0, 100, 100], 0))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == (right, right)


def test_a_score_equal_to_the_confidence_is_shown():
    """Class 0's box scores 0.5, class 1's false alarm 0.4999. At a confidence of 0.5 the first is shown and the second
    is not; were equal scores hidden, no confidence could part them."""
    boxes = found((OBJECT, 0.5, 0), (OBJECT, 0.75, 1), ([70, 70, 90, 90], 0.4999, 1))
    ours = check([boxes], [true((OBJECT, 0), (OBJECT, 1))], [(100, 100)], 2)
    assert (ours.precision, ours.recall) == (1, 1)
    # and one just below a confidence is not shown at it
    boxes = found((OBJECT, 0.4999, 0), ([70, 70, 90, 90], 0.4991, 0))
    assert check([boxes], [true((OBJECT, 0))], [(100, 100)], 1).precision == 0.5


@pytest.mark.parametrize("score", [0.001, 0.999, 1.0])
def test_the_least_and_the_greatest_scores_count(score):
    ours = check([found((OBJECT, score, 0))], [true((OBJECT, 0))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == (1, 1)


def test_a_class_without_objects_takes_no_part():
    """Its false alarms cost the other classes nothing, as in YOLOv5's val.py and in COCO."""
    boxes = [found((OBJECT, 0.9, 0), (OBJECT, 0.95, 2)), found((OBJECT, 0.9, 2))]
    ours = check(boxes, [true((OBJECT, 0)), true()], [(100, 100)] * 2, 4)
    assert (ours.precision, ours.recall, ours.per_class) == (1, 1, {0: pytest.approx(1)})


def test_boxes_on_an_image_without_objects_are_wrong():
    ours = check([found((OBJECT, 0.5, 0)), found((OBJECT, 0.9, 0))], [true((OBJECT, 0)), true()], [(100, 100)] * 2, 1)
    assert (ours.precision, ours.recall) == (0.5, 1)


def test_equal_scores_are_shown_together():
    """Right and wrong boxes of one score, whichever comes first in the list."""
    for order in (1, -1):
        boxes = found((OBJECT, 0.5, 0), ([70, 70, 90, 90], 0.5, 0))[::order]
        ours = check([boxes], [true((OBJECT, 0))], [(100, 100)], 1)
        assert (ours.precision, ours.recall) == (0.5, 1)


def test_equal_f1_takes_the_least_confidence():
    """Of two objects: one found alone (P 1, R 1/2) has the F1 of both found among four (P 1/2, R 1)."""
    boxes = [(OBJECT, 0.9, 0), *(([70, y, 90, y + 9], 0.4, 0) for y in (10, 30)), ([10, 70, 60, 90], 0.4, 0)]
    ours = check([found(*boxes)], [true((OBJECT, 0), ([10, 70, 60, 90], 0))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == (0.5, 1)


def test_equal_f1_is_equal_whatever_its_last_bits():
    """Of four objects: two found alone (P 1, R 1/2) have the F1 2/3 of three found among five (P 3/5, R 3/4), which in
    float64 comes out a bit less."""
    objects = [[10 * i, 0, 10 * i + 9, 9] for i in range(4)]
    wrong = [[10 * i, 50, 10 * i + 9, 59] for i in range(9)]
    boxes = found(*((b, 0.9, 0) for b in objects[:2]), *((b, 0.4, 0) for b in (objects[2], *wrong[:2])))
    ours = check([boxes], [true(*((b, 0) for b in objects))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == (3 / 5, 3 / 4)


def test_f1_decides_where_little_is_found():
    """Of ten objects: one found among two (P 1/2, R 1/10, F1 1/6), then two among twelve (P 1/6, R 1/5, F1 2/11)."""
    objects = [[10 * i, 0, 10 * i + 9, 9] for i in range(10)]
    wrong = [[10 * i, 50, 10 * i + 9, 59] for i in range(10)]
    rows = [(objects[0], 0.9, 0), (wrong[0], 0.9, 0), (objects[1], 0.4, 0), *((b, 0.4, 0) for b in wrong[1:])]
    ours = check([found(*rows)], [true(*((b, 0) for b in objects))], [(100, 100)], 1)
    assert (ours.precision, ours.recall) == pytest.approx((2 / 12, 2 / 10))


def test_confidences_are_thousandths_from_0_001_to_0_999():
    """What they part counts apart: 0.999 and what is below it; not 1 and 0.9995."""
    for scores, precision in (((0.999, 0.9985), 1), ((1.0, 0.9995), 0.5)):
        boxes = found((OBJECT, scores[0], 0), ([70, 70, 90, 90], scores[1], 0))
        assert check([boxes], [true((OBJECT, 0))], [(100, 100)], 1).precision == precision


def test_more_boxes_than_coco_looks_at_count_for_precision():
    """One class and 150 objects of it in one image: COCO's mAP stops at 100, a user sees all."""
    boxes = [[10 * (i % 15), 10 * (i // 15), 10 * (i % 15) + 9, 10 * (i // 15) + 9] for i in range(150)]
    truth = true(*((b, 0) for b in boxes))
    ours = check([found(*((b, 0.9 - i / 1000, 0) for i, b in enumerate(boxes)))], [truth], [(200, 200)], 1)
    assert (ours.precision, ours.recall) == (1, 1)
    assert ours.map50 == pytest.approx(67 / 101)  # recall 100 / 150: 67 of the 101 levels
    more = coco_metrics([found(*((b, 0.9, 0) for b in boxes))], [truth], [(200, 200)], 1, 150)
    assert more.map50_95 == pytest.approx(1)


def test_masks_are_counted_by_their_own_overlap():
    """Two boxes on the object as the labels have it; one's mask is the object's, the other's the opposite corner."""
    shape, triangle = (40, 40), [0.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    truth, objects = [true(([0, 0, 40, 40], 0))], [outlines([[0, *triangle]], shape)]
    other = outlines([[0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0]], shape)
    boxes = [found(([0, 0, 40, 40], 0.9, 0), ([0, 0, 40, 40], 0.8, 0))]
    assert mask_f1([[*objects[0], *other]], boxes, objects, truth) == (1, 1)
    assert mask_f1([[*other, *objects[0]]], boxes, objects, truth) == (0.5, 1)
    assert mask_f1([[*objects[0], *objects[0]]], boxes, objects, truth) == (1, 1)  # the second is wrong, and not shown
    assert mask_f1([[]], [found()], objects, truth) == (0, 0)


def test_without_boxes_nothing_is_right():
    assert best_f1([found()], [true((OBJECT, 0))], [np.zeros(0, bool)]) == (0, 0)


@pytest.mark.long
@pytest.mark.skipif(not (COCO500.is_file() and YOLOV5N.is_file()), reason="the shared COCO images are not here")
def test_yolov5n_on_500_images_of_coco():
    """At 320 pixels, a quarter of the work: what is counted is the same."""
    data, model = read_data_yaml(COCO500), load_candidate(YOLOV5N, 320)
    seen = detect_all([model.predict], data.val, 320, len(data.names))
    assert len(seen.shapes) == 500
    ours = check(seen.found[0], seen.truths, seen.shapes, seen.nc)
    assert 0.1 < ours.map50_95 < 0.5
    assert 0.2 < ours.precision < 0.9
