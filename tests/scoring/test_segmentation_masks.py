"""Masks in pixels of the image: placed, measured, drawn, written."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from conftest import write_pictures
from pt_writer import yolov5_bytes
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from segmentation import tiny_segment

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.photos.images import Letterbox, letterbox
from dsconvert.photos.labels import label_rows
from dsconvert.scoring.accuracy import detect_all
from dsconvert.scoring.detect import TINT, coco_document, draw, yolo_lines
from dsconvert.scoring.masks import MaskPredictor, Masks, PlacedMask, mask_precision, outlines, rle

WHOLE = Letterbox(1.0, 0, 0)


def stepped() -> np.ndarray:
    """Logits over 16 x 16 pixels: the first six columns surely on, the others surely off."""
    return np.where(np.arange(16) < 6, 50, -50)[None].repeat(16, 0).astype(np.float32)


def test_a_mask_ends_between_the_pixels_of_its_prototypes():
    masks = Masks(np.array([[9.0], [2.0]], np.float32), stepped()[None] / 2)
    (mask,) = masks.placed([1], np.array([[10, 4, 30, 20]], np.float32), WHOLE, Size.of(64), (64, 64))
    assert mask.window == (slice(4, 20), slice(10, 30))
    wanted = np.zeros((16, 20), bool)
    wanted[:, :14] = True  # column 24 of the image is where column 6 of the prototypes begins
    np.testing.assert_array_equal(mask.inside, wanted)


@pytest.mark.parametrize("shape", [(50, 100), (100, 50), (20, 30), (64, 64)])
def test_a_mask_follows_the_letterbox(shape):
    """Every pixel by hand: to the square, to the prototypes, four neighbours."""
    rng = np.random.default_rng(0)
    logits = cv2.resize(rng.normal(size=(4, 4)).astype(np.float32), (16, 16)) * 8
    _, box = letterbox(np.zeros((*shape, 3), np.uint8), 64)
    corners = np.array([[0, 0, shape[1], shape[0]]], np.float32)
    (mask,) = Masks(np.ones((1, 1), np.float32), logits[None]).placed([0], corners, box, Size.of(64), shape)
    soft = 1 / (1 + np.exp(-logits.astype(np.float64)))
    wanted = np.zeros(shape)
    for y in range(shape[0]):
        for x in range(shape[1]):
            u, v = ((box.gain * (n + 0.5) + pad) / 4 - 0.5 for n, pad in ((x, box.pad_x), (y, box.pad_y)))
            (left, top), (a, b) = (int(np.floor(u)), int(np.floor(v))), (u - np.floor(u), v - np.floor(v))
            rows, columns = ([min(max(i, 0), 15) for i in (n, n + 1)] for n in (top, left))
            wanted[y, x] = np.array([1 - b, b]) @ soft[np.ix_(rows, columns)] @ np.array([1 - a, a])
    sure = np.abs(wanted - 0.5) > 0.05  # OpenCV knows 32 places between two pixels
    assert mask.inside.shape == shape
    assert sure.mean() > 0.7
    np.testing.assert_array_equal(mask.inside[sure], wanted[sure] > 0.5)


def test_what_is_outside_of_the_image_has_no_mask():
    masks = Masks(np.ones((1, 1), np.float32), stepped()[None])
    for corners in ([30, 64, 40, 64], [64, 0, 64, 9]):
        (mask,) = masks.placed([0], np.array([corners], np.float32), WHOLE, Size.of(64), (64, 64))
        assert mask.inside.size == 0
        assert rle.area(mask.encoded((64, 64))) == 0
        assert len(mask.polygon()) == 4


@pytest.mark.parametrize(("left", "top", "size"), [(0, 0, (12, 9)), (2, 3, (5, 4)), (8, 11, (1, 1)), (3, 0, (12, 6))])
@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 1.0])
def test_run_lengths_are_those_of_the_whole_image(left, top, size, share):
    mask = PlacedMask(left, top, np.random.default_rng(0).uniform(size=size) < share)
    whole = np.zeros((12, 9), np.uint8, order="F")
    whole[mask.window] = mask.inside
    encoded = mask.encoded((12, 9))
    np.testing.assert_array_equal(rle.decode(encoded), whole)
    assert rle.area(encoded) == whole.sum()
    assert rle.iou([encoded], [dict(rle.encode(whole))], [0])[0, 0] == (1 if whole.any() else 0)


def test_a_polygon_is_the_largest_parts_outline():
    inside = np.zeros((9, 9), bool)
    inside[0:2, 0:2] = True
    inside[3:8, 4:9] = True
    corners = PlacedMask(10, 20, inside).polygon()
    assert {tuple(c) for c in corners} == {(14.5, 23.5), (18.5, 23.5), (18.5, 27.5), (14.5, 27.5)}
    nothing = PlacedMask(10, 20, np.zeros((2, 3), bool)).polygon()
    assert {tuple(c) for c in nothing} == {(10, 20), (13, 20), (13, 22), (10, 22)}


def test_labels_are_outlines():
    """A triangle of half its box; a box."""
    triangle, box = outlines([[0, 0.1, 0.1, 0.9, 0.1, 0.1, 0.9], [1, 0.5, 0.5, 0.4, 0.2]], (100, 100))
    assert rle.area(triangle) == pytest.approx(80 * 80 / 2, rel=0.03)
    assert rle.area(box) == 40 * 20
    assert rle.toBbox(box).tolist() == [30, 40, 40, 20]


def test_polygons_stay_in_label_rows(tmp_path):
    (tmp_path / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 0.9\n\n1 0.5 0.5 0.4 0.2\n")
    assert [len(row) for row in label_rows(tmp_path / "a.txt", 2)] == [7, 5]
    assert label_rows(tmp_path / "none.txt", 2) == []
    (tmp_path / "a.txt").write_text("0 0.1 0.1 0.9 0.1 0.1 3\n")
    with pytest.raises(InputError, match="line 1"):
        label_rows(tmp_path / "a.txt", 2)


def disc(x: float, y: float, radius: float) -> dict:
    rows, columns = np.mgrid[:60, :80]
    return dict(rle.encode(np.asfortranarray((columns - x) ** 2 + (rows - y) ** 2 < radius**2, np.uint8)))


def test_precision_is_pycocotools():
    rng = np.random.default_rng(1)
    shapes, truths, outlined, found, masks = [(60, 80)] * 5, [], [], [], []
    for _ in shapes:
        places = rng.uniform([15, 15, 8], [65, 45, 14], (4, 3))
        kinds = rng.integers(0, 3, 4)
        boxes = np.concatenate((places[:, :2] - places[:, 2:], places[:, :2] + places[:, 2:]), 1)
        truths.append(np.concatenate((kinds[:, None], boxes), 1))
        outlined.append([disc(*p) for p in places])
        moved = np.concatenate((places, places)) + rng.normal(0, 2, (8, 3))
        masks.append([disc(*p) for p in moved])
        scores = rng.uniform(size=(8, 1))
        found.append(np.concatenate((np.tile(boxes, (2, 1)), scores, np.tile(kinds, 2)[:, None]), 1))
    ours = mask_precision(masks, found, outlined, truths, shapes, 3)
    document = {
        "images": [{"id": i, "height": 60, "width": 80} for i in range(5)],
        "categories": [{"id": i, "name": str(i)} for i in range(3)],
        "annotations": [
            {"id": 1 + 4 * i + j, "image_id": i, "category_id": int(truths[i][j, 0]), "iscrowd": 0,
             "segmentation": outlined[i][j], "area": float(rle.area(outlined[i][j])), "bbox": [0, 0, 1, 1]}
            for i in range(5) for j in range(4)
        ],
    }  # fmt: skip
    coco = COCO()
    coco.dataset = document
    coco.createIndex()
    run = COCOeval(coco, coco.loadRes([
        {"image_id": i, "category_id": int(found[i][j, 5]), "score": found[i][j, 4], "segmentation": masks[i][j]}
        for i in range(5) for j in range(8)
    ]), "segm")  # fmt: skip
    run.evaluate()
    run.accumulate()
    run.summarize()
    assert 0.1 < ours[0] < 0.9
    assert ours == pytest.approx((run.stats[0], run.stats[1]), abs=1e-9)


def looking_at(rows: list[list[float]], logits: np.ndarray) -> MaskPredictor:
    """A predictor that always says this, of two classes and one prototype."""
    out = np.array([rows], np.float32)
    return MaskPredictor(lambda batch: (out, logits[None, None]), 2)


@pytest.fixture
def half(tmp_path):
    """A picture of 64 x 64 whose one object is the left part of a box."""
    (tmp_path / "images").mkdir()
    (tmp_path / "labels").mkdir()
    cv2.imwrite(str(tmp_path / "images/a.png"), np.zeros((64, 64, 3), np.uint8))
    corners = [8, 8, 24, 8, 24, 40, 8, 40]
    (tmp_path / "labels/a.txt").write_text("1 " + " ".join(str(c / 64) for c in corners) + "\n")
    return [tmp_path / "images/a.png"]


def test_boxes_and_masks_are_measured_apart(half):
    """The box is twice as wide as the object, the mask exactly it; a second model's mask is the whole box."""
    wide = [24.0, 24, 32, 32, 1, 0, 0.9]
    good, bad = (looking_at([[*wide, c]], stepped()) for c in (1.0, 0.0))
    bad.run(np.zeros(0))[0][0, 0, 7] = 1.0
    everywhere = looking_at([[*wide, 1.0]], np.full((16, 16), 50, np.float32))
    found = detect_all([good, everywhere, lambda b: good(b)], half, 64, 2)
    a, b, c = found.metrics()
    assert a.map50_95 == b.map50_95 == c.map50_95 < 0.2  # IoU 0.5
    assert (a.mask_map50_95, a.mask_map50) == (1.0, 1.0)
    assert b.mask_map50_95 is not None
    assert b.mask_map50_95 < 0.2
    assert c.mask_map50 is None  # no masks to measure
    again = found.metrics([0, 0])[0]
    assert (again.mask_map50, again.images) == (1.0, 2)


