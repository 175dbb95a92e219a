"""A float ONNX file fed on the wrong scale is noticed, and the option that helps is named."""

from __future__ import annotations

import json
import re
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
import torch
from test_anyonnx import exported
from torch import nn

from dsconvert.commands.shared import in_options
from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
from dsconvert.onnxfile.presets import INPUT_KEY, Preset, of_text, presets
from dsconvert.onnxfile.scale import RAW, Response, response, warning
from dsconvert.onnxfile.source import ImageInput
from dsconvert.photos.form import PLAIN, InputForm

pytestmark = pytest.mark.filterwarnings("ignore")  # the exporter's own


class Detector(nn.Module):
    """One convolution whose boxes stay about 10 pixels, and whose scores are high for bright pixels of a scale."""

    def __init__(self, factor: float, offset: float, columns: bool = False) -> None:
        super().__init__()
        self.conv, self.columns = nn.Conv2d(3, 7, 1), columns
        with torch.no_grad():
            self.conv.weight.fill_(0)
            self.conv.weight[4:] = factor / 3
            self.conv.bias.copy_(torch.tensor([10.0, 10, 12, 12, offset, offset, offset]))

    def forward(self, x):
        out = self.conv(x).flatten(2)
        out = torch.cat((out[:, :4], out[:, 4:].sigmoid()), 1)
        return out if self.columns else out.transpose(1, 2)


