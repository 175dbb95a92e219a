"""YOLOv5's segmentation networks: loaded, converted, exported."""

from __future__ import annotations

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import convert, smooth_picture, write_pictures
from pt_writer import yolov5_bytes
from segmentation import MASKS, tiny_segment
from torch.nn import functional as F

from dsconvert.base.errors import CheckError, InputError
from dsconvert.export.check import check_export, check_images, float_reference, reference_of
from dsconvert.export.onnx import PLAIN, export_float, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.integer import run_integer
from dsconvert.graph.run import run_float
from dsconvert.measure.importance import measure_importance
from dsconvert.model.file import load_model, model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode, detection_measure
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.masks import mask_measure
from dsconvert.yolo.plan import choose_convs
from dsconvert.yolo.segment import Proto

COLUMNS = 5 + 2 + MASKS


@pytest.fixture
def segment():
    return tiny_segment()


@pytest.fixture(scope="module")
def model():
    """The network as `convert` makes it."""
    return convert(*tiny_segment(), smooth_picture())


def test_proto_is_its_equation():
    """conv(k 3), nearest upsampling, conv(k 3), conv(k 1), a SiLU behind each; one number a pixel at the end of which
    we know all the parts."""
    proto = Proto(2, 3, 1).eval()
    x = torch.randn(1, 2, 4, 5)
    y = x
    for name, padding in (("cv1", 1), ("cv2", 1), ("cv3", 0)):
        layer = getattr(proto, name)
        assert layer.conv.weight.shape[2] == 1 + 2 * padding
        y = F.silu(F.conv2d(y, layer.conv.weight, padding=padding) / (1 + layer.bn.eps) ** 0.5)
        if name == "cv1":
            y = y.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(proto(x), y)
    assert y.shape == (1, 1, 8, 10)


def test_a_checkpoint_comes_back_as_it_was(segment, picture, tmp_path):
    network, head = segment
    (tmp_path / "seg.pt").write_bytes(yolov5_bytes(network, head))
    loaded = load_checkpoint(tmp_path / "seg.pt")
    assert loaded.head.nm == MASKS
    assert loaded.head.names == head.names
    wanted = network.half().float()(picture)
    for ours, raw in zip(loaded.network(picture), wanted, strict=True):
        torch.testing.assert_close(ours, raw)
    assert [t.shape[1:] for t in wanted] == [(3 * COLUMNS, 16, 16), (3 * COLUMNS, 8, 8), (MASKS, 32, 32)]


def test_hidden_channels_follow_the_width(segment):
    assert segment[0].detect.proto.cv1.conv.out_channels == 24  # 96 * 0.25


