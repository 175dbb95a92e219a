"""What the commands make of splits, labels and lists: figures, warnings on stderr and in --json, --strict, Next."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import DEMO

import dsconvert
from dsconvert.base.notes import DataWarning
from dsconvert.model.file import model_bytes

NAMES = ["ball", "crate", "cone", "star", "ring", "kite"]


@pytest.fixture
def demo(tmp_path) -> Path:
    """Eight scenes of the demo with their labels, and its checkpoint."""
    for kind, suffix in (("images", "jpg"), ("labels", "txt")):
        (tmp_path / kind / "val").mkdir(parents=True)
        for path in sorted((DEMO / kind / "val").glob(f"*.{suffix}"))[:8]:
            shutil.copy(path, tmp_path / kind / "val" / path.name)
    (tmp_path / "data.yaml").write_text(f"val: images/val\nnames: {NAMES}\n")
    shutil.copy(DEMO / "demo.pt", tmp_path / "best.pt")
    return tmp_path


def evaluated(call, folder: Path, *args: str) -> tuple[dict, list[str]]:
    """The model's row, and the warnings, which are on stderr too, each once."""
    done = call("eval", "best.pt", "--data", "data.yaml", "--imgsz", "320", "--json", *args, cwd=folder)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    for sentence in document["warnings"]:
        assert done.err.count(f"Warning: {sentence}\n") == 1
    return document["models"][0], document["warnings"]


def label_files(folder: Path) -> list[Path]:
    return sorted((folder / "labels/val").iterdir())


def test_other_ways_to_say_the_same_measure_the_same(demo, call):
    wanted, warnings = evaluated(call, demo)
    assert warnings == []
    assert wanted["map50_95"] > 0.5
    # rows twice
    for path in label_files(demo):
        path.write_text(path.read_text() * 2)
    found, (warning,) = evaluated(call, demo)
    assert re.match(r"\d+ labels stand twice", warning)
    assert found["map50_95"] == wanted["map50_95"]
    # classes in another order
    (demo / "data.yaml").write_text(f"val: images/val\nnames: {NAMES[::-1]}\n")
    for path in label_files(demo):
        rows = sorted({line.strip() for line in path.read_text().splitlines() if line.strip()})
        path.write_text("".join(f"{5 - int(row[0])}{row[1:]}\r\n" for row in rows))
    found, (warning,) = evaluated(call, demo)
    assert "names the classes in another order than best.pt; its labels are matched by name" in warning
    assert found["map50_95"] == wanted["map50_95"]
    # boxes with key points, in UTF-16
    for path in label_files(demo):
        rows = [line.split() for line in path.read_text().splitlines()]
        path.write_bytes("".join(
            " ".join([*row, *[row[1], row[2], "2"] * 5]) + "\n" for row in rows
        ).encode("utf-16"))  # fmt: skip
    found, warnings = evaluated(call, demo)
    assert any("boxes with 5 key points of 3 numbers each" in w for w in warnings)
    assert found["map50_95"] == wanted["map50_95"]


def test_an_image_with_bad_labels_is_left_out_or_refused(demo, call):
    first, second = label_files(demo)[:2]
    for path in (first, second):
        path.write_text(path.read_text() + "0 0.5 1.02 0.1 0.1\n")
    row, (warning,) = evaluated(call, demo)
    assert row["images"] == 6
    assert warning.startswith("2 of 8 images are left out, as their labels cannot be used; the first: ")
    assert f"labels/val/{first.name}, line " in warning
    done = call("eval", "best.pt", "--data", "data.yaml", "--imgsz", "320", "--strict", cwd=demo)
    assert done.code == 2
    assert done.err.startswith(f"Error: labels/val/{first.name}, line ")
    assert "shares of the image" in done.err
    with pytest.warns(DataWarning, match="2 of 8 images"):
        assert dsconvert.evaluate(demo / "best.pt", demo / "data.yaml", imgsz=320)[0].images == 6
    with pytest.raises(dsconvert.InputError, match="shares of the image"):
        dsconvert.evaluate(demo / "best.pt", demo / "data.yaml", imgsz=320, strict=True)


def test_no_labels_at_all_are_said_with_the_place(work, call):
    shutil.rmtree(work / "labels")
    done = call("eval", "best.pt", "--data", "data.yaml", "--imgsz", "64", cwd=work)
    assert done.code == 2
    assert "None of the 4 images of data.yaml has labels; the first one's should be at" in done.err
    assert "labels/val/0.txt" in done.err


