"""YOLOv5's own scripts and models, in the tree that DSCONVERT_YOLOV5 names: docs/contributing.md says how to run it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml
from conftest import DEMO, ROOT, SHARED
from trees import Tree, difference, noise, read_boxes, unmatched, worst

import dsconvert
from dsconvert.scoring.accuracy import detect_all
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import yolo_lines
from dsconvert.yolo.checkpoint import load_checkpoint

pytestmark = pytest.mark.long
SIDE, HEIGHT = 320, 240  # of the pictures: 40 rows of padding above and below, no scaling
LAYOUTS = ("packed", "int8")
SIZES = [f"models/yolov5{size}.yaml" for size in "nsmlx"]
P6 = [f"models/hub/yolov5{size}6.yaml" for size in "nsmlx"]
OTHERS = [f"models/hub/yolov5{name}.yaml" for name in ("s-ghost", "s-LeakyReLU", "s-transformer", "-p2", "-p34", "-p6",
                                                       "-p7", "-fpn", "-bifpn", "-panet")]  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> Tree:
    return Tree("DSCONVERT_YOLOV5", tmp_path_factory.mktemp("tree"))


@pytest.fixture(scope="module")
def work(tree, tmp_path_factory) -> Path:
    """Eight labelled pictures that need no scaling, data.yaml, and a real detector, exported."""
    folder = tmp_path_factory.mktemp("work")
    coco = (SHARED / "coco" / "images").is_dir()
    images = SHARED / "coco/images/val2017" if coco else DEMO / "images/val"
    best = SHARED / "checkpoints/yolov5n.pt" if coco else DEMO / "demo.pt"
    for kind in ("images", "labels"):
        (folder / kind).mkdir()
    for path in sorted(images.iterdir())[:8]:
        picture = cv2.resize(cv2.imread(str(path)), (SIDE, HEIGHT), interpolation=cv2.INTER_AREA)
        cv2.imwrite(str(folder / "images" / f"{path.stem}.png"), picture)
        labels = Path(str(path).replace("images", "labels")).with_suffix(".txt")
        (folder / "labels" / labels.name).write_text(labels.read_text() if labels.exists() else "")
    names = load_checkpoint(best).head.names
    data = {"path": str(folder), "train": "images", "val": "images", "names": dict(enumerate(names))}
    (folder / "data.yaml").write_text(yaml.safe_dump(data))
    model = dsconvert.quantize(best, folder / "images", imgsz=SIDE, bits=4)
    for layout in LAYOUTS:
        model.export(folder / f"{layout}.onnx", layout=layout)
    return folder


def overlap(boxes: np.ndarray, one: np.ndarray) -> np.ndarray:
    """Intersection over union of rows (class, centre x, y, width, height, ...) with one of them."""
    low = np.maximum(boxes[:, 1:3] - boxes[:, 3:5] / 2, one[1:3] - one[3:5] / 2)
    high = np.minimum(boxes[:, 1:3] + boxes[:, 3:5] / 2, one[1:3] + one[3:5] / 2)
    both = (high - low).clip(0).prod(1)
    return both / (boxes[:, 3:5].prod(1) + one[3:5].prod() - both)


def run_detect(tree: Tree, work: Path, layout: str, *more: str) -> Path:
    tree.run(
        "detect.py", "--weights", work / f"{layout}.onnx", "--source", work / "images", "--imgsz", SIDE, "--save-txt",
        "--save-conf", "--nosave", "--project", work, "--name", f"{layout}{len(more)}", "--exist-ok", *more,
    )  # fmt: skip
    return work / f"{layout}{len(more)}"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_detect_finds_what_dsconvert_detect_finds(tree, work, layout, tmp_path, call):
    """detect.py rounds corners to whole pixels: each side of a box moves by half a pixel at most. Integer scores tie,
    and of two boxes that overlap each suppression then keeps the one that it sorts first, which lies beside."""
    found = run_detect(tree, work, layout)
    done = call("detect", work / f"{layout}.onnx", work / "images", "--save-txt", "--save-conf", "--nosave", "--out",
                tmp_path / "ours", cwd=tmp_path)  # fmt: skip
    assert done.code == 0, done.err
    counted = beside = 0
    for path in sorted((work / "images").iterdir()):
        ours, theirs = (read_boxes(folder, path.stem, (HEIGHT, SIDE)) for folder in (tmp_path / "ours", found))
        assert len(ours) == len(theirs)
        for a, b in ((ours, theirs), (theirs, ours)):
            for row in a:
                same = b[(b[:, 0] == row[0]) & (np.abs(b[:, 5] - row[5]) <= 1e-4)]
                assert (overlap(same, row) > 0.8).any(), (path, row)
        counted += len(ours) + len(theirs)
        beside += unmatched(ours, theirs, 1.01)
    assert counted > 20
    assert beside <= 0.1 * counted  # each tie counts twice, once in either list


def test_detect_with_opencv_finds_the_same_objects_in_int8(tree, work):
    """--dnn: OpenCV's sums are rounded differently, so scores and boxes differ; every sure object is there."""
    plain, other = run_detect(tree, work, "int8"), run_detect(tree, work, "int8", "--dnn")
    for path in sorted((work / "images").iterdir()):
        ours, theirs = (read_boxes(folder, path.stem, (HEIGHT, SIDE)) for folder in (plain, other))
        for a, b in ((ours, theirs), (theirs, ours)):
            for row in a[a[:, 5] > 0.4]:
                same = b[b[:, 0] == row[0]]
                assert (overlap(same, row) > 0.6).any(), (path, row)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_val_measures_what_dsconvert_eval_measures(tree, work, layout, tmp_path):
    """The same boxes, scores and classes down to confidence 0.001; and mAP, whose curves YOLOv5 interpolates
    linearly where COCO takes steps."""
    text = tree.run(
        "val.py", "--weights", work / f"{layout}.onnx", "--data", work / "data.yaml", "--imgsz", SIDE, "--workers", 0,
        "--save-txt", "--save-conf", "--project", work, "--name", f"val-{layout}",
    )  # fmt: skip
    # 'all', images, objects, precision, recall, mAP50, mAP50-95
    (line,) = re.findall(r"^ +all +\d+ +\d+ +\S+ +\S+ +(\S+) +(\S+)", text, re.MULTILINE)
    model = load_candidate(work / f"{layout}.onnx", SIDE)
    paths = sorted((work / "images").iterdir())
    found = detect_all([model.predict], paths, SIDE, len(model.names))
    (tmp_path / "labels").mkdir()
    total = apart = 0
    for path, boxes, shape in zip(paths, found.found[0], found.shapes, strict=True):
        (tmp_path / "labels" / f"{path.stem}.txt").write_text(yolo_lines(boxes, shape, True))
        ours, theirs = (read_boxes(folder, path.stem, shape) for folder in (tmp_path, work / f"val-{layout}"))
        total += len(ours) + len(theirs)
        apart += unmatched(ours, theirs, 0.02)
    assert total > 500
    # scores of integers tie, and of two that overlap each suppression then keeps the one that it sorts first; and
    # YOLOv5 moves classes apart by thousands of pixels before, so it knows overlaps to 1/16 pixel
    assert apart <= 0.02 * total
    (metrics,) = found.metrics()
    assert float(line[0]) == pytest.approx(metrics.map50, abs=0.02)
    assert float(line[1]) == pytest.approx(metrics.map50_95, abs=0.02)


