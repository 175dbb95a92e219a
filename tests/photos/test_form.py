"""The input of a network of any family: where a photograph is put, and which numbers its pixels become."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from dsconvert.base.errors import InputError
from dsconvert.onnxfile.presets import named_preset, presets
from dsconvert.photos.form import FITS, PLAIN, InputForm
from dsconvert.photos.images import Letterbox, letterbox, to_tensor
from dsconvert.yolo.boxes import to_image


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


@pytest.mark.parametrize("shape", [(30, 40), (40, 30), (64, 64), (7, 200), (64, 33)])
def test_the_plain_form_is_yolov5s_letterbox(shape):
    image = noise(*shape)
    square, box = letterbox(image, 64)
    placed, where = PLAIN.place(image, 64, 64)
    assert np.array_equal(placed, square)
    assert where == box
    assert np.array_equal(PLAIN.apply(image, 64, 64), to_tensor([square])[0].numpy())


def test_every_byte_is_the_same_number_as_in_torch():
    every = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    assert np.array_equal(PLAIN.numbers(every), to_tensor([every])[0].numpy())


# Image 20 high, 40 wide, in 30 high, 30 wide: what is image, and where its corners (0, 0) and (40, 20) are.
PLACES = {
    "letterbox": (slice(7, 22), slice(0, 30), (0, 7), (30, 22)),
    "corner": (slice(0, 15), slice(0, 30), (0, 0), (30, 15)),
    "stretch": (slice(0, 30), slice(0, 30), (0, 0), (30, 30)),
    "crop": (slice(0, 30), slice(0, 30), (-15, 0), (45, 30)),
}


@pytest.mark.parametrize("fit", FITS)
def test_where_an_image_lies_and_back(fit):
    rows, columns, low, high = PLACES[fit]
    image = np.full((20, 40, 3), 200, np.uint8)
    placed, box = InputForm(fit=fit, pad=9).place(image, 30, 30)
    assert placed.shape == (30, 30, 3)
    assert (placed[rows, columns] == 200).all()
    rest = np.ones((30, 30), bool)
    rest[rows, columns] = False
    assert (placed[rest] == 9).all()
    found = to_image(np.array([[*low, *high, 0.5, 3]], np.float32), box, (20, 40))
    np.testing.assert_allclose(found[0], [0, 0, 40, 20, 0.5, 3], atol=1e-4)


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(64, 96), (96, 64), (31, 32)])
def test_a_point_is_found_where_it_was(fit, size):
    """A white square's pixels, placed in any rectangle and mapped back, are where they were to a pixel of each."""
    image = np.zeros((90, 120, 3), np.uint8)
    image[40:52, 54:68] = 255
    placed, box = InputForm(fit=fit, pad=0).place(image, *size)
    rows, columns = np.nonzero(placed[..., 0] > 127)
    corners = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1, 1, 0]], np.float32)
    step = max(1 / box.gain, 1 / box.gain_y)
    np.testing.assert_allclose(to_image(corners, box, (90, 120))[0, :4], [54, 40, 68, 52], atol=step + 0.5)


def test_numbers_of_every_scale_order_and_mean():
    pixel = np.array([[[10, 20, 30]]], np.uint8)
    forms = {
        InputForm(scale=1): [10, 20, 30],
        InputForm(scale=1, bgr=True): [30, 20, 10],
        InputForm(): [10 / 255, 20 / 255, 30 / 255],
        InputForm((0.1, 0.2, 0.3), (0.5, 1, 2), bgr=True): [
            (30 / 255 - 0.1) / 0.5, 20 / 255 - 0.2, (10 / 255 - 0.3) / 2,
        ],
        InputForm((100.0,), (50.0,), scale=1): [-1.8, -1.6, -1.4],
    }  # fmt: skip
    for form, wanted in forms.items():
        found = form.apply(pixel, 1, 1)
        assert (found.shape, found.dtype) == ((3, 1, 1), np.float32)
        np.testing.assert_allclose(found[:, 0, 0], wanted, rtol=1e-6)