def test_splits_are_chosen_and_missing_ones_said(work, call):
    (work / "data.yaml").write_text("train: gone\nval: gone\ntest: images/val\nnames: [cat, dog]\n")
    evaluate = ("eval", "best.pt", "--data", "data.yaml", "--imgsz", "64", "--json")
    for option in ("--split", "--task"):
        done = call(*evaluate, option, "test", cwd=work)
        assert done.code == 0, done.err
        assert (json.loads(done.out)["split"], json.loads(done.out)["warnings"]) == ("test", [])
    done = call(*evaluate, cwd=work)
    assert done.code == 2
    assert "There is no file or folder at gone, which data.yaml names as val; looked at" in done.err
    (work / "data.yaml").write_text("train: images/val\nnames: [cat, dog]\n")
    for _ in range(2):
        done = call(*evaluate, cwd=work)
        assert done.code == 0, done.err
        assert json.loads(done.out)["split"] == "train"
        assert "names no val images; measured on its train images" in done.err
        assert "names no val images" in json.loads(done.out)["warnings"][0]
    (work / "data.yaml").write_text("val: images/val\nnames: [cat, dog]\n")
    done = call("quantize", "best.pt", "--calib", "data.yaml", "--imgsz", "64", "--bits", "4", "--json", cwd=work)
    assert done.code == 0, done.err
    assert "names no train images; its val images are used, so measure on others" in done.err
    assert "names no train images" in json.loads(done.out)["warnings"][0]


def test_a_list_with_files_that_are_gone(work, call):
    (work / "list.txt").write_text("gone.jpg\n" + "".join(f"images/val/{i}.jpg\n" for i in range(4)))
    quantize = ("quantize", "best.pt", "--calib", "list.txt", "--imgsz", "64", "--bits", "4", "--json")
    done = call(*quantize, cwd=work)
    assert done.code == 0, done.err
    assert json.loads(done.out)["calibration_images"] == 4
    assert json.loads(done.out)["warnings"][0].startswith("1 of 5 files that list.txt lists are not there")
    done = call(*quantize, "--strict", "--force", cwd=work)
    assert done.code == 2
    assert "list.txt lists 1 files that are not there, the first gone.jpg; looked at" in done.err


@pytest.mark.parametrize(
    ("content", "split", "end"),
    [
        ("train: a\nval: b\n", None, []), ("train: a\ntest: b\n", None, ["--split", "test"]),
        ("val: a\ntest: b\n", None, ["--split", "test"]), ("train: a\nval: b\ntest: c\n", "val", ["--split", "test"]),
    ],
)  # fmt: skip
def test_next_measures_on_another_split(work, converted, call, content, split, end):
    (work / "data.yaml").write_text(f"{content}names: [cat, dog]\n")
    options = {"calib": str(work / "data.yaml"), "split": split}
    model = replace(converted, provenance={"source": str(work / "best.pt"), "options": options})
    (work / "m.safetensors").write_bytes(model_bytes(model))
    done = call("export", "m.safetensors", "--onnx", cwd=work)
    assert done.code == 0, done.err
    shown = shlex.split(re.search(r"^Next: (.+)$", done.out, re.MULTILINE)[1])
    assert shown[2:] == [str(work / "best.pt"), "m-packed.onnx", "--data", str(work / "data.yaml"), *end]


@pytest.mark.parametrize("calib", ["images", "val.yaml", "same.yaml", "gone.yaml"])
def test_next_asks_for_other_images_where_all_were_calibrated_on(work, converted, call, calib):
    (work / "val.yaml").write_text("val: images/val\nnames: [cat, dog]\n")
    (work / "same.yaml").write_text("train: images/val\nval: images/val\nnames: [cat, dog]\n")
    model = replace(converted, provenance={"source": "nowhere.pt", "options": {"calib": str(work / calib)}})
    (work / "m.safetensors").write_bytes(model_bytes(model))
    done = call("export", "m.safetensors", "--onnx", cwd=work)
    assert done.code == 0, done.err
    assert "m-packed.onnx --data OTHER\n" in done.out
    assert f"OTHER stands for images other than {work / calib}, which calibrated the model.\n" in done.out
    assert "Warning" not in done.err


def test_default_images_of_a_folder_are_those_of_calibration(work, call):
    assert call("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--bits", "4", cwd=work).code == 0
    done = call("eval", "--json", cwd=work)
    assert done.code == 0, done.err
    assert "the calibration images; give --data other images" in json.loads(done.out)["warnings"][0]


def test_models_whose_classes_are_in_another_order_are_not_compared(work, tiny, converted, call):
    head = replace(converted.head, names=("dog", "cat"))
    (work / "q.safetensors").write_bytes(model_bytes(replace(converted, head=head)))
    done = call("eval", "best.pt", "q.safetensors", "--data", "data.yaml", "--imgsz", "64", cwd=work)
    assert done.code == 2
    assert "q.safetensors names its classes in another order than best.pt" in done.err
