"""Finding images and labels as YOLOv5 does, reading them, and the letterbox: known answers."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from dsconvert.base.errors import InputError
from dsconvert.base.notes import DataWarning
from dsconvert.photos.dataset import DataYaml, calibration_images, image_paths, read_data_yaml
from dsconvert.photos.images import Letterbox, letterbox, read_image, spread, to_tensor
from dsconvert.photos.labels import label_path, read_labels


def picture(path: Path, colour=(10, 20, 30), size=(8, 6)) -> Path:
    """A PNG of one RGB colour, size (width, height)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = np.empty((size[1], size[0], 3), np.uint8)
    image[:] = colour[::-1]
    path.write_bytes(cv2.imencode(".png", image)[1].tobytes())
    return path


def text(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


# --- finding images --------------------------------------------------------------------------------------------


def test_a_folder_is_searched_to_the_bottom_sorted_and_for_images_only(tmp_path):
    wanted = [picture(tmp_path / name) for name in ("b/c.PNG", "a.jpg", "b/deep/z.bmp", "0.webp")]
    text(tmp_path / "a.txt", "0 0.5 0.5 1 1")
    (tmp_path / "folder.jpg").mkdir()
    assert image_paths(tmp_path) == sorted(wanted)


def test_one_image_and_a_list_of_images(tmp_path):
    a, b = picture(tmp_path / "a.png"), picture(tmp_path / "sub/b.png")
    assert image_paths(a) == [a]
    # relative paths start at the list's folder, absolute ones stay, blank lines and line ends do not count
    listed = text(tmp_path / "list.txt", f"./sub/b.png\r\n\n  a.png  \n{b}\n")
    assert image_paths(listed) == [tmp_path / "sub/b.png", a, b]


def test_what_cannot_give_images_is_said_in_one_sentence(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "binary.dat").write_bytes(b"\xff\xfe\x00\x80")
    text(tmp_path / "blank.txt", "\n \n")
    text(tmp_path / "gone.txt", "a.png\nb.png\n")
    cases = {
        "nowhere": "no file or folder",
        "empty": "holds no images",
        "binary.dat": "neither a folder",
        "blank.txt": "lists no images",
        "gone.txt": r"lists 2 files that are not there, the first .*a\.png",
    }
    for name, words in cases.items():
        with pytest.raises(InputError, match=words) as caught:
            image_paths(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)


def test_a_name_that_is_too_long_is_said(tmp_path):
    """Found by benchmarks/fuzz.py."""
    text(tmp_path / "list.txt", "x" * 300 + ".png\n")
    with pytest.raises(InputError, match="no file or folder at"):
        image_paths(tmp_path / ("x" * 300))
    with pytest.raises(InputError, match="lists 1 files that are not there, the first xxx"):
        image_paths(tmp_path / "list.txt")


# --- data.yaml -------------------------------------------------------------------------------------------------


def test_data_yaml_starts_at_its_own_folder(tmp_path, monkeypatch):
    train, val = picture(tmp_path / "set/images/train/a.png"), picture(tmp_path / "set/images/val/b.png")
    more = picture(tmp_path / "set/more/c.png")
    path = text(
        tmp_path / "conf/data.yaml",
        "path: ../set\ntrain: [images/train, more]\nval: images/val\nnc: 2\nnames: {1: dog, 0: cat}\n",
    )
    monkeypatch.chdir("/")
    data = read_data_yaml(path)
    assert data.names == ("cat", "dog")
    assert [p.resolve() for p in data.train] == [train, more]
    assert [p.resolve() for p in data.val] == [val]


def test_data_yaml_with_names_only_and_with_an_absolute_path(tmp_path):
    path = text(tmp_path / "n.yaml", "names: [a, 7]\n")
    nothing = {"train": (), "val": (), "test": ()}
    assert read_data_yaml(path) == DataYaml(path, ("a", "7"), True, nothing, "")
    image = picture(tmp_path / "elsewhere/x.png")
    path = text(tmp_path / "a/data.yaml", f"path: {tmp_path / 'elsewhere'}\nval: .\nnames: [a]\n")
    assert read_data_yaml(path).val == (image,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("[1, 2]", "has no names"),
        ("val: x\n", "has no names"),
        ("names: {1: a, 2: b}\n", "not 0, 1, 2"),
        ("names: 3\n", "not a list"),
        ("names: []\n", "not a list"),
        ("nc: 3\nnames: [a, b]\n", "says nc 3 but names 2"),
        ("names: [a\n", "not a readable YAML"),
        ("names: !!python/object/apply:os.getcwd []\n", "not a readable YAML"),
        ("names: [a]\nval: nowhere\n", "no file or folder"),
    ],
)
def test_unusable_data_yamls(tmp_path, content, words):
    with pytest.raises(InputError, match=words):
        read_data_yaml(text(tmp_path / "data.yaml", content)).images("val")


