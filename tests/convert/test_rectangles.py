"""Images that are no squares, from the pixels of a photograph to boxes in it."""

from __future__ import annotations

import json
from dataclasses import replace

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from built import HERE
from conftest import convert, smooth_picture
from safetensors import safe_open

import dsconvert
from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.commands.imagesize import join_sizes
from dsconvert.export.check import check_export, check_images, float_reference, reference_of
from dsconvert.export.ends.decode import add_decode
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import LAYOUTS, layout_named
from dsconvert.export.written import Place
from dsconvert.graph.run import run_float
from dsconvert.model.file import load_model, model_bytes
from dsconvert.photos.images import letterbox
from dsconvert.scoring.candidates import load_candidate, load_candidates
from dsconvert.scoring.detect import DetectOptions, find
from dsconvert.scoring.masks import Masks
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Head

SIZES = [(32, 96), (96, 32), (64, 40)]
INT8 = [name for name in HERE if not LAYOUTS[name].real]


def test_a_photo_of_the_same_shape_has_no_grey():
    photo = np.random.default_rng(0).integers(0, 256, (400, 800, 3), dtype=np.uint8)
    made, placed = letterbox(photo, (320, 640))
    assert (placed.gain, placed.pad_x, placed.pad_y) == (0.8, 0, 0)
    np.testing.assert_array_equal(made, cv2.resize(photo, (640, 320), interpolation=cv2.INTER_LINEAR))


@pytest.mark.parametrize(("photo", "gain", "left", "top"), [((64, 64), 1.0, 32, 0), ((32, 128), 1.0, 0, 16),
                                                           ((256, 128), 0.25, 48, 0)])  # fmt: skip
def test_other_photos_have_grey_on_two_sides(photo, gain, left, top):
    made, placed = letterbox(np.full((*photo, 3), 7, np.uint8), (64, 128))
    assert made.shape == (64, 128, 3)
    assert (placed.gain, placed.pad_x, placed.pad_y) == (gain, left, top)
    h, w = round(photo[0] * gain), round(photo[1] * gain)
    assert (made[top : top + h, left : left + w] == 7).all()
    assert (made == 114).sum() == made.size - 3 * h * w


def test_boxes_come_back_to_where_they_are():
    """A photo 100 high and 400 wide in 64 x 128: 0.32 of its size, 16 rows of grey above it."""
    out = np.array([[[64, 32, 32, 16, 1, 1]]], np.float32)
    found = find(lambda batch: out, np.zeros((100, 400, 3), np.uint8), (64, 128), DetectOptions())
    np.testing.assert_allclose(found, [[150, 25, 250, 75, 1, 0]], rtol=1e-5)


def test_a_mask_lies_where_its_box_is():
    """Prototypes 16 x 32 of an input 64 x 128, 1 where x is in the first quarter; the photo fills the input."""
    soft = np.full((1, 16, 32), -50, np.float32)
    soft[:, :, :8] = 50
    _, placed = letterbox(np.zeros((64, 128, 3), np.uint8), (64, 128))
    masks = Masks(np.ones((1, 1), np.float32), soft)
    (mask,) = masks.placed([0], np.array([[0, 0, 128, 64]], np.float32), placed, Size(64, 128), (64, 128))
    assert mask.inside[:, :32].all()
    assert not mask.inside[:, 32:].any()


