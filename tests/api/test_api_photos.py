"""`dsconvert.detect` and `dsconvert.compare`: what the commands of the same names say, as values."""

from __future__ import annotations

import inspect
import json
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from conftest import SIDE, convert, smooth_picture, tiny_network

import dsconvert
from dsconvert.api.models import QuantizedModel
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.photos.images import read_image


@pytest.fixture(scope="module")
def converted() -> DSModel:
    """The tiny network converted, once for all tests here: nothing changes it."""
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture
def models(work, converted, monkeypatch):
    """The folder `work`, now the current one, with the tiny network converted: q.safetensors, packed.onnx, nms.onnx."""
    (work / "q.safetensors").write_bytes(model_bytes(converted))
    for name, ends in {"packed": Ends(), "nms": Ends(nms=Nms(0.2, 0.45, 1000))}.items():
        (work / f"{name}.onnx").write_bytes(
            export_quantized(converted, layout_named("packed"), SIDE, ends).SerializeToString()
        )
    monkeypatch.chdir(work)
    return work


def test_detect_gives_what_the_command_writes(models, converted, call):
    done = call("detect", "packed.onnx", "images", "--save-json", "--nosave", "--out", "o", cwd=models)
    assert done.code == 0, done.err
    document = json.loads((models / "o/detections.json").read_text())
    seen = []
    found = dsconvert.detect("packed.onnx", "images", progress=lambda *step: seen.append(step))
    assert [p.path for p in found] == [Path(f"images/val/{i}.jpg") for i in range(4)]
    assert seen == [("detect", i, 4) for i in range(1, 5)]
    objects = [(i, o) for i, photo in enumerate(found) for o in photo.objects]
    assert len(objects) == len(document["annotations"]) > 4
    for (image, o), wanted in zip(objects, document["annotations"], strict=True):
        assert (image, o.class_number, o.name) == (
            wanted["image_id"], wanted["category_id"], ("cat", "dog")[wanted["category_id"]],
        )  # fmt: skip
        box = [o.x1, o.y1, o.x2 - o.x1, o.y2 - o.y1]
        np.testing.assert_allclose([*box, o.score], [*wanted["bbox"], wanted["score"]], atol=1e-3)
    assert [(p.width, p.height) for p in found] == [(100, 80)] * 4
    in_memory = QuantizedModel(converted)  # the same integers, never written by us
    asked = [p.objects for p in dsconvert.detect(in_memory, "images/val/0.jpg")]
    assert asked == [p.objects for p in dsconvert.detect("q.safetensors", "images/val/0.jpg")]


def test_detect_shows_and_draws(models):
    (photo,) = found = dsconvert.detect("q.safetensors", "images/val/0.jpg")
    scores = [o.score for o in photo.objects]
    assert scores == sorted(scores, reverse=True)
    counts = {name: sum(o.name == name for o in photo.objects) for name in ("cat", "dog")}
    assert all(f"{n} {name}" in repr(found) for name, n in counts.items() if n)
    assert repr(dsconvert.detect("q.safetensors", "images/val/0.jpg", conf_thres=0.999)) == "images/val/0.jpg: nothing"
    plain, drawn = read_image(photo.path), photo.draw(line_thickness=1, labels=False)
    assert drawn.shape == (80, 100, 3)
    best = photo.objects[0]
    row, column = round(min(best.y2, 79)), round((best.x1 + best.x2) / 2)
    assert (drawn[row, column] != plain[row, column]).any()  # the lower edge of its box
    assert len(repr(photo)) < 1000  # no arrays


def test_options_of_detect_reach_the_search(models):
    every = dsconvert.detect("packed.onnx", ["images/val/0.jpg", "images", "images/val/../val/1.jpg"])
    assert len(every) == 4
    assert {o.name for p in every for o in p.objects} == {"cat", "dog"}
    for one in (["dog"], [1]):
        kept = dsconvert.detect("packed.onnx", "images", classes=one)
        assert [[o for o in p.objects if o.name == "dog"] for p in every] == [list(p.objects) for p in kept]
    assert [len(p.objects) for p in dsconvert.detect("packed.onnx", "images", max_det=1)] == [1] * 4
    total = sum(len(p.objects) for p in every)
    for options in ({"conf_thres": 0.9}, {"iou_thres": 0.1}, {"agnostic_nms": True}):
        assert sum(len(p.objects) for p in dsconvert.detect("packed.onnx", "images", **options)) < total
    assert len(dsconvert.detect("best.pt", "images/val/0.jpg", imgsz=32)) == 1