def test_the_trees_models_load_as_they_are(tree, tmp_path):
    """Every detection yaml with random numbers, saved as train.py saves it: the same maps."""
    image = noise(1, 128)
    cfgs = [*SIZES, *P6, *OTHERS]
    tree.inside("build", image, tmp_path, [tree.path / cfg for cfg in cfgs])
    apart = {cfg: worst(tmp_path, Path(cfg).stem, image)[1] for cfg in cfgs}
    assert max(apart.values()) < 1e-5, apart


def test_trained_weights_give_the_trees_maps(tree, tmp_path):
    """The published yolov5n, somebody's own, and the demo's."""
    image = noise(1, 128)
    paths = [DEMO / "demo.pt", *sorted((SHARED / "checkpoints").glob("*.pt"))]
    tree.inside("load", image, tmp_path, paths)
    found = {path.name: difference(path, tmp_path, image)[1] for path in paths}
    assert max(found.values()) < 1e-5, found


def test_rows_of_dsconv_train_in_the_tree(tree, tmp_path):
    """Built from the yaml that comes with dsconvert, trained by the tree's loss, saved and loaded by it, and loaded."""
    cfg, image = ROOT / "dsconvert/yolo/cfg/yolov5s_DSConv2D_C3.yaml", noise(2, 128)
    told = json.loads(tree.inside("train", image, tmp_path, [cfg]).splitlines()[-1])
    assert [i for i, kind in enumerate(told["kinds"]) if kind == "DSConv2D_C3"] == [13, 17, 20, 23]
    assert all(np.isfinite(told["losses"]))
    assert told["moved"] == told["parameters"]
    assert told["apart"] < 1e-5 * told["size"]  # the tree fuses BatchNorm as it loads
    checkpoint, apart = worst(tmp_path, cfg.stem, image)
    assert apart < 1e-5
    assert len(checkpoint.head.names) == 6


BEGIN = """
import models.yolo
import dsconvert.torch

dsconvert.torch.register(models.yolo, block_size=32, bits=4)

import train

train.run(cfg={cfg!r}, weights="", data={data!r}, epochs=1, imgsz=64, batch_size=4, device="cpu", workers=0,
          project={project!r}, name="run", noplots=True)
"""


def test_train_py_trains_rows_of_dsconv(tree, work, tmp_path):
    """As docs/training.md says: a few lines around the tree's own train.py, whose best.pt is then read."""
    cfg = ROOT / "dsconvert/yolo/cfg/yolov5s_DSConv2D_C3.yaml"
    begin = tmp_path / "begin.py"
    begin.write_text(BEGIN.format(cfg=str(cfg), data=str(work / "data.yaml"), project=str(tmp_path)))
    tree.run(begin)
    checkpoint = load_checkpoint(tmp_path / "run/weights/best.pt")
    rows = [*checkpoint.network.config["backbone"], *checkpoint.network.config["head"]]
    assert [i for i, row in enumerate(rows) if row[2] == "DSConv2D_C3"] == [13, 17, 20, 23]
    # its DSConv weights count as the numbers that they stand for: of 4 bits, 16 in every block of a channel and tap
    weight = checkpoint.network.get_submodule("model.23.m.0.cv2.conv").weight
    assert all(len(block.unique()) <= 16 for block in weight[:4, :32].permute(0, 2, 3, 1).reshape(-1, 32))