def test_one_channel_is_grey():
    image = noise(8, 8)
    found = InputForm(scale=1, bgr=True).apply(image, 8, 8, channels=1)
    assert np.array_equal(found[0], cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32))
    with pytest.raises(InputError, match="one channel"):
        InputForm((1.0, 2, 3)).apply(image, 8, 8, channels=1)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"mean": (0.1, 0.2)}, "three"), ({"std": (0.0,)}, "above 0"), ({"mean": (np.nan,)}, "three"),
     ({"scale": 2}, "255"), ({"fit": "middle"}, "letterbox, corner"), ({"pad": 256}, "0 to 255")],
)  # fmt: skip
def test_a_form_that_means_nothing_is_one_sentence(wrong, words):
    with pytest.raises(InputError, match=words) as caught:
        InputForm(**wrong)
    assert "{" not in str(caught.value)


def test_an_unchanged_letterbox_has_equal_gains():
    assert Letterbox(0.5, 0, 0).gain_y == 0.5
    assert Letterbox(0.5, 0, 0, 3.0).gain_y == 1.5


def test_the_names_are_those_of_the_families():
    assert presets()["yolov5"].form == presets()["yolov8"].form == PLAIN
    yolox = presets()["yolox"].form
    assert (yolox.bgr, yolox.scale, yolox.fit, yolox.pad) == (True, 1, "corner", 114)
    nanodet = presets()["nanodet"].form.apply(np.full((4, 4, 3), 100, np.uint8), 4, 4)
    wanted = [(100 - 103.53) / 57.375, (100 - 116.28) / 57.12, (100 - 123.675) / 58.395]
    np.testing.assert_allclose(nanodet[:, 0, 0], wanted, rtol=1e-5)
    assert presets()["picodet"].form.fit == "stretch"
    assert presets()["imagenet"].form.fit == "crop"


def test_a_file_of_the_users_adds_names(tmp_path):
    mine = tmp_path / "mine.yaml"
    mine.write_text("a: {channels: bgr, scale: 1, pad: 7}\nb:\n  mean: [0.1, 0.2, 0.3]\n  decode: yolox\n")
    assert named_preset(f"{mine}:a").form == InputForm(bgr=True, scale=1, pad=7)
    assert named_preset(f"{mine}:b").form == InputForm((0.1, 0.2, 0.3))
    assert named_preset(f"{mine}:b").decode == "yolox"
    (tmp_path / "one.yml").write_text("only: {fit: stretch}")
    assert named_preset(str(tmp_path / "one.yml")).form == InputForm(fit="stretch")


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [("a: {size: 3}", ":a", "size.*none of channels"), ("a: {scale: x}", ":a", "scale to 'x'"),
     ("a: {mean: {}}", ":a", "mean"),
     ("a: 3", ":a", "not a list of keys"), ("- a", ":a", "list of inputs"), ("a: {", ":a", "readable YAML"),
     ("a: {}\nb: {}", "", "2 entries"),
     ("a: {}", ":c", "no entry 'c'; it has a"), ("", ":a", "list of inputs"),
     ("a: {fit: x}", ":a", "a: fit must be one of"),
     ("a: {channels: grb}", ":a", "channels"), ("1: &x {}\n2: *x", ":1", None), ("a: {pad: 1e9}", ":a", "pad"),
     ("a: {std: [1, 2]}", ":a", "three numbers"), ("a: {mean: [[1]]}", ":a", "mean"), ("x" * 70000, ":a", "YAML")],
)  # fmt: skip
def test_a_wrong_file_is_one_sentence(tmp_path, text, name, words):
    path = tmp_path / "my.yaml"
    path.write_text(text)
    if words is None:
        assert named_preset(f"{path}{name}").form == PLAIN
        return
    with pytest.raises(InputError) as caught:
        named_preset(f"{path}{name}")
    assert re.search(words, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_name_that_is_none_is_told_the_names(tmp_path):
    with pytest.raises(InputError, match=r"'yolo' is neither one of yolov5, .*imagenet"):
        named_preset("yolo")
    with pytest.raises(InputError, match=r"There is no file at .*none\.yaml"):
        named_preset(str(tmp_path / "none.yaml:a"))
