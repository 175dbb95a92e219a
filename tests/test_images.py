"""Image lists, data.yaml, labels and the letterbox."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from dsconvert.errors import InputError
from dsconvert.yolo.images import (
    Letterbox,
    calibration_batches,
    calibration_images,
    image_paths,
    label_path,
    letterbox,
    read_data_yaml,
    read_image,
    read_labels,
    spread,
    to_tensor,
)


@pytest.fixture
def folder(tmp_path) -> Path:
    for split in ("train", "val"):
        (tmp_path / "images" / split).mkdir(parents=True)
        for name in ("b.jpg", "a.PNG"):
            cv2.imwrite(str(tmp_path / "images" / split / name), np.full((4, 6, 3), 50, np.uint8))
    (tmp_path / "images" / "notes.txt").write_text("train/b.jpg\n\nval/a.PNG\n")
    return tmp_path


def test_folders_lists_and_single_images(folder):
    images = folder / "images"
    assert [p.name for p in image_paths(images / "val")] == ["a.PNG", "b.jpg"]
    assert len(image_paths(images)) == 4
    assert image_paths(images / "notes.txt") == [images / "train/b.jpg", images / "val/a.PNG"]
    assert image_paths(images / "val/b.jpg") == [images / "val/b.jpg"]


def test_nothing_there_is_said(folder):
    (folder / "empty").mkdir()
    (folder / "bad.txt").write_text("gone.jpg\n")
    for source, words in [("empty", "holds no images"), ("none", "no file or folder"), ("bad.txt", "not there")]:
        with pytest.raises(InputError, match=words):
            image_paths(folder / source)


def test_data_yaml_in_its_variants(folder):
    path = folder / "data.yaml"
    path.write_text("train: images/train\nval: [images/val, images/train]\nnames: {0: cat, 1: dog}\nnc: 2\n")
    data = read_data_yaml(path)
    assert data.names == ("cat", "dog")
    assert (len(data.train), len(data.val)) == (2, 4)
    assert calibration_images(path) == list(data.train)
    path.write_text(f"path: {folder}/images\nval: val\nnames: [cat]\n")
    assert calibration_images(path) == list(read_data_yaml(path).val)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("names: [a]\nnc: 2", "nc 2"),
        ("val: images", "no names"),
        ("names: {0: a, 2: b}", "0, 1, 2"),
        ("names: 3", "not a list"),
        ("- a", "no names"),
        ("a: [", "not a readable YAML"),
        ("!!python/object/apply:os.system ['true']", "not a readable YAML"),
        ("names: [a]", "neither train nor val"),
    ],
)
def test_unusable_data_yaml(tmp_path, text, words):
    (tmp_path / "d.yaml").write_text(text)
    with pytest.raises(InputError, match=words):
        calibration_images(tmp_path / "d.yaml")


def test_label_path_replaces_the_last_images_folder():
    assert label_path(Path("/images/x/images/val/a.b.jpg")) == Path("/images/x/labels/val/a.b.txt")
    assert label_path(Path("pics/a.jpg")) == Path("pics/a.txt")


def test_labels_boxes_and_polygons(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1 0.5 0.5 0.2 0.4\n\n0 0.1 0.2 0.3 0.2 0.3 0.6 0.1 0.6\n")
    np.testing.assert_allclose(read_labels(path, 2), [[1, 0.5, 0.5, 0.2, 0.4], [0, 0.2, 0.4, 0.2, 0.4]])
    assert read_labels(tmp_path / "none.txt", 2).shape == (0, 5)


@pytest.mark.parametrize(
    "row", ["0 1 2", "0 a b c d", "2 .5 .5 .1 .1", "-1 .5 .5 .1 .1", "0.5 .5 .5 .1 .1", "0 nan 0 0 0"]
)
def test_malformed_labels_name_the_line(tmp_path, row):
    path = tmp_path / "a.txt"
    path.write_text("0 .5 .5 .1 .1\n" + row)
    with pytest.raises(InputError, match=r"a.txt, line 2"):
        read_labels(path, 2)


def test_letterbox_of_a_wide_image():
    image = np.full((20, 40, 3), 200, np.uint8)
    square, box = letterbox(image, 64)
    # gain 1.6: 64 x 32, 16 rows of padding above and below
    assert box == Letterbox(1.6, 0, 16)
    assert square.shape == (64, 64, 3)
    assert (square[:16] == 114).all()
    assert (square[16:48] == 200).all()
    assert (square[48:] == 114).all()


def test_letterbox_odd_padding_goes_below_and_right():
    square, box = letterbox(np.zeros((3, 2, 3), np.uint8), 3)
    assert box == Letterbox(1.0, 0, 0)
    assert (square[:, 2] == 114).all()


def test_colours_are_rgb_and_scaled_to_one(tmp_path):
    cv2.imwrite(str(tmp_path / "a.png"), np.array([[[255, 0, 51]]], np.uint8))  # blue, green, red
    image = read_image(tmp_path / "a.png")
    assert image[0, 0].tolist() == [51, 0, 255]
    assert to_tensor([image]).flatten().tolist() == pytest.approx([0.2, 0, 1])


def test_unreadable_images_are_skipped_and_counted(folder):
    (folder / "images/val/zero.jpg").write_bytes(b"")
    (folder / "images/val/text.jpg").write_text("no")
    batches = list(calibration_batches(image_paths(folder / "images"), 32, 3))
    assert sum(len(b) for b, _ in batches) == 4
    assert sum(skipped for _, skipped in batches) == 2
    with pytest.raises(InputError, match="not an image"):
        read_image(folder / "images/val/zero.jpg")


def test_spread_is_even():
    paths = [Path(str(i)) for i in range(10)]
    assert [p.name for p in spread(paths, 5)] == ["0", "2", "4", "6", "8"]
    assert spread(paths, 99) == paths