@pytest.mark.parametrize("split", [False, True])
def test_decoding_leaves_coefficients_as_they_are(segment, picture, split):
    network, head = segment[0].fused(), segment[1]
    graph, params = lower(network)
    raw = network(picture)
    if split:
        raw = run_float(*split_detect(graph, params, head), picture)
        assert len(raw) == 9
    boxes = decode(raw, head)
    first = network(picture)[0]
    assert boxes.shape == (1, 3 * (16 * 16 + 8 * 8), COLUMNS)
    # box 16 * 16 + 16 * 2 + 3 is the second anchor at row 2, column 3
    place = first[0, COLUMNS : 2 * COLUMNS, 2, 3]
    torch.testing.assert_close(boxes[0, 256 + 35, 7:], place[7:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(boxes[0, 256 + 35, 4:7], place[4:7].sigmoid(), atol=1e-5, rtol=1e-5)


def test_the_prototypes_layers_belong_to_the_head(segment):
    network, head = segment
    graph, _ = split_detect(*lower(network.fused()), head)
    proto = {f"model.8.proto.cv{i}.conv" for i in (1, 2, 3)}
    assert proto <= choose_convs(network, graph, "all", "all")
    assert proto <= choose_convs(network, graph, "head", "all")
    for blocks, scope in (("backbone", "all"), ("all", "c3"), ("7", "all")):
        assert not proto & choose_convs(network, graph, blocks, scope)
    assert not [n for n in choose_convs(network, graph, "all", "all") if n.startswith("model.8.m")]


def test_the_measure_is_the_mean_over_a_boxs_pixels(segment):
    """One box of 4 x 2 pixels of the prototypes, score 0.25: its mask goes from all 0.5 to all 1."""
    _, head = segment
    raw = [torch.zeros(1, 3 * COLUMNS, 16, 16), torch.zeros(1, 3 * COLUMNS, 8, 8), torch.ones(1, MASKS, 32, 32)]
    reference = torch.zeros(1, 960, COLUMNS)
    reference[0, 5] = torch.tensor([20.0, 10, 8, 4, 0.5, 0.2, 0.5, 0, 0, 0, 0])
    before = mask_measure(raw, reference, head)
    raw[0][0, 7, 0, 5] = 100.0  # the first coefficient of the sixth box
    after = mask_measure(raw, reference, head)
    assert int((after != before).sum()) == 8
    assert (after - before).square().sum() == pytest.approx(0.25 * 0.5**2)


def test_every_layer_of_the_prototypes_has_importance(segment, picture):
    network, head = segment
    graph, params = split_detect(*lower(network.fused()), head)
    found = measure_importance(graph, params, [picture], lambda a, b: detection_measure(a, b, head), 0)
    for node in graph.convs():
        assert not found.drawn[node.name].even, node.name


def test_the_model_file_keeps_it(model, picture, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(model_bytes(model))
    loaded = load_model(tmp_path / "m.safetensors")
    assert loaded.head == model.head
    for a, b in zip(
        run_integer(loaded.graph, loaded.convs, loaded.activations, picture),
        run_integer(model.graph, model.convs, model.activations, picture),
        strict=True,
    ):
        assert torch.equal(a, b)


def test_a_model_file_whose_prototypes_are_too_few_is_damaged(model, tmp_path):
    data = model_bytes(model).replace(b'masks\\":4', b'masks\\":3')
    (tmp_path / "m.safetensors").write_bytes(data)
    with pytest.raises(InputError, match="damaged"):
        load_model(tmp_path / "m.safetensors")


@pytest.mark.parametrize("layout", ["packed", "fused", "blocked", "int8"])
def test_every_layout_gives_torchs_numbers(model, picture, layout):
    data = export_quantized(model, layout_named(layout), 64).SerializeToString()
    session = ort.InferenceSession(data)
    assert [(o.name, o.shape) for o in session.get_outputs()] == [
        ("output0", [1, 960, COLUMNS]), ("output1", [1, MASKS, 32, 32]),
    ]  # fmt: skip
    boxes, protos = session.run(None, {"images": picture.numpy()})
    raw = run_integer(model.graph, model.convs, model.activations, picture)
    np.testing.assert_allclose(boxes, decode(raw, model.head).numpy(), rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(protos, raw[-1].numpy())
    check_export(data, reference_of(model, layout_named(layout)), PLAIN, check_images(64))


def test_the_float_file_gives_torchs_numbers(segment, picture):
    network, head = segment
    graph, params = lower(network.fused())
    data = export_float(graph, params, head, 64).SerializeToString()
    boxes, protos = ort.InferenceSession(data).run(None, {"images": picture.numpy()})
    raw = run_float(graph, params, picture)
    np.testing.assert_allclose(boxes, decode(raw, head).numpy(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(protos, raw[-1].numpy(), rtol=1e-4, atol=1e-5)
    check_export(data, float_reference(graph, params, head), PLAIN, check_images(64))


@pytest.mark.parametrize("layout", ["packed", "int8"])
def test_prototypes_of_a_rectangle_have_its_shape(model, layout):
    data = export_quantized(model, layout_named(layout), (32, 96)).SerializeToString()
    shapes = [o.shape for o in ort.InferenceSession(data).get_outputs()]
    assert shapes == [[1, 3 * (8 * 24 + 4 * 12), COLUMNS], [1, MASKS, 16, 48]]
    check_export(data, reference_of(model, layout_named(layout)), PLAIN, check_images((32, 96)))


@pytest.mark.parametrize("output", ["output0", "output1"])
def test_the_check_looks_at_coefficients_and_prototypes(segment, output):
    network, head = segment
    graph, params = lower(network.fused())
    model = export_float(graph, params, head, 64)
    node = next(n for n in model.graph.node if output in n.output)
    mask = np.array([1.0] * 7 + [1.1] * MASKS, np.float32)
    factor = mask if output == "output0" else np.array(1.1, np.float32)
    node.output[0] = "before"
    model.graph.initializer.append(onnx.numpy_helper.from_array(factor, "factor"))
    model.graph.node.append(onnx.helper.make_node("Mul", ["before", "factor"], [output]))
    with pytest.raises(CheckError, match="Detect"):
        check_export(model.SerializeToString(), float_reference(graph, params, head), PLAIN, check_images(64))


def test_weights_alone(segment, picture, tmp_path, call):
    """`--kds float`, layout float: the other way a model runs."""
    network, head = segment
    (tmp_path / "seg.pt").write_bytes(yolov5_bytes(network, head))
    write_pictures(tmp_path)
    answer = call("quantize", "seg.pt", "--calib", "images", "--imgsz", 64, "--activations", "float", "--kds", "float",
                  "--out", "o", "--quiet", cwd=tmp_path)  # fmt: skip
    assert answer.code == 0, answer.err
    assert call("export", "o/model.safetensors", "--onnx", "--layout", "float", cwd=tmp_path).code == 0


def test_the_commands(segment, tmp_path, call):
    network, head = segment
    (tmp_path / "seg.pt").write_bytes(yolov5_bytes(network, head))
    write_pictures(tmp_path)
    answer = call("quantize", "seg.pt", "--calib", "images", "--imgsz", 64, "--out", "o", "--quiet", cwd=tmp_path)
    assert answer.code == 0, answer.err
    model = load_model(tmp_path / "o/model.safetensors")
    for i in (1, 2, 3):
        damage = model.provenance["damage"][f"model.8.proto.cv{i}.conv"]
        assert 0 < damage["8/24"] < damage["2/16"] if i > 1 else damage
    assert all(c.weight.bits == 8 for n, c in model.convs.items() if n.startswith("model.8.m"))
    info = call("info", "o/model.safetensors", cwd=tmp_path)
    assert "model.8.proto.cv2" in info.out
    assert call("info", "seg.pt", cwd=tmp_path).code == 0
    answer = call("export", "o/model.safetensors", "--onnx", "--out", "seg.onnx", cwd=tmp_path)
    assert answer.code == 0, answer.err
    assert call("info", "seg.onnx", cwd=tmp_path).code == 0
    answer = call("export", "o/model.safetensors", "--onnx", "--nms", cwd=tmp_path)
    assert answer.code == 2
    assert "--nms" in answer.err
    answer = call("finetune", "o/model.safetensors", "--data", "data.yaml", cwd=tmp_path)
    assert answer.code == 2
    assert "segmentation" in answer.err


def run_openvino(data: bytes, image: np.ndarray) -> list[np.ndarray]:
    openvino = pytest.importorskip("openvino")
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    compiled = openvino.compile_model(openvino.Core().read_model(data), "CPU", settings)
    return [np.array(value) for value in compiled([image]).values()]


def run_opencv(data: bytes, image: np.ndarray) -> list[np.ndarray]:
    net = cv2.dnn.readNetFromONNX(np.frombuffer(data, np.uint8))
    net.setInput(image)
    return list(net.forward(["output0", "output1"]))


@pytest.mark.parametrize(
    ("run", "layouts"), [(run_openvino, ("packed", "blocked", "openvino", "int8")), (run_opencv, ("int8",))]
)
def test_other_engines_give_the_same(model, picture, run, layouts):
    for layout in layouts:
        data = export_quantized(model, layout_named(layout), 64).SerializeToString()
        wanted = ort.InferenceSession(data).run(None, {"images": picture.numpy()})
        for found, expected in zip(run(data, picture.numpy()), wanted, strict=True):
            assert found.shape == expected.shape
            assert expected.std() > 0.01
            assert np.abs(found - expected).mean() < 0.02 * expected.std()
