"""dsconvert compare, and the two limits that turn a measurement into a verdict (exit code 3)."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from pt_writer import yolov5_bytes

from dsconvert.model.file import model_bytes
from dsconvert.yolo.network import Head


@pytest.fixture
def pair(work, converted):
    """The folder `work` with the tiny network at 4 bits beside its checkpoint."""
    (work / "q.safetensors").write_bytes(model_bytes(converted))
    return work


def test_agreement_as_a_table_and_as_json(pair, call):
    same = call("compare", "q.safetensors", "q.safetensors", "images", "--min-agreement", "1", cwd=pair)
    assert same.code == 0, same.err
    assert "(100.0 %)" in same.out
    assert "4 images" in same.out
    done = call("compare", "best.pt", "q.safetensors", "--data", "data.yaml", "--json", cwd=pair)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    counted = [document[k] for k in ("matched", "only_first", "only_second")]
    assert document["agreement"] == counted[0] / sum(counted)
    assert 0 < document["agreement"] < 1
    assert 0.5 <= document["mean_iou"] < 1
    assert abs(document["mean_confidence_shift"]) <= abs(document["largest_confidence_shift"])
    assert [f["path"] for f in document["files"]] == [f"images/val/{i}.jpg" for i in range(4)]
    assert sum(f["only_second"] for f in document["files"]) == document["only_second"]
    assert call("compare", "best.pt", "q.safetensors", "images", "--samples", "2", cwd=pair).out.count("2 images")


def test_too_little_agreement_is_exit_3(pair, call):
    args = ["compare", "best.pt", "q.safetensors", "images", "--json", "--min-agreement"]
    share = json.loads(call(*args, "0", cwd=pair).out)["agreement"]
    for least, code in ((share, 0), (share - 1e-6, 0), (share + 1e-6, 3), ("nan", 3)):
        done = call(*args, str(least), cwd=pair)
        assert done.code == code
        assert json.loads(done.out)["agreement"] == share
    assert done.err == f"Failed: best.pt and q.safetensors agree on {100 * share:.1f} % of the objects, " + (
        "less than --min-agreement nan.\n"
    )


def test_too_large_a_drop_is_exit_3_and_names_the_model(pair, call):
    args = ["eval", "best.pt", "best.pt", "q.safetensors", "--data", "images", "--samples", "2"]
    done = call(*args, "--max-map-drop", "0", cwd=pair)
    assert done.code == 3
    assert "mAP50-95" in done.out  # the table is there all the same
    assert done.err.startswith("Failed: q.safetensors loses ")
    assert done.err.rstrip().endswith("against best.pt, more than --max-map-drop 0.")
    assert call(*args, "--json", "--max-map-drop", "100", cwd=pair).code == 0


def test_a_drop_of_just_the_limit_is_allowed(monkeypatch, pair, call):
    values = {"a.pt": 0.3393, "b.onnx": 0.3343, "c.onnx": 0.5}  # b's drop is 0.5000000000000004 points in binary

    def measured(models, *rest):
        return [
            SimpleNamespace(
                candidate=SimpleNamespace(path=m, batch=1), metrics=SimpleNamespace(map50_95=values[str(m)])
            )
            for m in models
        ]

    monkeypatch.setattr("dsconvert.scoring.contest.evaluate", measured)
    monkeypatch.setattr("dsconvert.commands.evaluate._print_evaluation", lambda rows, quiet: None)
    args = ["eval", *values, "--data", "data.yaml", "--max-map-drop"]
    assert call(*args, "0.5", cwd=pair).code == 0
    done = call(*args, "0.49", cwd=pair)
    sentence = "b.onnx loses 0.50 points of mAP50-95 against a.pt, more than --max-map-drop 0.49."
    assert (done.code, done.err) == (3, f"Failed: {sentence}\n")


def test_unreadable_images_are_left_out_of_both(pair, call):
    (pair / "images/val/1.jpg").write_bytes(b"broken")
    done = call("compare", "q.safetensors", "q.safetensors", "images", "--json", cwd=pair)
    assert (json.loads(done.out)["images"], json.loads(done.out)["skipped"]) == (3, 1)
    assert "1 images were left out" in done.err
    done = call("compare", "q.safetensors", "q.safetensors", "images/val/1.jpg", cwd=pair)
    assert done.code == 2
    assert "None of the 1 images" in done.err


def test_other_classes(pair, tiny, call):
    network, head = tiny
    (pair / "other.pt").write_bytes(yolov5_bytes(network, Head(("dog", "cat"), head.strides, head.anchors)))
    done = call("compare", "best.pt", "other.pt", "images", "--imgsz", "64", cwd=pair)
    assert done.code == 0
    assert "name their classes differently" in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["compare", "best.pt", "q.safetensors"], "compare needs one set of images"),
        (["compare", "best.pt", "q.safetensors", "images", "--data", "data.yaml"], "compare needs one set of images"),
        (["compare", "best.pt", "q.safetensors", "nowhere"], "no file or folder"),
        (["compare", "best.pt", "q.safetensors", "images", "--min-agreement", "90"], "0<=x<=1"),
        (["compare", "best.pt", "q.safetensors", "images", "--conf-thres", "0.9999"], "Neither model"),
        (["eval", "best.pt", "--data", "images", "--max-map-drop", "1"], "another one"),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(pair, call, args, words):
    done = call(*args, cwd=pair)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