def test_without_polygons_masks_are_not_measured(half):
    model = looking_at([[16, 24, 16, 32, 1, 0, 0.9, 1.0]], stepped())
    assert detect_all([model], half, 64, 2, labelled=False).metrics()[0].mask_map50 is None
    (half[0].parent.parent / "labels/a.txt").write_text("1 0.25 0.375 0.25 0.5\n")
    (metrics,) = detect_all([model], half, 64, 2).metrics()
    assert metrics.map50_95 == 1
    assert metrics.mask_map50 is None


def test_other_classes_are_refused(half):
    with pytest.raises(InputError, match="another number of classes than the 3"):
        detect_all([looking_at([[16, 24, 16, 32, 1, 0, 0.9, 1.0]], stepped())], half, 64, 3)


FOUND = np.array([[2, 3, 6, 8, 0.5, 0]], np.float32)
MASK = PlacedMask(2, 3, np.ones((5, 4), bool))


def test_masks_tint_the_image():
    image = np.full((20, 20, 3), 100, np.uint8)
    with_mask = draw(image, FOUND, ["cat"], 1, labels=False, masks=[MASK])
    without = draw(image, FOUND, ["cat"], 1, labels=False)
    changed = (with_mask != without).any(2)
    assert changed[5, 4]
    assert not changed[:, 7:].any()
    colour = np.array([255, 38, 38])  # hue 0
    np.testing.assert_array_equal(with_mask[5, 4], np.rint(100 * (1 - TINT) + colour * TINT))