class Flat(nn.Module):
    """A classifier of logits that says nearly the same of everything."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 3)
        with torch.no_grad():
            self.conv.weight.fill_(factor / 27)
            self.conv.bias.copy_(torch.tensor([-2.0, -1, 0, 1, 2]))

    def forward(self, x):
        return self.conv(x).mean((2, 3))


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for i in range(4):
        picture = cv2.resize(rng.integers(20 * i, 150 + 20 * i, (6, 8, 3), dtype=np.uint8), (40, 30))
        cv2.imwrite(str(folder / f"{i}.png"), picture)
    return folder


# bright pixels are 0.5 of the scale at least: sigmoid(0.5 * 12 - 4) = 0.88, and on the other scale sigmoid(-4) = 0.02
UNIT, BYTES = (12.0, -4.0), (12 / 255, -4.0)
CASES = {
    "right": (lambda: Detector(*UNIT), Preset(), None),
    "right, columns": (lambda: Detector(*UNIT, columns=True), Preset(), None),
    "bytes wanted": (lambda: Detector(*BYTES), Preset(),
                     "nothing above 0.25.*as 0..255.*give --scale 1 .or --input yolox."),
    "bytes wanted, columns": (lambda: Detector(*BYTES, columns=True), Preset(), "as 0..255"),
    "bytes wanted and given": (lambda: Detector(*BYTES), Preset(InputForm(scale=1)), None),
    "bytes wanted, its name given": (lambda: Detector(*BYTES), presets()["yolox"], None),
    "bytes wanted, the old way": (lambda: Detector(*BYTES), Preset(InputForm(std=(1 / 255,), fit="crop")), None),
    "0..1 wanted, bytes given": (lambda: Detector(*UNIT), presets()["yolox"],
                                 "saturated; fed as 0..1.*give --scale 255 .or --input yolov5."),
    "0..1 wanted, means given": (lambda: Detector(*UNIT), Preset(InputForm(mean=(3.0,), fit="crop")),
                                 "nothing.*fed as 0..1.*give --mean 0 --std 1 --fit crop .or --input"),
    "nothing there": (lambda: Detector(1e-5, -6.0), Preset(), "nothing above 0.25.*check that the images"),
    "flat, bytes wanted": (lambda: Flat(0.02), Preset(), "nearly the same for every image.*0..255.*--scale 1"),
    "flat whatever": (lambda: Flat(1e-7), Preset(), "nearly the same.*check that the images"),
    "not flat": (lambda: Flat(20.0), Preset(), None),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_quantize_warns_where_another_scale_shows_more(photos, tmp_path, name):
    make, preset, words = CASES[name]
    torch.manual_seed(0)
    exported(make(), tmp_path / "net.onnx")
    heard: list[str] = []
    plan = OnnxPlan(form=preset.form, decode=preset.decode, activations="float")  # which is quicker
    made = quantize_onnx(tmp_path / "net.onnx", photos, plan, note=heard.append)
    assert list(made.warnings) == heard
    found = list(map(in_options, heard))
    assert len(found) == (words is not None)
    if words:
        assert found[0].startswith("On 4 calibration images the float")
        assert re.search(words, found[0]), found[0]


def test_the_command_warns_and_following_its_advice_silences_it(photos, tmp_path, call):
    exported(Detector(*BYTES), tmp_path / "net.onnx")
    line = ("quantize", "net.onnx", "--calib", photos, "--json")
    done = call(*line, "--out", "a.onnx", cwd=tmp_path)
    (said,) = json.loads(done.out)["warnings"]
    assert [w for w in done.err.splitlines() if w.startswith("Warning: ")] == [f"Warning: {said}"]
    options = said.partition("give ")[2].partition(" (")[0].split()
    assert options == ["--scale", "1"]
    assert json.loads(call(*line, "--out", "b.onnx", *options, cwd=tmp_path).out)["warnings"] == []


def test_the_written_file_knows_its_input(photos, tmp_path, call):
    exported(Detector(*BYTES), tmp_path / "net.onnx")
    line = ("quantize", "net.onnx", "--calib", photos, "--quiet")
    assert call(*line, "--out", "a.onnx", "--input", "yolox", cwd=tmp_path).code == 0
    assert call(*line, "--out", "b.onnx", cwd=tmp_path).code == 0
    notes = [{p.key: p.value for p in onnx.load(tmp_path / f).metadata_props} for f in ("a.onnx", "b.onnx")]
    assert of_text(notes[0][INPUT_KEY], tmp_path) == presets()["yolox"]
    assert INPUT_KEY not in notes[1]


def maps(batch: int = 1) -> list[np.ndarray]:
    """NanoDet's or PicoDet's outputs for an image of 64 pixels: class maps and distance maps of three strides."""
    rng = np.random.default_rng(0)
    return [np.tile(rng.random((1, n, 5)), (batch, 1, 1)) for n in (64, 16, 4)] + [
        np.tile(8 * rng.normal(size=(1, n, 32)), (batch, 1, 1)) for n in (64, 16, 4)
    ]


@pytest.mark.parametrize("batch", [1, 2])
def test_outputs_of_a_family_with_another_input_are_noticed(batch):
    wanted, noise = ImageInput("x", np.float32, batch, 3, 64, 64), np.random.default_rng(0)
    pictures = [noise.integers(0, 256, (64, 64, 3), dtype=np.uint8) for _ in range(3)]

    def run(x):
        return [m + 0 * x.mean() for m in maps(batch)]

    assert "give input nanodet or input picodet if it is one" in warning(run, pictures, wanted, PLAIN)
    for name in ("nanodet", "picodet"):
        assert warning(run, pictures, wanted, presets()[name].form, presets()[name].decode) is None
    assert warning(run, pictures, wanted, InputForm(scale=1)) is None  # what was typed is meant


def test_scores_are_those_of_the_rule():
    wanted = ImageInput("x", np.float32, 1, 3, 64, 64)
    sure, rows = np.full((1, 252, 7), 0.9, np.float32), np.full((1, 252, 7), 0.4, np.float32)
    assert warning(lambda x: [sure], images(), wanted, PLAIN, "v5lite") is None
    assert "the best score is 0.16" in warning(lambda x: [rows], images(), wanted, PLAIN, "v5lite")
    assert "nothing above" not in (warning(lambda x: [rows], images(), wanted, PLAIN) or "")


def images(count: int = 3) -> list[np.ndarray]:
    return [np.full((4, 4, 3), 60 * (i + 1), np.uint8) for i in range(count)]


def test_bytes_have_one_scale_so_no_other_is_proposed():
    wanted = ImageInput("x", np.uint8, 1, 3, 4, 4)
    found = np.tile(np.array([5, 5, 5, 5, 0, 0, 0], np.float32), (1, 9, 1))
    said = warning(lambda x: [found], images(), wanted, PLAIN)
    assert "nothing above 0.25" in said
    assert "mean" not in said
    assert "scale" not in said


def test_a_file_that_fails_and_images_that_are_one_give_no_warning():
    wanted = ImageInput("x", np.float32, 1, 3, 4, 4)

    def fails(x):
        raise RuntimeError("no")

    assert warning(fails, images(), wanted, PLAIN) is None
    assert warning(lambda x: [np.array([[1.0, 2.0]])], images(1), wanted, PLAIN) is None
    assert warning(lambda x: [np.array([[1.0, 2.0]])], [*images(1), *images(1)], wanted, PLAIN) is None
    assert "nearly the same" in warning(lambda x: [np.array([[1.0, 2.0]])], images(), wanted, PLAIN)
    assert "infinite" in warning(lambda x: [np.array([[1.0, np.inf]])], images(), wanted, PLAIN)


def test_a_scale_on_which_numbers_stay_finite_is_proposed():
    wanted = ImageInput("x", np.float32, 1, 3, 4, 4)

    def run(x):
        return [np.array([[1.0, 2.0 * x.mean() if x.max() < 2 else np.inf]])]

    assert "give scale 255 (or input yolov5" in warning(run, images(), wanted, RAW)
    assert warning(run, images(), wanted, InputForm((0.5,), (0.5,))) is None


def rows(*best: float) -> list[list[np.ndarray]]:
    """One output for each image: boxes of pixels, objectness 0.8 and the best class as given over it."""
    return [[np.array([[[9, 9, 4, 4, 0.8, b / 0.8, 0.0], [5, 5, 4, 4, 0.1, 0.1, 0.1]]], np.float32)] for b in best]


def test_scores_of_every_layout():
    found = response(rows(0.6, 0.3), True)
    assert (found.best, found.least) == pytest.approx((0.6, 0.3), abs=1e-6)
    columns = [0, 1, 2, 3, 5, 6]  # YOLOv8 has no objectness, and more boxes than rows
    boxes = [np.tile(o[0][..., columns], (1, 5, 1)) for o in rows(0.4, 0.2)]
    turned = [[b.transpose(0, 2, 1)] for b in boxes]
    assert response(turned, True).best == pytest.approx(0.5)
    ends = [[np.array([[[1, 1, 9, 9, b, 7], [2, 2, 5, 5, 0.1, 0]]])] for b in (0.9, 0.3)]
    assert (response(ends, True).best, response(ends, True).least) == (0.9, 0.3)
    grid = np.zeros((1, 7, 2, 2))
    grid[0, :, 1, 0] = 0.5, -3, 2, 1, 1, 0.8, 0.2
    assert response([[grid], [grid / 2]], True).best == pytest.approx(0.4)
    maps = [[np.full((1, 5, 3), v), np.full((1, 9, 32), 7.0 * v)] for v in (0.1, 0.35)]
    assert (response(maps, True).best, response(maps, True).least) == (0.35, 0.1)
    softmax = [[np.array([[0.1, 0.7, 0.2]])], [np.array([[0.3, 0.3, 0.4]])]]
    assert response(softmax, True).best is None
    assert response([[np.ones((k, 7))] for k in (2, 3)], True) == Response(None, None, None, True)
    assert response([[np.array([[3]])], [np.array([[4]])]], True).variation is None
