"""eval, detect and compare of files whose outputs are not YOLOv5's."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import dsconvert
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.onnxfile.presets import INPUT_KEY, Preset, as_text, of_text, presets
from dsconvert.photos.form import InputForm
from dsconvert.scoring.candidates import load_candidate, load_candidates
from dsconvert.scoring.masks import prepared
from dsconvert.scoring.rawcompare import compare_outputs

SIDE = 64


def says(
    path: Path, *outputs: np.ndarray, brightness: bool = False, kind: int = TensorProto.FLOAT, names: str = "",
    imgsz: tuple[int, int] = (SIDE, SIDE),
) -> Path:  # fmt: skip
    """A file that gives these outputs for every image (`brightness`: each times the image's mean)."""
    nodes = [
        helper.make_node("Cast", ["x"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["f"], ["m"], keepdims=0),
        helper.make_node("Mul", ["m", "zero"], ["nothing"]), helper.make_node("Add", ["nothing", "one"], ["always"]),
    ]  # fmt: skip
    stored = [numpy_helper.from_array(np.array(v, np.float32), n) for n, v in (("zero", 0), ("one", 1))]
    made = []
    for i, values in enumerate(outputs):
        stored.append(numpy_helper.from_array(values.astype(np.float32), f"v{i}"))
        nodes.append(helper.make_node("Mul", [f"v{i}", "m" if brightness else "always"], [f"out{i}"]))
        made.append(helper.make_tensor_value_info(f"out{i}", TensorProto.FLOAT, values.shape))
    image = helper.make_tensor_value_info("x", kind, [1, 3, *imgsz])
    graph = helper.make_graph(nodes, "net", [image], made, stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    if names:
        helper.set_model_props(model, {"names": names})
    onnx.save(model, path)
    return path


@pytest.fixture
def photo(tmp_path) -> Path:
    """128 wide, 64 high: a letterbox halves it and puts 16 rows above."""
    cv2.imwrite(str(tmp_path / "a.png"), np.full((64, 128, 3), (30, 20, 10), np.uint8))
    return tmp_path / "a.png"


def columns(nc: int = 2) -> np.ndarray:
    out = np.zeros((1, 4 + nc, 84), np.float32)
    out[0, :5, 3] = 32, 32, 20, 10, 0.9
    return out


def ends() -> np.ndarray:
    out = np.zeros((1, 300, 6), np.float32)
    out[0, 0] = 22, 27, 42, 37, 0.9, 0
    return out


@pytest.mark.parametrize("form", [columns(), columns(80), ends()], ids=["columns", "coco", "ends"])
@pytest.mark.parametrize(
    ("fit", "box"), [("letterbox", [44, 22, 84, 42]), ("corner", [44, 54, 84, 64]), ("stretch", [44, 27, 84, 37])]
)
def test_detect_reads_yolov8s_outputs_and_places_boxes_as_images_were(form, fit, box, photo, call):
    says(photo.parent / "net.onnx", form)
    done = call("detect", "net.onnx", photo, "--fit", fit, "--save-json", "--json", "--out", "d", cwd=photo.parent)
    assert done.code == 0, done.err
    (found,) = json.loads((photo.parent / "d" / "detections.json").read_text())["annotations"]
    x, y, w, h = found["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], box, atol=0.01)
    assert found["score"] == pytest.approx(0.9, abs=1e-5)
    name = "class 0" if form.shape[1] == 6 else "person"
    assert json.loads(done.out)["classes"][0]["name"] == name


@pytest.mark.parametrize(
    ("fit", "box"),
    [
        ("letterbox", [22 / 0.75, 19 / 0.75, 42 / 0.75, 29 / 0.75]),  # three quarters, and 8 rows above
        ("corner", [22 / 0.75, 27 / 0.75, 42 / 0.75, 37 / 0.75]),
        ("stretch", [22 / 0.75, 27, 42 / 0.75, 37]),
        ("crop", [22 + 16, 27, 42 + 16, 37]),  # of 128 columns the 96 in the middle
    ],
)
def test_boxes_of_a_rectangle_are_placed_as_images_were(fit, box, photo, call):
    says(photo.parent / "net.onnx", columns(), imgsz=(64, 96))
    done = call("detect", "net.onnx", photo, "--fit", fit, "--save-json", "--out", "d", cwd=photo.parent)
    assert done.code == 0, done.err
    (found,) = json.loads((photo.parent / "d" / "detections.json").read_text())["annotations"]
    x, y, w, h = found["bbox"]
    np.testing.assert_allclose([x, y, x + w, y + h], box, atol=0.01)


def test_a_rule_tells_the_classes_of_a_rectangle(tmp_path):
    path = says(tmp_path / "net.onnx", np.zeros((1, 126, 7)), imgsz=(64, 96))
    candidate = load_candidate(path, (64, 96), preset=presets()["yolox"])
    assert (candidate.imgsz, candidate.nc) == (Size(64, 96), 2)
    with pytest.raises(InputError, match="was exported for 64x96 pixels"):
        load_candidate(path, 64, preset=presets()["yolox"])


def test_outputs_of_rectangles_are_compared_one_by_one(photo, call):
    says(photo.parent / "net.onnx", np.ones((1, 4)), imgsz=(64, 96))
    done = call("compare", "net.onnx", "net.onnx", photo, "--imgsz", "64", "96", "--json", cwd=photo.parent)
    assert done.code == 0, done.err
    document = json.loads(done.out)
    assert (document["imgsz"], document["outputs"][0]["relative_error"]) == ([64, 96], 0)


def test_eval_reads_them_with_labels(photo, call):
    says(photo.parent / "net.onnx", columns())
    for folder in ("images", "labels"):
        (photo.parent / folder).mkdir()
    photo.rename(photo.parent / "images" / "a.png")
    (photo.parent / "labels" / "a.txt").write_text("0 0.5 0.5 0.3125 0.3125\n")
    (photo.parent / "data.yaml").write_text("path: .\nval: images\nnames: [a, b]\n")
    done = call("eval", "net.onnx", "--data", "data.yaml", "--json", cwd=photo.parent)
    assert done.code == 0, done.err
    assert json.loads(done.out)["models"][0]["map50_95"] == pytest.approx(1)


def test_every_file_sees_its_own_form(photo):
    path = says(photo.parent / "net.onnx", np.ones((1, 4)), brightness=True)
    image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
    for form in (InputForm(fit="stretch"), InputForm(fit="stretch", scale=1), InputForm((0.2,), (0.5,), fit="stretch")):
        candidate = load_candidate(path, None, preset=Preset(form))
        (out,) = candidate.outputs(prepared(candidate.predict, image, SIDE)[0])
        np.testing.assert_allclose(out, form.apply(image, SIDE, SIDE).mean(), rtol=1e-4)


def test_a_file_of_bytes_has_its_scale_within(photo):
    path = says(photo.parent / "net.onnx", np.ones((1, 4)), brightness=True, kind=TensorProto.UINT8)
    image = cv2.cvtColor(cv2.imread(str(photo)), cv2.COLOR_BGR2RGB)
    for scale in (255, 1):
        candidate = load_candidate(path, None, preset=Preset(InputForm(fit="stretch", scale=scale)))
        (out,) = candidate.outputs(prepared(candidate.predict, image, SIDE)[0])
        np.testing.assert_allclose(out, 20, rtol=1e-5)
    with pytest.raises(InputError, match="takes bytes"):
        load_candidate(path, None, preset=Preset(InputForm((0.5,))))


def test_outputs_are_compared_one_by_one(tmp_path):
    a, b = np.array([[3.0, 4, 0]]), np.array([[3.0, 0, 4]])
    first = says(tmp_path / "a.onnx", a, np.zeros((2, 2)), brightness=True)
    second = says(tmp_path / "b.onnx", b, np.ones((2, 2)), brightness=True)
    models = load_candidates([first, second], None)
    images = [np.full((8, 8, 3), v, np.uint8) for v in (255, 51)]
    one, two = compare_outputs(*models, images)
    # by image |b - a|^2 is 32 and 32/25, |a|^2 25 and 1, their product 9 and 9/25
    assert one.shape == (1, 3)
    assert one.relative_error == pytest.approx((32 / 25) ** 0.5)
    assert one.cosine == pytest.approx(9 / 25)
    assert (two.relative_error, two.cosine) == (None, None)


def test_compare_says_in_words_that_outputs_are_no_boxes(photo, call):
    says(photo.parent / "a.onnx", np.array([[3.0, 4]]))
    says(photo.parent / "b.onnx", np.array([[3.0, 5]]))
    done = call("compare", "a.onnx", "b.onnx", photo, cwd=photo.parent)
    assert done.code == 0, done.err
    assert "The outputs are not boxes that can be read, so they are compared as they are." in done.out
    assert "0.2000" in done.out
    refused = call("compare", "a.onnx", "b.onnx", photo, "--min-agreement", "0.9", cwd=photo.parent)
    assert refused.code == 2
    assert "--min-agreement cannot be checked" in refused.err
    with pytest.raises(InputError, match="gives no boxes that can be read"):
        dsconvert.compare(photo.parent / "a.onnx", photo.parent / "b.onnx", photo)
    says(photo.parent / "c.onnx", np.array([[3.0, 5, 1]]))
    other = call("compare", "a.onnx", "c.onnx", photo, cwd=photo.parent)
    assert other.code == 2
    assert "a.onnx has the outputs [1, 2], c.onnx has [1, 3]; they cannot be compared" in other.err
    says(photo.parent / "d.onnx", np.array([[3.0, np.nan]]))
    assert "NaN or infinite numbers" in call("compare", "a.onnx", "d.onnx", photo, cwd=photo.parent).err


def test_a_checkpoint_knows_its_own_input(call, photo):
    from conftest import DEMO

    for command in (("detect", DEMO / "demo.pt", photo), ("eval", DEMO / "demo.pt", "--data", photo.parent),
                    ("compare", DEMO / "demo.pt", DEMO / "demo.pt", photo)):  # fmt: skip
        done = call(*command, "--input", "yolox", cwd=photo.parent)
        assert done.code == 2
        assert "--input and its options are for ONNX files" in done.err


def test_the_api_takes_a_name_too(photo):
    says(photo.parent / "net.onnx", columns(80))
    (found,) = dsconvert.detect(photo.parent / "net.onnx", photo, input="yolov8")
    assert [o.name for o in found.objects] == ["person"]
    assert dsconvert.compare(photo.parent / "net.onnx", photo.parent / "net.onnx", photo, input="yolov8").agreement == 1
    with pytest.raises(InputError, match="input 'nothing' is neither one of yolov5"):
        dsconvert.evaluate(photo.parent / "net.onnx", photo.parent, input="nothing")


def test_what_a_file_notes_of_its_input_is_used(photo, call):
    form = InputForm((0.1, 0.2, 0.3), (0.5, 0.6, 0.7), True, 1, "stretch", 7)
    for preset in (Preset(form, "fastestdet"), Preset(form), Preset()):
        assert of_text(as_text(preset), photo) == preset
    path = says(photo.parent / "net.onnx", np.ones((1, 4)))
    model = onnx.load(path)
    helper.set_model_props(model, {INPUT_KEY: as_text(Preset(form, "yolox"))})
    onnx.save(model, path)
    assert load_candidate(path, None).predict.form == form
    assert load_candidate(path, None, preset=Preset()).predict.form == InputForm()
    for text in ("{", "[]", "{scale: 3}", "x" * 2000, "{decode: nothing}", "{a: &x [], b: *x}"):
        helper.set_model_props(model, {INPUT_KEY: text})
        onnx.save(model, path)
        done = call("detect", path, photo, cwd=photo.parent)
        assert done.code == 2
        assert "does not describe its input readably; give --input" in done.err