@pytest.mark.parametrize("size", SIZES)
def test_the_float_file_is_the_network_on_the_whole_rectangle(tiny, size):
    """What the modules make of a rectangle is decoded level by level, and so is the file."""
    network, head = tiny
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    graph, params = lower(network.fused())
    raw = run_float(graph, params, image)
    for found, wanted, stride in zip(raw, network(image), head.strides, strict=True):
        assert found.shape[2:] == (size[0] // stride, size[1] // stride)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-4)
    file = export_float(graph, params, head, size)
    assert shape_of(file.graph.input[0]) == [1, 3, *size]
    running = ort.InferenceSession(file.SerializeToString())
    np.testing.assert_allclose(
        running.run(None, {"images": image.numpy()})[0], decode(raw, head).numpy(), rtol=1e-3, atol=1e-3
    )
    check_export(file.SerializeToString(), float_reference(graph, params, head), Ends(), check_images(size))


def shape_of(value: onnx.ValueInfoProto) -> list[int]:
    return [d.dim_value for d in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("layout", INT8)
def test_every_layout_computes_the_models_integers(converted, layout, size):
    """The check holds the file against torch, layer by layer and box by box."""
    file = export_quantized(converted, layout_named(layout), size)
    assert shape_of(file.graph.input[0]) == [1, 3, *size]
    rows = sum(3 * (size[0] // s) * (size[1] // s) for s in converted.head.strides)
    assert shape_of(file.graph.output[0]) == [1, rows, 7]
    check_export(file.SerializeToString(), reference_of(converted, layout_named(layout)), Ends(), check_images(size))


@pytest.mark.parametrize("ends", [Ends(input_type="uint8", nms=Nms(0.001, 0.45, 50)), Ends(True, "float16")])
def test_other_ends_of_a_rectangle(converted, ends):
    file = export_quantized(converted, layout_named("packed"), (32, 96), ends)
    check_export(
        file.SerializeToString(), reference_of(converted, layout_named("packed")), ends, check_images((32, 96))
    )


def test_maps_of_two_shapes_are_decoded_row_by_row():
    """Strides 4 and 6 of 24 x 36 pixels: maps 6 x 9 and 4 x 6, whose cells come in runs of 6."""
    head = Head(("a", "b"), (4, 6), (((3.0, 5.0), (6.0, 4.0)), ((9.0, 7.0), (8.0, 2.0))))
    raw = [torch.randn(2, 14, *s, generator=torch.Generator().manual_seed(s[0])) for s in ((6, 9), (4, 6))]
    b = OnnxBuilder(21)
    decoded = add_decode(b, [Place("x"), Place("y")], head, Size(24, 36))
    b.node("Concat", decoded.all(), "out", axis=2)
    model = b.model({n: tuple(t.shape) for n, t in zip("xy", raw, strict=True)}, {"out": (2, 156, 7)}, {})
    found = ort.InferenceSession(model.SerializeToString()).run(
        None, {n: t.numpy() for n, t in zip("xy", raw, strict=True)}
    )[0]
    np.testing.assert_allclose(found, decode(raw, head).numpy(), rtol=1e-5, atol=2e-5)
    # the first level's first anchor in row 2, column 7: logit 0 stands for the middle of the cell
    raw[0].zero_()
    at = decode(raw, head)[0, 2 * 9 + 7, :2]
    assert at.tolist() == [(7 + 0.5) * 4, (2 + 0.5) * 4]


def test_a_size_that_does_not_fit_is_refused(converted):
    for size in ((64, 60), (60, 64), (0, 64)):
        with pytest.raises(InputError, match=r"not a multiple|nor a height and width"):
            export_quantized(converted, layout_named("packed"), size)


def header_of(path) -> dict:
    with safe_open(path, framework="numpy") as stored:
        return json.loads(stored.metadata()["dsconvert"])


def test_the_model_file_has_one_number_of_a_square_and_two_of_a_rectangle(converted, tmp_path):
    for size, wanted in ((64, 64), ((32, 96), [32, 96])):
        path = tmp_path / "m.safetensors"
        path.write_bytes(model_bytes(replace(converted, imgsz=Size.of(size))))
        assert header_of(path)["imgsz"] == wanted
        assert load_model(path).imgsz == Size.of(size)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> object:
    from conftest import tiny_network, write_work

    folder = write_work(tmp_path_factory.mktemp("rectangle"), tiny_network(), 4)
    small = convert(*tiny_network(), smooth_picture())
    (folder / "m.safetensors").write_bytes(model_bytes(replace(small, imgsz=Size(32, 96))))
    return folder


def test_files_are_measured_at_the_size_they_were_made_for(model):
    path = model / "m.safetensors"
    assert dsconvert.load(path).imgsz == (32, 96)
    assert load_candidate(path, None).imgsz == Size(32, 96)
    assert load_candidate(path, (64, 32)).imgsz == Size(64, 32)
    file = dsconvert.load(path).export(model / "m.onnx")
    assert [c.imgsz for c in load_candidates([model / "best.pt", path, file], None)] == [Size(32, 96)] * 3
    with pytest.raises(InputError, match="was exported for 32x96 pixels; imgsz 96 does not fit it"):
        load_candidate(file, 96)
    other = dsconvert.load(path).export(model / "o.onnx", imgsz=64)
    with pytest.raises(InputError, match="different image sizes, 32x96, 64; give imgsz"):
        load_candidates([file, other], None)


@pytest.mark.parametrize("text", [("32", "96"), ("32x96",), ("32,96",)])
def test_quantize_to_bench_on_the_command_line(work, call, text):
    done = call("quantize", "best.pt", "--imgsz", *text, "--calib", "images", "--bits", "4", "--samples", "4",
                "--out", "q", "--json", cwd=work)  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["provenance"]["options"]["imgsz"] == [32, 96]
    assert header_of(work / "q/model.safetensors")["imgsz"] == [32, 96]
    if len(text) == 1:
        return
    commands = [
        ("export", "q/model.safetensors", "--out", "q.onnx"),
        ("export", "best.pt", "--imgsz", *text, "--out", "f.onnx"),
        ("eval", "best.pt", "q/model.safetensors", "q.onnx", "--data", "data.yaml"),
        ("eval", "best.pt", "--imgsz", *text, "--data", "data.yaml"),
        ("detect", "--imgsz", *text, "best.pt", "images", "--conf-thres", "0.01", "--json", "--out", "d"),
        ("compare", "best.pt", "f.onnx", "--imgsz", *text, "images", "--conf-thres", "0.01", "--json"),
        ("bench", "--imgsz", *text, "q.onnx", "--runs", "2", "--threads", "1", "--json"),
        ("finetune", "q/model.safetensors", "--data", "train.yaml", "--epochs", "1", "--batch", "2", "--out", "t"),
    ]  # fmt: skip
    report = ("report", "q/model.safetensors", "--data", "data.yaml", "--no-latency", "--out", "r.html")
    told = {}
    (work / "train.yaml").write_text("path: .\ntrain: images/val\nval: images/val\nnames: [cat, dog]\n")
    for command in commands:
        done = call(*command, *([] if "--json" in command else ["--quiet"] * (command[0] != "export")), cwd=work)
        assert done.code == 0, (command, done.err)
        told[command[0]] = done.out
    assert [json.loads(told[name])["imgsz"] for name in ("detect", "compare")] == [[32, 96], [32, 96]]
    assert load_model(work / "t/model.safetensors").imgsz == Size(32, 96)
    assert json.loads(told["compare"])["agreement"] == 1
    done = call(*report, cwd=work)
    assert done.code == 0, done.err
    page = (work / "r.html").read_text()
    assert "at 32x96 pixels" in page
    assert "[32, 96]" not in page


def test_synthesised_images_and_the_api(work, monkeypatch):
    monkeypatch.chdir(work)
    q = dsconvert.quantize("best.pt", imgsz=(32, 96), samples=4, bits=4, finetune_steps=0)
    assert q.imgsz == (32, 96)
    assert "imgsz=(32, 96)" in q.model.provenance["command"]
    assert len(dsconvert.detect(q, "images")) == len(dsconvert.detect("best.pt", "images", imgsz=(32, 96)))
    with pytest.raises(InputError, match="imgsz 36x96 must be a multiple of the model's stride 8, and at most 4096"):
        dsconvert.quantize("best.pt", "images", imgsz=(36, 96))
    for wrong in ((32, 96, 3), "96", 1.5):
        with pytest.raises(InputError, match="nor a height and width"):
            dsconvert.quantize("best.pt", "images", imgsz=wrong)


NAMED, VALUED = {"--imgsz", "--img"}, {"--imgsz", "--img", "--out", "--source"}


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("--imgsz 384 640 m.onnx", "--imgsz 384x640 m.onnx"),
        ("m.onnx --img 384 640", "m.onnx --img 384x640"),
        ("--imgsz 640 m.onnx 640", "--imgsz 640 m.onnx 640"),
        ("m.onnx --imgsz 640 0", "m.onnx --imgsz 640 0"),  # a webcam
        ("m.onnx --imgsz 640 --conf 640", "m.onnx --imgsz 640 --conf 640"),
        ("--imgsz 384x640 640", "--imgsz 384x640 640"),
        ("--imgsz=384 640", "--imgsz=384 640"),
        ("--out --imgsz 384 640", "--out --imgsz 384 640"),
        ("--imgsz 384 640 640", "--imgsz 384x640 640"),
        ("-- --imgsz 384 640", "-- --imgsz 384 640"),
        ("--imgsz", "--imgsz"),
    ],
)
def test_a_second_number_belongs_to_the_size_where_it_can_be_a_width(line, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert " ".join(join_sizes(line.split(), NAMED, VALUED)) == wanted


def test_a_file_of_that_name_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "640").write_bytes(b"")
    assert join_sizes(["--imgsz", "384", "640"], NAMED, VALUED) == ["--imgsz", "384", "640"]


@pytest.mark.parametrize("text", ["64.5", "0", "-64", "64x", "64x96x3", "wide"])
def test_what_is_no_size_is_said_in_a_sentence(work, call, text):
    done = call("eval", "best.pt", "--data", "data.yaml", f"--imgsz={text}", cwd=work)
    assert done.code == 2
    assert f"'{text}' is not a size such as 640, or 384x640 (height and width)." in done.err


def test_classes_and_sizes_in_one_line(work, call):
    done = call("detect", "best.pt", "--classes", "0", "1", "--imgsz", "32", "96", "images/val", "--json", "--nosave",
                cwd=work)  # fmt: skip
    assert done.code == 0, done.err
    assert json.loads(done.out)["imgsz"] == [32, 96]
