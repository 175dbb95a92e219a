"""ONNX files without names, with a fixed batch, or of another shape than what is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from test_anyonnx import exported
from torch import nn

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.scoring.candidates import load_candidate


@pytest.fixture
def files(work, call) -> Path:
    """The work folder with best.onnx (64 pixels), and nameless.onnx, which is it without metadata."""
    assert call("export", "best.pt", "--onnx", "--imgsz", "64", "--out", "best.onnx", cwd=work).code == 0
    model = onnx.load(work / "best.onnx")
    assert {p.key for p in model.metadata_props} >= {"names"}
    del model.metadata_props[:]
    onnx.save(model, work / "nameless.onnx")
    return work


def test_a_nameless_file_is_measured_on_folders_and_data(files, call):
    rows = {}
    for name in ("best.onnx", "nameless.onnx"):
        done = call("eval", "best.pt", name, "--data", "data.yaml", "--json", cwd=files)
        assert done.code == 0, done.err
        rows[name] = json.loads(done.out)["models"][1]
    keys = ("map50_95", "map50", "precision", "recall", "weight_bits", "images")
    assert [rows["best.onnx"][k] for k in keys] == [rows["nameless.onnx"][k] for k in keys]
    assert load_candidate(files / "nameless.onnx", None).nc == 2
    assert load_candidate(files / "nameless.onnx", None).names == ()


@pytest.mark.parametrize("models", [("nameless.onnx",), ("nameless.onnx", "best.pt"), ("best.pt", "nameless.onnx")])
def test_on_a_folder_no_one_is_told_to_give_a_folder(files, call, models):
    done = call("eval", *models, "--data", "images", "--json", cwd=files)
    # the tiny network is random: it may find nothing to agree on, and then says that
    assert done.code == 0 or "finds nothing with confidence" in done.err, done.err
    assert "folder of images" not in done.err


def test_other_classes_are_said_with_a_way_that_helps(files, call):
    (files / "three.yaml").write_text("path: .\nval: images/val\nnames: [a, b, c]\n")
    done = call("eval", "nameless.onnx", "--data", "three.yaml", cwd=files)
    assert done.code == 2
    assert "nameless.onnx has 2 classes, three.yaml has 3; give --data a folder of images" in done.err
    torch.manual_seed(0)
    exported(Rows(8), files / "three.onnx", (1, 3, 64, 64))
    done = call("eval", "nameless.onnx", "three.onnx", "--data", "images", cwd=files)
    assert done.code == 2
    assert "three.onnx has 3 classes, nameless.onnx has 2; models of different classes cannot be compared" in done.err
    done = call("compare", "nameless.onnx", "three.onnx", "images", cwd=files)
    assert "nameless.onnx has 2 classes, three.onnx has 3; they cannot be compared" in done.err


class Rows(nn.Module):
    """(n, 3, h, w) -> (n, boxes, numbers), as YOLOv5's output."""

    def __init__(self, numbers: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, numbers, 8, 8)

    def forward(self, x):
        return self.conv(x).sigmoid().flatten(2).transpose(1, 2)


def test_a_nameless_detector_numbers_its_classes(files, call):
    done = call("detect", "nameless.onnx", "images/val", "--conf-thres", "0.001", "--json", "--out", "d", cwd=files)
    assert done.code == 0, done.err
    named = call("detect", "best.onnx", "images/val", "--conf-thres", "0.001", "--json", "--out", "e", cwd=files)
    with_names, without = (json.loads(d.out)["classes"] for d in (named, done))
    assert [(c["class"], c["detections"]) for c in with_names] == [(c["class"], c["detections"]) for c in without]


def test_a_fixed_batch_is_filled_with_the_one_image(files, call):
    torch.manual_seed(1)
    module = Rows(7)
    for count, name in ((1, "one.onnx"), (3, "three.onnx")):
        exported(module, files / name, (count, 3, 64, 64))
    one, three = (load_candidate(files / name, None) for name in ("one.onnx", "three.onnx"))
    assert (one.batch, three.batch, three.nc) == (1, 3, 2)
    picture = np.random.default_rng(0).random((1, 3, 64, 64), np.float32)
    np.testing.assert_allclose(three.predict(picture), one.predict(picture), rtol=1e-5, atol=1e-5)
    assert three.predict(picture).shape == one.predict(picture).shape
    three.run_once()
    done = call("eval", "one.onnx", "three.onnx", "--data", "data.yaml", "--json", cwd=files)
    assert done.code == 0, done.err
    assert "three.onnx takes 3 images at once; its ms is for all of them." in done.err
    first, second = json.loads(done.out)["models"]
    assert first["map50_95"] == second["map50_95"]
    assert call("detect", "three.onnx", "images/val", "--out", "d", cwd=files).code == 0


