"""dsconvert detect as a user types it, for every kind of model file."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import pytest
from conftest import SIDE

from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.model.file import model_bytes
from dsconvert.photos.images import letterbox, read_image, to_tensor
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import DetectOptions, find
from dsconvert.yolo.boxes import non_max_suppression, to_image

PICTURES = [f"{i}.jpg" for i in range(4)]


@pytest.fixture
def models(work, converted):
    """The folder `work` with the tiny network in every kind of file."""
    (work / "q.safetensors").write_bytes(model_bytes(converted))
    for name, ends in {
        "plain": Ends(), "bytes": Ends(input_type="uint8"), "half": Ends(input_type="float16"),
        "nms": Ends(nms=Nms(0.2, 0.45, 1000)),
    }.items():  # fmt: skip
        (work / f"{name}.onnx").write_bytes(
            export_quantized(converted, layout_named("packed"), SIDE, ends).SerializeToString()
        )
    return work


def test_images_labels_and_document_agree_with_each_other(models, call):
    done = call("detect", "q.safetensors", "images", "--save-txt", "--save-conf", "--save-json", "--json", cwd=models)
    assert done.code == 0, done.err
    summary = json.loads(done.out)
    folder = models / "runs/detect/exp"
    assert sorted(p.name for p in folder.iterdir()) == [*PICTURES, "detections.json", "labels"]
    document = json.loads((folder / "detections.json").read_text())
    assert [i["file_name"] for i in document["images"]] == PICTURES
    candidate = load_candidate(models / "q.safetensors", None)
    total = 0
    for number, name in enumerate(PICTURES):
        image = read_image(models / "images/val" / name)
        found = find(candidate.predict, image, SIDE, DetectOptions())
        lines = (folder / "labels" / name.replace(".jpg", ".txt")).read_text().splitlines()
        mine = [a for a in document["annotations"] if a["image_id"] == number]
        assert len(found) == len(lines) == len(mine) == summary["files"][number]["detections"]
        assert [int(line.split()[0]) for line in lines] == found[:, 5].astype(int).tolist()
        np.testing.assert_allclose([float(line.split()[5]) for line in lines], found[:, 4], rtol=1e-5)  # six digits
        drawn = cv2.imread(str(folder / name))
        assert drawn.shape == image.shape
        total += len(found)
    assert summary["detections"] == total > 4
    assert sum(c["detections"] for c in summary["classes"]) == total


def test_every_kind_of_file_finds_the_same(models, call):
    found = {}
    for name in ("q.safetensors", "plain.onnx", "bytes.onnx", "half.onnx", "nms.onnx"):
        done = call("detect", name, "images", "--nosave", "--json", cwd=models)
        assert done.code == 0, done.err
        found[name] = [f["detections"] for f in json.loads(done.out)["files"]]
    assert found["plain.onnx"] == found["bytes.onnx"] == found["half.onnx"] == found["q.safetensors"]
    # in a file that suppresses, a box takes part once for each of its classes
    predict = load_candidate(models / "plain.onnx", None).predict
    for name, count in zip(PICTURES, found["nms.onnx"], strict=True):
        image = read_image(models / "images/val" / name)
        square, box = letterbox(image, SIDE)
        every = non_max_suppression(predict(to_tensor([square]).numpy())[0], 0.25, 0.45, 1000)
        placed = to_image(every, box, image.shape[:2])
        assert count == (placed[:, 3] > placed[:, 1]).sum()
    assert not (models / "runs").exists()
    assert call("detect", "best.pt", "images", "--imgsz", "64", "--nosave", cwd=models).code == 0


def test_classes_and_limits_reach_the_search(models, call):
    def counted(*options: str) -> dict:
        return json.loads(call("detect", "plain.onnx", "images", "--nosave", "--json", *options, cwd=models).out)

    every = counted()
    assert len(every["classes"]) == 2
    for wanted in ("dog", "1"):
        assert counted("--classes", wanted)["classes"] == [c for c in every["classes"] if c["name"] == "dog"]
    assert counted("--max-det", "1")["detections"] == 4
    assert counted("--conf-thres", "0.9")["detections"] < every["detections"]
    assert counted("--agnostic-nms")["detections"] < every["detections"]
    assert counted("--iou-thres", "0.1")["detections"] < every["detections"]


def test_more_than_a_suppressed_file_gives_is_a_warning(models, call):
    assert "--conf-thres 0.2" in call("detect", "nms.onnx", "images", "--nosave", "--conf-thres", "0.1", cwd=models).err
    assert "suppresses" not in call("detect", "nms.onnx", "images", "--nosave", "--max-det", "9", cwd=models).err


def test_unreadable_images_are_skipped_and_counted(models, call):
    (models / "images/val/broken.jpg").write_bytes(b"not a jpeg")
    done = call("detect", "plain.onnx", "images", "--out", "o", "--json", cwd=models)
    assert done.code == 0
    assert [s["path"] for s in json.loads(done.out)["skipped"]] == ["images/val/broken.jpg"]
    assert "1 images were left out" in done.err
    assert "broken.jpg" in done.err
    only = call("detect", "plain.onnx", "images/val/broken.jpg", "--out", "p", cwd=models)
    assert only.code == 2
    assert "None of the 1 images" in only.err
    assert not (models / "p").exists()


def test_nothing_is_overwritten_without_force_and_every_run_has_its_folder(models, call):
    for _ in range(2):
        assert call("detect", "plain.onnx", "images/val/0.jpg", cwd=models).code == 0
    assert (models / "runs/detect/exp2/0.jpg").is_file()
    # the second image is there already, so the first is not written either
    assert call("detect", "plain.onnx", "images/val/1.jpg", "--out", "o", cwd=models).code == 0
    again = call("detect", "plain.onnx", "images", "--out", "o", cwd=models)
    assert again.code == 2
    assert "--force" in again.err
    assert [p.name for p in (models / "o").iterdir()] == ["1.jpg"]
    assert call("detect", "plain.onnx", "images", "--out", "o", "--force", cwd=models).code == 0


def test_the_same_image_twice_is_one_image(models, call):
    done = call("detect", "plain.onnx", "images", "images/val/../val/0.jpg", "--nosave", "--json", cwd=models)
    assert json.loads(done.out)["images"] == 4


def test_hostile_names_command_no_terminal(work, converted, call):
    """A model file of ours with such names is refused, but an ONNX file may come from anywhere."""
    names = ("\x1b]0;owned\x07\nError: no", "[red]dog[/]")
    hostile = replace(converted, head=replace(converted.head, names=names))
    (work / "q.onnx").write_bytes(export_quantized(hostile, layout_named("packed"), SIDE).SerializeToString())
    (work / "images/val/0.jpg").rename(work / "images/val/\x1b[2J.jpg")
    (work / "images/val/1.jpg").rename(work / "images/val/\x1b[3J.jpg")
    (work / "images/val/\x1b[3J.jpg").write_bytes(b"broken")
    done = call("detect", "q.onnx", "images", cwd=work)
    assert done.code == 0, done.err
    assert "\x1b" not in done.out + done.err
    assert "\x07" not in done.out + done.err
    assert r"\x1b]0;owned\x07\x0aError: no" in done.out
    assert "[red]dog[/]" in done.out
    assert r"\x1b[3J.jpg" in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["none.onnx", "images"], "no ONNX file"),
        (["data.yaml", "images"], "not a .pt"),
        (["best.pt", "nowhere"], "no file or folder"),
        (["best.pt"], "Missing argument"),
        (["best.pt", "images", "--save-conf"], "--save-txt"),
        (["best.pt", "images", "--conf-thres", "25"], "must lie in 0..1"),
        (["best.pt", "images", "--imgsz", "65"], "not a multiple"),
        (["best.pt", "images", "--imgsz", "64", "--classes", "cow"], "no class cow"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(work, call, args, words):
    done = call("detect", *args, cwd=work)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert not (work / "runs").exists()
