"""Layouts of data.yaml, lists and folders as YOLOv5, Roboflow and Windows users have them (docs/datasets.md)."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
from test_images import picture, text

from dsconvert.base.errors import InputError
from dsconvert.base.notes import DataWarning
from dsconvert.photos.dataset import calibration_images, evaluation_images, image_paths, images_of, read_data_yaml


@pytest.fixture(autouse=True)
def elsewhere(tmp_path_factory, monkeypatch):
    """Run where nothing of a data set lies; whatever is warned of has to be expected."""
    monkeypatch.chdir(tmp_path_factory.mktemp("work"))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        yield


def same(found: list[Path], *wanted: Path) -> None:
    assert [os.path.realpath(p) for p in found] == [os.path.realpath(p) for p in wanted]


# --- where paths start -------------------------------------------------------------------------------------------


def test_roboflow_means_the_folder_beside_the_yaml(tmp_path):
    image, other = picture(tmp_path / "set/valid/images/a.jpg"), picture(tmp_path / "set/train/images/b.jpg")
    path = text(
        tmp_path / "set/data.yaml",
        "train: ../train/images\nval: ../valid/images\ntest: ../test/images\n\nnc: 2\nnames: ['a', 'b']\n\n"
        "roboflow:\n  workspace: w\n  version: 1\n  url: https://x\n",
    )
    same(evaluation_images(path), image)
    same(calibration_images(path), other)
    with pytest.raises(InputError, match=r"no file or folder at \.\./test/images, .* names as test; looked at"):
        evaluation_images(path, "test")


def test_yolov5_keeps_its_yaml_in_data_and_the_images_beside_itself(tmp_path, monkeypatch):
    image = picture(tmp_path / "datasets/coco128/images/train2017/a.jpg")
    path = text(
        tmp_path / "yolov5/data/coco128.yaml",
        "path: ../datasets/coco128\ntrain: images/train2017\nval: images/train2017\ntest:\nnames:\n  0: person\n",
    )
    # by the folder above the yaml's, from wherever it is run
    with pytest.warns(DataWarning, match="the same images as train and as val"):
        same(evaluation_images(path), image)
    # by the working folder, of a yaml that lies elsewhere
    copy = text(tmp_path / "far/away/from/it/c.yaml", path.read_text())
    with pytest.raises(InputError, match="no file or folder at images/train2017"):
        images_of(copy, ("train",), "train")
    (tmp_path / "yolov5/data").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path / "yolov5")
    same(read_data_yaml(copy).images("train"), image)


def test_without_path_images_may_lie_beside_the_yaml_or_in_the_working_folder(tmp_path, monkeypatch):
    beside = text(tmp_path / "conf/data.yaml", "val: images\nnames: [a]\n")
    image = picture(tmp_path / "run/images/a.jpg")
    monkeypatch.chdir(tmp_path / "run")
    same(evaluation_images(beside), image)
    nearer = picture(tmp_path / "conf/images/b.jpg")  # the yaml's folder comes first
    same(evaluation_images(beside), nearer)


def test_ultralytics_keeps_datasets_in_one_folder(tmp_path, monkeypatch):
    image = picture(tmp_path / "datasets/coco8/images/val/a.jpg")
    path = text(tmp_path / "cfg/deep/coco8.yaml", "path: coco8 # root\ntrain: x\nval: images/val\nnames: [a]\n")
    for folder in (tmp_path, tmp_path / "repo"):
        folder.mkdir(exist_ok=True)
        monkeypatch.chdir(folder)
        same(evaluation_images(path), image)


def test_the_error_names_every_place_looked_at(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = text(tmp_path / "a/b/data.yaml", "path: set\nval: ../valid/images\nnames: [a]\n")
    with pytest.raises(InputError) as caught:
        evaluation_images(path)
    for place in ("a/b/valid/images", "a/b/set/valid/images", "valid/images", "set/valid/images", "a/set/valid/images",
                  "datasets/set/valid/images"):  # fmt: skip
        assert f"{tmp_path / place}" in str(caught.value), place


@pytest.mark.parametrize(
    ("val", "where"),
    [
        ("images\\val", "images/val"), ("'..\\valid\\images'", "valid/images"),
        ("my images/val set", "my images/val set"),
        ("[images/a, images/b]", "images/a"), ("./images/val/", "images/val"), ("'  images/val  '", "images/val"),
        (".", "."), ("images/x.JPG", "images"),
    ],
)  # fmt: skip
def test_ways_to_write_a_split(tmp_path, val, where):
    image = picture(tmp_path / where / "x.JPG")
    (tmp_path / "images/b").mkdir(parents=True, exist_ok=True)
    if "images/b" in val:
        picture(tmp_path / "images/b/y.png")
    path = text(tmp_path / "data.yaml", f"val: {val}\nnames: [a]\n")
    assert os.path.realpath(evaluation_images(path)[0]) == os.path.realpath(image)
    assert len(evaluation_images(path)) == 1 + ("images/b" in val)


@pytest.mark.parametrize("val", ["/content/datasets/x/valid/images", "D:\\data\\valid\\images", "C:/data/valid"])
def test_a_path_of_another_machine_is_refused_with_its_name(tmp_path, val):
    path = text(tmp_path / "data.yaml", f"val: '{val}'\nnames: [a]\n")
    with pytest.raises(InputError) as caught:
        evaluation_images(path)
    assert f"There is no file or folder at {val}, which {path} names as val" in str(caught.value)


# --- what a data.yaml says ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "names"),
    [
        ("names: {0: a, 1: b}", ("a", "b")), ("names: {'1': b, '0': a}", ("a", "b")), ("nc: 2", ("class0", "class1")),
        ("nc: '1'\nnames: [a]", ("a",)),
        ("names: [no, yes, 1:30, 2001-01-01, 007]", ("no", "yes", "1:30", "2001-01-01", "007")),
        ("names: &n [a]\nothers: *n", ("a",)), ("names:\r\n- a\r\n- b b\r\n", ("a", "b b")),
    ],
)  # fmt: skip
def test_names(tmp_path, content, names):
    assert read_data_yaml(text(tmp_path / "d.yaml", content + "\n")).names == names


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "latin-1", "cp1252"])
def test_encodings_of_yaml_and_lists(tmp_path, encoding):
    image = picture(tmp_path / "Bilder Ä/é.png")
    (tmp_path / "d.yaml").write_bytes("val: Bilder Ä\nnames: [Löwe]\n".encode(encoding))
    (tmp_path / "l.txt").write_bytes("Bilder Ä/é.png\r\n".encode(encoding))
    assert read_data_yaml(tmp_path / "d.yaml").names == ("Löwe",)
    same(evaluation_images(tmp_path / "d.yaml"), image)
    same(evaluation_images(tmp_path / "l.txt"), image)


def test_key_points_are_two_numbers(tmp_path):
    assert read_data_yaml(text(tmp_path / "d.yaml", "names: [a]\nkpt_shape: [5, 2]\n")).key_points == (5, 2)
    for bad in ("5", "[5]", "[5, 4]", "[0, 2]", "[a, 2]", "[5, 99999999999999999999]"):
        with pytest.raises(InputError, match="not two numbers such as"):
            read_data_yaml(text(tmp_path / "d.yaml", f"names: [a]\nkpt_shape: {bad}\n"))


def test_validation_is_val(tmp_path):
    image = picture(tmp_path / "valid/a.png")
    for key in ("valid", "validation"):
        same(evaluation_images(text(tmp_path / "d.yaml", f"{key}: valid\nnames: [a]\n")), image)


# --- splits ------------------------------------------------------------------------------------------------------


def test_only_the_wanted_split_is_looked_at(tmp_path):
    image = picture(tmp_path / "here/a.png")
    val = text(tmp_path / "val.yaml", "train: gone\nval: here\ntest: gone too\nnames: [a]\n")
    train = text(tmp_path / "train.yaml", "train: here\nval: gone\nnames: [a]\n")
    same(evaluation_images(val), image)
    same(calibration_images(train), image)
    same(evaluation_images(text(tmp_path / "t.yaml", "val: gone\ntest: here\nnames: [a]\n"), "test"), image)


def test_another_split_in_place_of_the_wanted_one_is_said_every_time(tmp_path):
    picture(tmp_path / "here/a.png")
    train = text(tmp_path / "train.yaml", "train: here\nval:\nnames: [a]\n")
    test = text(tmp_path / "test.yaml", "train: here\nval: []\ntest: here\nnames: [a]\n")
    val = text(tmp_path / "val.yaml", "val: here\nnames: [a]\n")
    for _ in range(2):
        with pytest.warns(DataWarning, match="no val images; measured on its train images, which the model was"):
            evaluation_images(train)
        with pytest.warns(DataWarning, match="no val images; measured on its test images.$"):
            evaluation_images(test)
        with pytest.warns(DataWarning, match="no train images; its val images are used, so measure on others"):
            calibration_images(val)
    evaluation_images(train, "train")  # asked for: nothing to say
    with pytest.raises(InputError, match="names no test images"):
        evaluation_images(val, "test")
    with pytest.raises(InputError, match=r"not a data\.yaml, so it has no splits such as val"):
        evaluation_images(tmp_path / "here", "val")


# --- lists -------------------------------------------------------------------------------------------------------


def test_a_lists_paths_start_at_its_folder_the_working_folder_or_the_data_sets(tmp_path, monkeypatch):
    a, b = picture(tmp_path / "set/images/a.png"), picture(tmp_path / "work/images/b.png")
    c = picture(tmp_path / "root/images/c.png")
    monkeypatch.chdir(tmp_path / "work")
    text(tmp_path / "set/val.txt", "./images/a.png\nimages/b.png\nimages\\c.png\n")
    path = text(tmp_path / "conf/d.yaml", f"path: ../root\nval: {tmp_path / 'set/val.txt'}\nnames: [a]\n")
    same(evaluation_images(path), a, b, c)


def test_files_that_are_gone_are_left_out_counted_and_named(tmp_path):
    image = picture(tmp_path / "a.png")
    listed = text(tmp_path / "l.txt", "gone 1.png\na.png\n\n/nowhere/gone2.png\n")
    with pytest.warns(DataWarning, match=r"^2 of 3 files that .*l.txt lists are not there .* first, gone 1.png, was"):
        same(image_paths(listed), image)
    with pytest.raises(InputError, match=r"lists 2 files that are not there, the first gone 1.png; looked at"):
        image_paths(listed, strict=True)
    with pytest.raises(InputError, match=r"lists 1 files that are not there, the first b\.png"):
        image_paths(text(tmp_path / "l.txt", "b.png\n"))


def test_what_is_named_twice_counts_once(tmp_path):
    a, b = picture(tmp_path / "x/a.png"), picture(tmp_path / "x/b.png")
    listed = text(tmp_path / "l.txt", "x/b.png\nx/a.png\nx/../x/b.png\n")
    with pytest.warns(DataWarning, match="names 1 images more than once; each counts once"):
        same(evaluation_images(listed), b, a)
    path = text(tmp_path / "d.yaml", "val: [x, x/a.png]\nnames: [a]\n")
    with pytest.warns(DataWarning, match="names 1 images more than once"):
        same(evaluation_images(path), a, b)


def test_lists_have_bounds(tmp_path, monkeypatch):
    from dsconvert.photos import dataset

    picture(tmp_path / "a.png")
    monkeypatch.setattr(dataset, "MAX_LIST_LINES", 3)
    assert len(image_paths(text(tmp_path / "l.txt", "a.png\n" * 3))) == 3
    with pytest.raises(InputError, match="nor a text file of paths: it has more than 3 lines"):
        image_paths(text(tmp_path / "l.txt", "a.png\n" * 4))
    with pytest.raises(InputError, match="it has a line of more than 32768 characters"):
        image_paths(text(tmp_path / "l.txt", "a" * 40_000))
    monkeypatch.setattr(dataset, "MAX_LIST_BYTES", 10)
    with pytest.raises(InputError, match="it is longer than"):
        image_paths(text(tmp_path / "l.txt", "a.png\n" * 3))
    (tmp_path / "l.bin").write_bytes(b"\xff\xd8\xff\xe0\0\x10JFIF")
    with pytest.raises(InputError, match="it is not text"):
        image_paths(tmp_path / "l.bin")


# --- folders -----------------------------------------------------------------------------------------------------


def test_folders_behind_links_are_looked_through_once(tmp_path):
    a, b = picture(tmp_path / "set/images/a.png"), picture(tmp_path / "far/more/b.png")
    (tmp_path / "set/images/link").symlink_to(tmp_path / "far")
    (tmp_path / "set/images/again").symlink_to(tmp_path / "far/more")
    (tmp_path / "far/up").symlink_to(tmp_path / "set/images")  # a circle
    (tmp_path / "far/round").symlink_to(tmp_path / "far")
    found = image_paths(tmp_path / "set/images")
    assert [os.path.realpath(p) for p in found if p.name == "a.png"] == [str(a)]
    assert [os.path.realpath(p) for p in found if p.name == "b.png"] == [str(b)]
    assert len(found) == 2


def test_the_real_name_of_a_folder_wins_over_a_link_to_it(tmp_path):
    image = picture(tmp_path / "z/a.png")
    (tmp_path / "b").symlink_to(tmp_path / "z")
    assert image_paths(tmp_path) == [image]
    (tmp_path / "link").symlink_to(tmp_path / "z")  # the folder given may be one
    assert image_paths(tmp_path / "link") == [tmp_path / "link/a.png"]


def test_what_begins_with_a_dot_is_left_to_its_owner(tmp_path):
    image = picture(tmp_path / "a.png")
    for hidden in ("._a.png", ".ipynb_checkpoints/a-checkpoint.png"):
        picture(tmp_path / hidden)
    assert image_paths(tmp_path) == [image]


def test_a_folder_that_may_not_be_entered_is_said(tmp_path, monkeypatch):
    """Permissions do not bind root, under which this may run: the refusal is played."""
    image = picture(tmp_path / "a.png")
    picture(tmp_path / "closed/b.png")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("closed"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.warns(DataWarning, match="1 folders could not be entered and are left out; the first: .*closed"):
        assert image_paths(tmp_path) == [image]