def test_defaults_are_the_commands():
    from dsconvert.commands.cli import cli

    for name, function in (("detect", dsconvert.detect), ("compare", dsconvert.compare)):
        given = inspect.signature(function).parameters
        context = cli.commands[name].make_context(name, ["a", "b", *(["c"] if name == "compare" else [])])
        options = {k: v for k, v in context.params.items() if k in given and k not in ("model", "first", "second")}
        assert {"conf_thres", "iou_thres", "imgsz"} <= set(options)
        assert {k: given[k].default or None for k in options} == {k: v or None for k, v in options.items()}


def test_compare_gives_what_the_command_prints(models, converted, call):
    done = call("compare", "best.pt", "q.safetensors", "images", "--json", cwd=models)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    found = dsconvert.compare("best.pt", QuantizedModel(converted), "images")
    values = asdict(found)
    photos = values.pop("photos")
    assert 0 < found.agreement < 1
    assert values == {name: document[name] for name in values}
    assert [{**p, "path": str(p["path"])} for p in photos] == document["files"]
    assert dsconvert.compare("q.safetensors", "packed.onnx", "data.yaml", samples=2).agreement == 1
    assert f"agreement={found.agreement}" in repr(found)
    assert "photos" not in repr(found)


def test_warnings_point_at_the_caller(models, converted):
    (models / "images/val/broken.jpg").write_bytes(b"not a jpeg")
    renamed = QuantizedModel(replace(converted, head=replace(converted.head, names=("dog", "cat"))))
    for call, said in (
        (lambda: dsconvert.detect("q.safetensors", "images"), "1 images were left out; the first: .*broken.jpg"),
        (lambda: dsconvert.compare("best.pt", "q.safetensors", "images"), "1 images were left out"),
        (lambda: dsconvert.detect("nms.onnx", "images/val/0.jpg", conf_thres=0.1), "only boxes within conf_thres 0.2"),
        (lambda: dsconvert.compare("best.pt", renamed, "images/val/0.jpg"), "name their classes differently"),
    ):
        with pytest.warns(UserWarning, match=said) as caught:
            call()
        assert [w.filename for w in caught] == [__file__] * len(caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dsconvert.detect("nms.onnx", "images/val/0.jpg", conf_thres=0.5)


def test_bad_input_is_one_sentence_in_the_words_of_this_api(models):
    (models / "images/val/broken.jpg").write_bytes(b"not a jpeg")
    for call, said in (
        (lambda: dsconvert.detect("none.onnx", "images"), "no ONNX file at none.onnx"),
        (lambda: dsconvert.detect("packed.onnx", "nowhere"), "no file or folder"),
        (lambda: dsconvert.detect("packed.onnx", []), "There are no images"),
        (lambda: dsconvert.detect("packed.onnx", "images/val/broken.jpg"), "None of the 1 images could be read"),
        (lambda: dsconvert.detect("packed.onnx", "images", classes=["cow"]), "classes: the model has no class cow"),
        (lambda: dsconvert.detect("packed.onnx", "images", conf_thres=25), "conf_thres must lie in 0..1"),
        (lambda: dsconvert.detect("packed.onnx", "images", imgsz=32), "imgsz 32 does not fit it"),
        (lambda: dsconvert.compare("best.pt", "packed.onnx", "images", samples=0), "samples must be at least 1"),
        (lambda: dsconvert.compare("best.pt", "packed.onnx", "images", conf_thres=0.999), "Neither model"),
    ):
        with pytest.raises(dsconvert.InputError, match=said) as caught:
            call()
        assert "--" not in str(caught.value)


def test_a_file_that_suppresses_is_as_sure_as_one_that_does_not(models, converted):
    """What scores less than the file keeps counts for neither: here the best scores of two of the four pictures."""
    best = sorted(photo.objects[0].score for photo in dsconvert.detect("packed.onnx", "images"))
    least = (best[1] + best[2]) / 2
    assert best[1] < least < best[2]
    ends = Ends(nms=Nms(least, 0.45, 1000))
    (models / "sure.onnx").write_bytes(
        export_quantized(converted, layout_named("packed"), SIDE, ends).SerializeToString()
    )
    found = dsconvert.compare("packed.onnx", "sure.onnx", "images")
    # the same integers, decoded in float32 by the same engine
    assert found.mean_best_score_first == pytest.approx((best[2] + best[3]) / 4, abs=1e-6)
    assert found.mean_best_score_second == pytest.approx((best[2] + best[3]) / 4, abs=1e-6)