def test_a_data_yaml_that_is_not_there_or_not_text(tmp_path):
    with pytest.raises(InputError, match="no data file"):
        read_data_yaml(tmp_path / "data.yaml")
    (tmp_path / "data.yaml").write_bytes(b"names: [\xff\0]")
    with pytest.raises(InputError, match="not a readable YAML"):
        read_data_yaml(tmp_path / "data.yaml")


def test_calibration_prefers_train_then_val_then_complains(tmp_path):
    train, val = picture(tmp_path / "train/a.png"), picture(tmp_path / "val/b.png")
    both = text(tmp_path / "both.yaml", "train: train\nval: val\nnames: [a]\n")
    only = text(tmp_path / "only.yml", "val: val\nnames: [a]\n")
    none = text(tmp_path / "none.yaml", "names: [a]\n")
    assert calibration_images(both) == [train]
    with pytest.warns(DataWarning, match="names no train images; its val images are used, so measure on others"):
        assert calibration_images(only) == [val]
    assert calibration_images(tmp_path / "val") == [val]
    with pytest.raises(InputError, match="neither train nor val"):
        calibration_images(none)


# --- labels ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/val/a.jpg", "/d/labels/val/a.txt"),
        ("images/a.b.png", "labels/a.b.txt"),
        ("/images/x/images/a.jpg", "/images/x/labels/a.txt"),  # the last such folder only
        ("/d/my_images/a.jpg", "/d/my_images/a.txt"),
        ("/d/images.jpg", "/d/images.txt"),
        ("/d/images/images", "/d/labels/images.txt"),  # the file's own name is not a folder
    ],
)
def test_label_path(image, label):
    assert label_path(Path(image)) == Path(label)


def test_labels_are_rows_and_polygons_become_their_boxes(tmp_path):
    path = text(tmp_path / "a.txt", "1 0.5 0.25 0.5 0.125\n\n0 0.25 0.5 0.75 0.25 0.5 1.0\n")
    # the triangle spans 0.25..0.75 across and 0.25..1 down; all numbers are binary fractions: exact
    wanted = [[1, 0.5, 0.25, 0.5, 0.125], [0, 0.5, 0.625, 0.5, 0.75]]
    np.testing.assert_array_equal(read_labels(path, 2), wanted)


def test_no_label_file_and_an_empty_one_mean_no_objects(tmp_path):
    assert read_labels(tmp_path / "none.txt", 3).shape == (0, 5)
    assert read_labels(text(tmp_path / "empty.txt", "\n \n"), 3).shape == (0, 5)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("0 0.5 0.5 0.5", "a class and four numbers"),
        ("0 0.5 0.5 0.5 0.5 0.9", "a class and four numbers"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "a class and four numbers"),  # half a point
        ("0 a b c d", "a class and four numbers"),
        ("0 nan 0.5 0.5 0.5", "a class and four numbers"),
        ("0 0.1 inf 0.2 0.2 0.3 0.3", "a class and four numbers"),
        ("inf 0.5 0.5 0.5 0.5", "a class and four numbers"),
        ("2 0.5 0.5 0.5 0.5", "class 2 is not one of the model's 2"),
        ("-1 0.5 0.5 0.5 0.5", "class -1 is not one of the model's 2"),
        ("0.5 0.5 0.5 0.5 0.5", "class 0.5 is not one of the model's 2"),
    ],
)
def test_malformed_labels_are_named_by_file_and_line(tmp_path, line, words):
    path = text(tmp_path / "a.txt", f"0 0.5 0.5 0.5 0.5\n\n{line}\n")
    with pytest.raises(InputError, match=words) as caught:
        read_labels(path, 2)
    assert str(caught.value).startswith(f"{path}, line 3:")


# --- pixels ----------------------------------------------------------------------------------------------------


def test_images_are_read_as_rgb_whatever_their_name(tmp_path):
    image = read_image(picture(tmp_path / "bläck 字.png", (1, 2, 3), (5, 4)))
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    np.testing.assert_array_equal(image, np.broadcast_to(np.array([1, 2, 3], np.uint8), (4, 5, 3)))