class Any(Rows):
    """The same for another number of channels."""

    def __init__(self, channels: int) -> None:
        super().__init__(7)
        self.conv = nn.Conv2d(channels, 7, 8, 8)


@pytest.mark.parametrize("imgsz", [pytest.param(None, marks=pytest.mark.long), 64])
def test_what_is_no_image_of_colour_is_refused(work, call, imgsz):
    exported(Any(1), work / "net.onnx", (1, 1, 64, 64))
    with pytest.raises(InputError, match="takes images of 1 channels"):
        load_candidate(work / "net.onnx", imgsz)
    for command in (("eval", "net.onnx", "--data", "data.yaml"), ("detect", "net.onnx", "images"),
                    ("compare", "best.pt", "net.onnx", "images")):  # fmt: skip
        done = call(*command, *(["--imgsz", "64"] if imgsz else []), cwd=work)
        assert done.code == 2
        assert done.err.startswith("Error: net.onnx takes images of"), done.err
        assert done.err.count("\n") == 1
    done = call("bench", "net.onnx", "--runs", "2", "--threads", "1", cwd=work)
    assert done.code == 0, done.err


@pytest.mark.parametrize("size", [(32, 64), (64, 32)])
def test_a_rectangle_is_measured_as_it_is(work, call, size):
    exported(Any(3), work / "net.onnx", (1, 3, *size))
    candidate = load_candidate(work / "net.onnx", None)
    assert candidate.imgsz == Size(*size) == load_candidate(work / "net.onnx", size).imgsz
    for other in (64, size[::-1]):
        with pytest.raises(InputError, match=f"was exported for {candidate.imgsz} pixels; imgsz .* does not fit it"):
            load_candidate(work / "net.onnx", other)
    assert candidate.predict(np.zeros((1, 3, *size), np.float32)).shape == (1, 32, 7)
    candidate.run_once()
    for command in (("eval", "net.onnx", "--data", "data.yaml"), ("detect", "net.onnx", "images", "--out", "d"),
                    ("eval", "best.pt", "net.onnx", "--data", "data.yaml"),
                    ("quantize", "net.onnx", "--calib", "images", "--out", "q.onnx"),
                    ("quantize", "net.onnx", "--imgsz", *map(str, size), "--calib", "images", "--out", "r.onnx"),
                    ("bench", "net.onnx", "--runs", "2", "--threads", "1")):  # fmt: skip
        done = call(*command, "--quiet", cwd=work)
        assert done.code == 0, (command, done.err)


@pytest.mark.parametrize(
    ("shape", "open_side"), [([1, 3, 64, "w"], 64), ([1, 3, "h", 64], 64), ([1, 3, "h", "w"], 640)]
)
def test_a_side_that_is_left_open_is_the_fixed_one(work, call, shape, open_side):
    axes = {i: n for i, n in enumerate(shape) if isinstance(n, str)}
    exported(Any(3), work / "net.onnx", (1, 3, 64, 64), input_names=["x"], dynamic_axes={"x": axes})
    assert load_candidate(work / "net.onnx", None).imgsz == Size.of(open_side)
    if open_side == 64:
        with pytest.raises(InputError, match="was exported for 64 pixels; imgsz 96 does not fit it"):
            load_candidate(work / "net.onnx", 96)
        fits = (64, 96) if shape[2] == 64 else (96, 64)
        assert load_candidate(work / "net.onnx", fits).imgsz == Size(*fits)
    else:
        assert load_candidate(work / "net.onnx", 96).imgsz == Size.of(96)
        assert load_candidate(work / "net.onnx", (32, 96)).imgsz == Size(32, 96)


def test_channels_last_and_other_outputs_are_named(tmp_path, call):
    class Last(Any):
        def forward(self, x):
            return super().forward(x.permute(0, 3, 1, 2))

    cv2.imwrite(str(tmp_path / "a.png"), np.zeros((64, 64, 3), np.uint8))
    exported(Last(3), tmp_path / "last.onnx", (1, 64, 64, 3))
    assert "channels last [1, 64, 64, 3]" in call("detect", "last.onnx", "a.png", cwd=tmp_path).err
    exported(nn.Conv2d(3, 4, 8), tmp_path / "maps.onnx", (1, 3, 64, 64))
    done = call("detect", "maps.onnx", "a.png", cwd=tmp_path)
    assert done.code == 2
    assert "does not have YOLOv5's output (1, boxes, 5 + classes), nor YOLOv8's" in done.err
    assert "but [1, 4, 57, 57]; give --input if it belongs to a known family" in done.err
    exported(Rows(5), tmp_path / "five.onnx", (1, 3, 64, 64))
    assert "but [1, 64, 5]" in call("detect", "five.onnx", "a.png", cwd=tmp_path).err
