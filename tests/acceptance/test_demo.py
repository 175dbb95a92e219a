"""The embedded demo: a detector that works, and still works converted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import DEMO

sys.path.insert(0, str(DEMO))
from make_dataset import SPLITS
from scenes import NAMES, draw_scene

from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.images import read_data_yaml, read_image, read_labels


def dsconvert(*args: str | Path, cwd: Path) -> dict:
    command = [sys.executable, "-m", "dsconvert", *map(str, args), "--json"]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_demo_detects_and_loses_little(tmp_path):
    dsconvert("quantize", DEMO / "demo.pt", "--calib", DEMO / "images/calib", "--imgsz", "320", cwd=tmp_path)
    dsconvert("export", "--onnx", "--out", "packed.onnx", cwd=tmp_path)
    rows = dsconvert("eval", DEMO / "demo.pt", "packed.onnx", "--data", DEMO / "data.yaml", cwd=tmp_path)["models"]
    assert rows[0]["map50_95"] > 0.6
    assert rows[1]["map50_95"] > rows[0]["map50_95"] - 0.10  # least squares; see docs/accuracy for what it reaches
    assert rows[1]["images"] == 100


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("index", [0, 17, 63])
def test_committed_scenes_are_what_the_script_draws(split, index):
    image, labels = draw_scene(SPLITS[split][0] + index)
    stored = read_image(DEMO / "images" / split / f"{index:04d}.jpg").astype(int)
    assert np.abs(stored - image).mean() < 6  # JPEG at quality 85 of noisy pictures
    written = read_labels(DEMO / "labels" / split / f"{index:04d}.txt", len(NAMES))
    np.testing.assert_allclose(written, labels, atol=1e-6)  # six decimals


def test_boxes_are_tight_on_what_was_drawn():
    _, labels = draw_scene(3)
    assert len(labels)
    low, high = labels[:, 1:3] - labels[:, 3:] / 2, labels[:, 1:3] + labels[:, 3:] / 2
    assert (low >= -1e-6).all()
    assert (high <= 1 + 1e-6).all()
    assert (labels[:, 3:] * 320 >= 10).all()


def test_splits_are_disjoint_and_whole():
    ranges = [range(first, first + count) for first, count in SPLITS.values()]
    assert not any(set(a) & set(b) for i, a in enumerate(ranges) for b in ranges[:i])
    for split, (_, count) in SPLITS.items():
        assert len(list((DEMO / "images" / split).glob("*.jpg"))) == count
    data = read_data_yaml(DEMO / "data.yaml")
    assert data.names == NAMES
    assert (len(data.train), len(data.val)) == (300, 100)


def test_everything_is_under_15_megabytes_and_the_checkpoint_is_nano():
    assert sum(p.stat().st_size for p in DEMO.rglob("*") if p.is_file()) < 15e6
    loaded = load_checkpoint(DEMO / "demo.pt")
    assert loaded.head.names == NAMES
    assert loaded.network.config["width_multiple"] == 0.25
    assert cv2.imread(str(DEMO / "images/val/0000.jpg")).shape == (320, 320, 3)