def test_grey_and_transparent_images_become_three_channels(tmp_path):
    grey = np.arange(12, dtype=np.uint8).reshape(3, 4)
    cv2.imwrite(str(tmp_path / "g.png"), grey)
    np.testing.assert_array_equal(read_image(tmp_path / "g.png"), np.stack([grey] * 3, -1))
    cv2.imwrite(str(tmp_path / "t.png"), np.full((3, 4, 4), 9, np.uint8))
    assert read_image(tmp_path / "t.png").shape == (3, 4, 3)


def test_what_is_no_image_is_an_input_error(tmp_path):
    whole = picture(tmp_path / "whole.png", size=(64, 64)).read_bytes()
    for content in (b"", b"not an image", whole[:20]):
        (tmp_path / "bad.png").write_bytes(content)
        with pytest.raises(InputError, match="not an image"):
            read_image(tmp_path / "bad.png")
    for unreadable in (tmp_path, tmp_path / "gone.png"):
        with pytest.raises(InputError, match="cannot be read"):
            read_image(unreadable)


@pytest.mark.parametrize(
    ("width", "height", "side", "placed", "rows", "columns"),
    [
        (100, 50, 64, Letterbox(0.64, 0, 16), (16, 48), (0, 64)),  # wide: grey above and below
        (50, 100, 64, Letterbox(0.64, 16, 0), (0, 64), (16, 48)),  # tall: grey left and right
        (16, 8, 64, Letterbox(4.0, 0, 16), (16, 48), (0, 64)),  # small: enlarged
        (64, 64, 64, Letterbox(1.0, 0, 0), (0, 64), (0, 64)),
        (64, 33, 64, Letterbox(1.0, 0, 15), (15, 48), (0, 64)),  # 15.5 grey rows: the odd one goes below
        (1000, 1, 64, Letterbox(0.064, 0, 31), (31, 32), (0, 64)),  # never thinner than a pixel
    ],
)
def test_letterbox_known_answers(width, height, side, placed, rows, columns):
    image = np.full((height, width, 3), (200, 100, 50), np.uint8)
    square, box = letterbox(image, side)
    wanted = np.full((side, side, 3), 114, np.uint8)
    wanted[rows[0] : rows[1], columns[0] : columns[1]] = (200, 100, 50)
    np.testing.assert_array_equal(square, wanted)
    assert box == placed


def test_letterbox_scales_bilinearly_about_pixel_centres():
    # pixels 0 and 100 doubled: samples at -0.25, 0.25, 0.75, 1.25 of the way, clamped
    square, _ = letterbox(np.array([[[0] * 3, [100] * 3]], np.uint8), 4)
    np.testing.assert_array_equal(square[..., 0], [[114] * 4, [0, 25, 75, 100], [0, 25, 75, 100], [114] * 4])


def test_letterbox_leaves_pixels_of_a_fitting_image_alone():
    image = np.random.default_rng(0).integers(0, 256, (20, 32, 3), dtype=np.uint8)
    before = image.copy()
    square, _ = letterbox(image, 32)
    np.testing.assert_array_equal(square[6:26], before)
    np.testing.assert_array_equal(image, before)


def test_to_tensor_is_channels_first_and_zero_to_one():
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 1] = (255, 51, 0)  # row 0, column 1
    batch = to_tensor([np.zeros_like(image), image])
    assert batch.shape == (2, 3, 2, 2)
    assert batch.dtype == torch.float32
    assert batch.is_contiguous()
    wanted = torch.zeros(2, 3, 2, 2)
    wanted[1, 0, 0, 1], wanted[1, 1, 0, 1] = 1.0, 51 / 255  # both sides divide in float32: equal to the bit
    assert torch.equal(batch, wanted)


def test_spread_takes_evenly_spaced_paths():
    paths = [Path(str(i)) for i in range(10)]
    assert spread(paths, 4) == [paths[i] for i in (0, 2, 5, 7)]
    assert spread(paths, 10) == spread(paths, 99) == paths
    assert spread(paths, 1) == paths[:1]
    assert spread(paths, 0) == []


def test_more_pixels_than_can_be_decoded_is_an_unreadable_image(tmp_path):
    """A PNG header that promises 10^12 pixels: OpenCV raises instead of returning nothing."""
    size = struct.pack(">II", 1_000_000, 1_000_000)
    body = b"IHDR" + size + bytes([8, 2, 0, 0, 0])
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + body + struct.pack(">I", zlib.crc32(body))
    (tmp_path / "bomb.png").write_bytes(header)
    with pytest.raises(InputError, match="not an image that can be decoded"):
        read_image(tmp_path / "bomb.png")
