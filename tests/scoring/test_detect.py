"""Objects in images: the letterbox undone, YOLOv5's rules of suppression, label lines and documents others can read."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path, PurePath

import cv2
import numpy as np
import pytest
from faster_coco_eval import COCO
from hypothesis import given
from hypothesis import strategies as st

from dsconvert.base.errors import InputError
from dsconvert.export.ends.nms import Nms
from dsconvert.photos.labels import read_labels
from dsconvert.scoring.accuracy import Predictor
from dsconvert.scoring.detect import (
    DetectOptions,
    class_name,
    class_numbers,
    coco_document,
    counts,
    draw,
    encoded,
    find,
    label_names,
    names_below,
    picture_name,
    yolo_lines,
)

WIDE = np.zeros((32, 64, 3), np.uint8)  # in a 64 x 64 letterbox it has 16 rows of padding above
FOUND = np.array([[10, 20, 30, 60, 0.9, 1], [0, 0, 200, 100, 0.5, 0], [5, 5, 6, 6, 0.3, 1]], np.float32)


def always(*rows: list[float]) -> Predictor:
    """x, y, w, h, objectness, then the classes."""
    predictions = np.array(rows, np.float32)[None]
    return lambda batch: predictions


def test_boxes_are_in_pixels_of_the_image():
    found = find(always([20, 30, 10, 8, 1.0, 0.5, 0.0]), WIDE, 64, DetectOptions())
    np.testing.assert_array_equal(found, [[15, 10, 25, 18, 0.5, 0]])


def test_what_lies_in_the_margin_is_no_object():
    inside, outside, touching = [20, 30, 10, 8, 1, 0.5, 0], [20, 8, 10, 8, 1, 0.75, 0], [50, 14, 10, 8, 1, 0.375, 0]
    found = find(always(inside, outside, touching), WIDE, 64, DetectOptions())
    np.testing.assert_array_equal(found[:, :5], [[15, 10, 25, 18, 0.5], [45, 0, 55, 2, 0.375]])


def test_a_box_has_only_its_best_class_and_that_decides_what_classes_keeps():
    both = always([20, 30, 10, 8, 1.0, 0.5, 0.75])
    assert find(both, WIDE, 64, DetectOptions())[:, 4:].tolist() == [[0.75, 1]]
    assert find(both, WIDE, 64, DetectOptions(classes=frozenset({1})))[:, 5].tolist() == [1]
    assert len(find(both, WIDE, 64, DetectOptions(classes=frozenset({0})))) == 0


def test_limits_of_confidence_overlap_and_number():
    # the second overlaps the first by 8/12 of their union, the third is elsewhere
    three = always([20, 30, 10, 8, 1, 0.875, 0], [22, 30, 10, 8, 1, 0.75, 0], [50, 30, 10, 8, 1, 0.375, 0])

    def scores(**options) -> list[float]:
        return find(three, WIDE, 64, DetectOptions(**options))[:, 4].tolist()

    assert scores() == [0.875, 0.375]
    assert scores(iou=0.7) == [0.875, 0.75, 0.375]
    assert scores(confidence=0.5) == [0.875]
    assert scores(most=1) == [0.875]


def test_agnostic_suppression_looks_across_classes():
    two = always([20, 30, 10, 8, 1, 0.9, 0], [21, 30, 10, 8, 1, 0, 0.8])
    assert find(two, WIDE, 64, DetectOptions())[:, 5].tolist() == [0, 1]
    assert find(two, WIDE, 64, DetectOptions(agnostic=True))[:, 5].tolist() == [0]
    # a class that was not asked for suppresses nothing
    assert find(two, WIDE, 64, DetectOptions(agnostic=True, classes=frozenset({1})))[:, 5].tolist() == [1]


def test_what_a_suppressed_file_cannot_give_is_named():
    limits = Nms(0.25, 0.45, 100)
    assert DetectOptions(0.25, 0.45, 100).beyond(limits) is None
    assert DetectOptions(0.1, 0.5, 1000).beyond(limits) == "conf_thres 0.25, iou_thres 0.45, max_det 100"


def test_classes_by_number_and_by_name():
    names = ["person", "traffic light", "a,b", "7"]
    assert class_numbers([], names) is None
    assert class_numbers(["0,2", "traffic light"], names) == {0, 1, 2}
    assert class_numbers(["a,b"], names) == {2}
    assert class_numbers(["7"], names) == {3}  # no class has this number, but one this name
    assert class_numbers(["90"], []) == {90}  # a file that names none
    for wrong in ("4", "dog", "", "-1", "1" * 5000):
        with pytest.raises(InputError, match="no class"):
            class_numbers([wrong], names)


def test_label_lines_are_what_our_own_reader_reads(tmp_path):
    text = yolo_lines(FOUND, (100, 200), False)
    assert text.splitlines()[:2] == ["1 0.1 0.4 0.1 0.4", "0 0.5 0.5 1 1"]
    (tmp_path / "x.txt").write_text(text)
    labels = read_labels(tmp_path / "x.txt", 2)
    low = (labels[:, 1:3] - labels[:, 3:] / 2) * (200, 100)
    np.testing.assert_allclose(low, FOUND[:, :2], atol=1e-3)  # six digits of numbers up to 200
    assert yolo_lines(FOUND, (100, 200), True).splitlines()[0] == "1 0.1 0.4 0.1 0.4 0.9"
    assert yolo_lines(FOUND[:0], (100, 200), True) == ""


def test_the_document_is_coco_to_those_who_read_coco():
    document = coco_document(["a.jpg", "b.jpg"], [(100, 200), (10, 10)], [FOUND, FOUND[:0]], ["cat"])
    assert [i["file_name"] for i in document["images"]] == ["a.jpg", "b.jpg"]
    assert {c["id"]: c["name"] for c in document["categories"]} == {0: "cat", 1: "class 1"}
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(document)
    best = coco.loadAnns(coco.getAnnIds(imgIds=[0]))[0]
    assert (best["bbox"], best["area"], best["category_id"], best["score"]) == ([10, 20, 20, 40], 800, 1, 0.9)
    assert coco.getAnnIds(imgIds=[1]) == []


def test_counts_most_frequent_first():
    assert list(counts([FOUND, FOUND[:1], FOUND[:0]]).items()) == [(1, 3), (0, 1)]
    assert counts([FOUND[:0]]) == {}


def test_hostile_names_are_shown_as_text():
    assert class_name(0, ["\x1b[2Jcat\n"]) == r"\x1b[2Jcat\x0a"
    assert len(class_name(0, ["x" * 1000])) == 40
    assert class_name(1, ["cat"]) == class_name(1, ["cat", ""]) == "class 1"


def test_a_box_is_drawn_where_it_is_and_the_image_is_left_alone():
    image = np.full((100, 200, 3), 114, np.uint8)
    drawn = draw(image, FOUND[:1], ["a", "b"], thickness=1, labels=False)
    assert (image == 114).all()
    changed = np.argwhere((drawn != image).any(2))
    # smoothing reaches a pixel farther
    np.testing.assert_allclose([changed.min(0), changed.max(0)], [[20, 10], [60, 30]], atol=1)
    assert (drawn[30:50, 15:25] == 114).all()  # the object itself stays visible
    labelled = draw(image, FOUND[:1], ["a", "b"])
    assert (labelled[:18] != image[:18]).any()
    assert (draw(image, FOUND[:1], ["a", "b"], scores=False) != labelled).any()


@given(
    st.lists(st.tuples(*[st.floats(-50, 300)] * 4), max_size=4), st.integers(1, 40),
    st.text(max_size=50), st.tuples(st.integers(1, 80), st.integers(1, 80)),
)  # fmt: skip
def test_drawing_never_fails(corners, thickness, name, shape):
    found = np.array([[*c, 0.5, 0] for c in corners], np.float32).reshape(-1, 6)
    assert draw(np.zeros((*shape, 3), np.uint8), found, [name], thickness).shape == (*shape, 3)


def test_colours_survive_the_way_into_a_file():
    red = np.zeros((8, 8, 3), np.uint8)
    red[..., 0] = 255
    again = cv2.imdecode(np.frombuffer(encoded(red, ".PNG"), np.uint8), cv2.IMREAD_COLOR)
    assert (again[..., 2] == 255).all()
    assert not again[..., :2].any()
    with pytest.raises(InputError, match="cannot be written"):
        encoded(red, ".xyz")


def test_outputs_keep_the_folders_that_tell_images_apart():
    paths = [Path("in/a/x.jpg"), Path("in/b/x.jpg"), Path("in/b/../../elsewhere/x.jpg")]
    assert names_below(paths) == [PurePath("in/a/x.jpg"), PurePath("in/b/x.jpg"), PurePath("elsewhere/x.jpg")]
    assert names_below([Path("/photos/x.jpg")]) == [PurePath("x.jpg")]
    assert picture_name(PurePath("a/x.JPG")) == PurePath("a/x.JPG")
    assert picture_name(PurePath("a/x.gif")) == PurePath("a/x.gif.jpg")


@given(st.lists(st.sampled_from(["x.jpg", "x.png", "x.png.jpg", "x.png.png", "x.jpg.bmp", "y.jpg"]), unique=True))
def test_no_two_images_share_a_label_file(names):
    made = label_names([PurePath(n) for n in names])
    assert len({*made}) == len(made) == len(names)
    assert all(m.suffix == ".txt" for m in made)


def test_labels_are_named_as_yolov5_names_them():
    assert label_names([PurePath("a/x.jpg"), PurePath("a/x.png")]) == [PurePath("a/x.txt"), PurePath("a/x.png.txt")]