def test_lines_are_polygons():
    (line,) = yolo_lines(FOUND, (10, 10), True, [MASK]).splitlines()
    number, *values, score = line.split()
    assert (number, score) == ("0", "0.5")
    corners = {tuple(c) for c in np.array(values, float).reshape(-1, 2).tolist()}
    assert corners == {(0.25, 0.35), (0.55, 0.35), (0.55, 0.75), (0.25, 0.75)}


def test_documents_hold_outlines():
    outline = [2.5, 3.5, 5.5, 3.5, 5.5, 7.5]
    document = coco_document(["a.jpg"], [(10, 10)], [FOUND], ["cat"], [[outline]])
    assert document["annotations"][0]["segmentation"] == [outline]
    assert "segmentation" not in coco_document(["a.jpg"], [(10, 10)], [FOUND], ["cat"])["annotations"][0]


def test_the_commands(tmp_path, call):
    """All three kinds of file; the converted model and its ONNX file find the same masks."""
    (tmp_path / "seg.pt").write_bytes(yolov5_bytes(*tiny_segment()))
    write_pictures(tmp_path)
    for label in (tmp_path / "labels/val").iterdir():
        label.write_text("0 0.3 0.3 0.7 0.3 0.7 0.7 0.3 0.7\n1 0.1 0.1 0.4 0.1 0.1 0.4\n")
    made = call("quantize", "seg.pt", "--calib", "images", "--imgsz", 64, "--bits", 4, "--out", "o", "--quiet",
                cwd=tmp_path)  # fmt: skip
    assert made.code == 0, made.err
    assert call("export", "o/model.safetensors", "--onnx", "--out", "seg.onnx", cwd=tmp_path).code == 0
    answer = call("eval", "seg.pt", "o/model.safetensors", "seg.onnx", "--data", "data.yaml", "--json", cwd=tmp_path)
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)["models"]
    assert all(0 <= row["mask_map50_95"] <= row["mask_map50"] <= 1 for row in rows)
    assert rows[1]["mask_map50"] == pytest.approx(rows[2]["mask_map50"], abs=1e-6)
    assert "masks 50-95" in call("eval", "seg.onnx", "--data", "data.yaml", cwd=tmp_path).out
    answer = call("detect", "seg.onnx", "images", "--save-txt", "--save-json", "--conf-thres", 0.05, "--out", "d",
                  "--quiet", cwd=tmp_path)  # fmt: skip
    assert answer.code == 0, answer.err
    lines = [line for path in (tmp_path / "d/labels").rglob("*.txt") for line in path.read_text().splitlines()]
    document = json.loads((tmp_path / "d/detections.json").read_text())
    assert len(lines) == len(document["annotations"]) > 0
    assert all(len(line.split()) >= 7 for line in lines)
    assert all(len(a["segmentation"][0]) >= 6 for a in document["annotations"])
    assert call("compare", "seg.pt", "seg.onnx", "images", cwd=tmp_path).code == 0


def test_python_has_the_masks(tmp_path):
    import dsconvert

    (tmp_path / "seg.pt").write_bytes(yolov5_bytes(*tiny_segment()))
    write_pictures(tmp_path)
    photo = dsconvert.detect(tmp_path / "seg.pt", tmp_path / "images", imgsz=64, conf_thres=0.05)[0]
    assert photo.masks is not None
    assert len(photo.masks) == len(photo.objects) > 0
    assert photo.draw().shape == (80, 100, 3)
