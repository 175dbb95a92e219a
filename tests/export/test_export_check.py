"""The check before a file is written: what is right passes, what is wrong is named."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace

import cv2
import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE, convert, smooth_picture, tiny_network
from formats import free
from onnx import numpy_helper

from dsconvert.base.errors import CheckError
from dsconvert.base.size import Size
from dsconvert.commands import cli
from dsconvert.convert import exporting
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export import check
from dsconvert.export.check import check_accumulators, check_export, check_images, float_reference, reference_of
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends, export_float, export_quantized, in_layout, write_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.integer import QConv, grid_of
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.yolo.lower import lower

PLAIN, IMAGES = Ends(), check_images(SIDE)


@pytest.fixture(scope="module")
def converted() -> DSModel:
    """One for all tests here: none changes it."""
    return convert(*tiny_network(), smooth_picture())


def conv_of(weight: torch.Tensor, bias: float = 0.0) -> QConv:
    cho, chi = weight.shape[:2]
    tensor = DSTensor(weight.to(torch.int8), torch.ones(cho, 1, *weight.shape[2:], dtype=torch.int8),
                      torch.full((cho,), 0.01), free(8, chi))  # fmt: skip
    return QConv(tensor, torch.full((cho,), bias))


# --- the proof ------------------------------------------------------------------------------------------------------


def test_no_input_reaches_beyond_the_bound_and_some_reach_it():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (6, 3, 2, 2), generator=generator)
    conv = conv_of(weight, bias=-3.7)
    bound = conv.largest_sum(0.05)
    assert bound.dtype == torch.int64
    bias = conv.bias_int(0.05).long()
    for zero_point in (0, 77, 255):
        for sign in (1, -1):  # the image that drives every channel's sum furthest up, then down
            q = torch.where(sign * weight > 0, 255, 0)
            sums = ((q - zero_point) * weight).sum((1, 2, 3)) + bias
            assert bool((sums.abs() <= bound).all())
    ones = conv_of(torch.full((1, 3, 2, 2), -127), bias=-1.0)
    assert ones.largest_sum(0.05).item() == 255 * 127 * 12 + 2000  # bias 1 / (0.05 * 0.01)
    assert ones.largest_sum(0.05).item() == -(255 * -127 * 12 - 2000)


def test_the_bound_does_not_overflow_itself():
    wide = conv_of(torch.full((1, 70000, 1, 1), 127))
    assert wide.largest_sum(1.0).item() == 255 * 127 * 70000 > 1 << 31


def test_a_layer_that_could_overflow_is_named(converted):
    check_accumulators(converted)
    name = converted.graph.convs()[3].name
    huge = replace(converted.convs[name], bias=converted.convs[name].bias + 1e9)
    with pytest.raises(CheckError, match=f"layer {name.removesuffix('.conv')} can reach"):
        check_accumulators(replace(converted, convs={**converted.convs, name: huge}))
    check_accumulators(replace(converted, activations={}, convs={**converted.convs, name: huge}))  # no integers there


# --- the trial ------------------------------------------------------------------------------------------------------

ENDS = (
    PLAIN,
    Ends(dynamic_batch=True),
    Ends(input_type="uint8"),
    Ends(input_type="float16"),
    Ends(nms=Nms(0.2, 0.5, 9)),
)


@pytest.mark.parametrize("layout", ["packed", "fused", "blocked", "openvino", "int8"])
@pytest.mark.parametrize("ends", ENDS)
def test_right_files_pass(converted, layout, ends):
    data = export_quantized(converted, layout_named(layout), SIDE, ends).SerializeToString()
    check_export(data, reference_of(converted, layout_named(layout)), ends, IMAGES)


@pytest.mark.parametrize("ends", ENDS)
def test_right_float_files_pass(tiny, converted, ends):
    network, head = tiny
    graph, params = lower(network.fused())
    data = export_float(graph, params, head, SIDE, ends).SerializeToString()
    check_export(data, float_reference(graph, params, head), ends, IMAGES)
    weights_only = replace(converted, activations={})
    data = export_quantized(weights_only, layout_named("packed"), SIDE, ends).SerializeToString()
    check_export(data, reference_of(weights_only, layout_named("packed")), ends, IMAGES)


@pytest.mark.parametrize("layout", ["packed", "fused", "blocked", "openvino", "int8"])
def test_all_maps_on_a_grid_have_a_place_in_the_file(converted, layout):
    """What has none is not looked at."""
    written = write_quantized(converted, layout_named(layout), SIDE)
    own = in_layout(converted, layout_named(layout)).activations
    assert written.places.keys() == grid_of(converted.graph, own).keys()
    made = {out for node in written.model.graph.node for out in node.output}
    assert made.issuperset(place.name for place in written.places.values())
    assert all(place.last == (layout == "fused") for place in written.places.values() if place.name != "images.q")


def tampered(model: onnx.ModelProto, name: str, change) -> onnx.ModelProto:
    """The file with one initializer changed."""
    made = onnx.ModelProto()
    made.CopyFrom(model)
    stored = next(t for t in made.graph.initializer if t.name == name)
    stored.CopyFrom(numpy_helper.from_array(change(numpy_helper.to_array(stored)), name))
    return made


WRONG = {
    "zeroed weights": ("vqk", lambda a: a * np.array(0, a.dtype)),
    "other multipliers": ("kds", lambda a: a * 0 + 0x11),  # 1, two a byte
    "another scale": ("cds", lambda a: a * np.float32(1.5)),
}


@pytest.mark.parametrize("what", WRONG)
@pytest.mark.parametrize("layer", ["model.2.m.0.cv1", "model.7.cv3"])
@pytest.mark.parametrize("ends", [PLAIN, Ends(input_type="uint8", nms=Nms())])
def test_the_wrong_layer_is_named(converted, what, layer, ends):
    part, change = WRONG[what]
    file = tampered(export_quantized(converted, layout_named("packed"), SIDE, ends), f"{layer}.{part}", change)
    with pytest.raises(CheckError, match=f"at layer {layer},"):
        check_export(file.SerializeToString(), reference_of(converted, layout_named("packed")), ends, IMAGES)


def test_negative_weights_lost_by_an_engine_are_noticed(converted):
    """As in onnxruntime #28491, where an optimisation zeroed them."""
    file = export_quantized(converted, layout_named("int8"), SIDE)
    file = tampered(file, "model.1.weight", lambda a: np.maximum(a, 0))
    with pytest.raises(CheckError, match=r"at layer model\.1,"):
        check_export(file.SerializeToString(), reference_of(converted, layout_named("int8")), PLAIN, IMAGES)


def test_a_wrong_activation_behind_what_has_no_grid_is_named(converted):
    """Layout openvino has no integers before its activations: these are held against torch's of the convolution's."""
    file = export_quantized(converted, layout_named("openvino"), SIDE)
    gate = next(node for node in file.graph.node if node.op_type == "Sigmoid" and node.output[0].startswith("model.1."))
    gate.op_type = "Tanh"
    with pytest.raises(CheckError, match=r"at layer model\.1\.act,"):
        check_export(file.SerializeToString(), reference_of(converted, layout_named("openvino")), PLAIN, IMAGES)


def test_a_wrong_operator_of_a_float_file_is_named(tiny):
    """What it stores is right, so only the trial can tell."""
    network, head = tiny
    graph, params = lower(network.fused())
    file = export_float(graph, params, head, SIDE)
    gate = next(node for node in file.graph.node if node.op_type == "Sigmoid" and node.output[0].startswith("model.1."))
    gate.op_type = "Tanh"
    with pytest.raises(CheckError, match=r"at layer model\.1\.act,"):
        check_export(file.SerializeToString(), float_reference(graph, params, head), PLAIN, IMAGES)


def test_a_wrong_float_layer_and_a_wrong_tail_are_named(tiny, converted):
    network, head = tiny
    graph, params = lower(network.fused())
    file = tampered(export_float(graph, params, head, SIDE), "model.4.cv2.weight", lambda a: a * np.float32(1.1))
    with pytest.raises(CheckError, match=r"at layer model\.4\.cv2,"):
        check_export(file.SerializeToString(), float_reference(graph, params, head), PLAIN, IMAGES)
    moved = replace(converted.head, anchors=tuple(tuple((w * 2, h) for w, h in level) for level in head.anchors))
    other = export_quantized(replace(converted, head=moved), layout_named("packed"), SIDE)
    with pytest.raises(CheckError, match="at layer Detect,"):
        check_export(other.SerializeToString(), reference_of(converted, layout_named("packed")), PLAIN, IMAGES)


def test_an_engine_that_rounds_otherwise_passes(converted, monkeypatch):
    """Without optimisation ONNX Runtime computes in float between the quantizers: other ties, same network."""

    def unoptimised(data: bytes) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        return ort.InferenceSession(data, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(check, "_session", unoptimised)
    for images in ([IMAGES[0]], [np.ascontiguousarray(IMAGES[0][:, ::-1])]):
        data = export_quantized(converted, layout_named("packed"), SIDE).SerializeToString()
        check_export(data, reference_of(converted, layout_named("packed")), PLAIN, images)


def test_what_cannot_be_loaded_or_run_is_said(converted):
    data = export_quantized(converted, layout_named("packed"), SIDE).SerializeToString()
    with pytest.raises(CheckError, match="cannot load"):
        check_export(data[:-500], reference_of(converted, layout_named("packed")), PLAIN, IMAGES)
    with pytest.raises(CheckError, match="fails on"):
        check_export(data, reference_of(converted, layout_named("packed")), Ends(input_type="uint8"), IMAGES)


def test_nan_is_never_close():
    a = np.zeros((1, 4, 7), np.float32)
    for column in (1, 4, 6):
        b = a.copy()
        b[0, 2, column] = np.nan
        assert not check._close(check._compared([b], [a], 2, 64), 1e-5, 1e-6)
    assert check._close(check._compared([a], [a], 2, 64), 0, 0)
    assert not check._close(check._compared([a], [a, a], 2, 64), 0, 0)  # an output too few


def test_boxes_scores_and_mask_coefficients_are_compared_each_by_itself():
    """Two classes and three coefficients: 4 of a box, 2 scores, objectness and the classes, 3 coefficients."""
    boxes, protos = np.ones((1, 6, 5 + 2 + 3), np.float32), np.ones((1, 3, 8, 8), np.float32)
    pairs = check._compared([boxes, protos], [boxes, protos], 2, 64)
    assert pairs is not None
    assert [found.shape for found, _ in pairs] == [(1, 6, 4), (1, 6, 2), (1, 6, 3), (1, 6, 3), (1, 3, 8, 8)]


def test_images_are_deterministic_and_use_the_range():
    first, again = check_images(96)[0], check_images(96)[0]
    assert first.shape == (3, 96, 96)
    assert first.dtype == np.uint8
    assert np.array_equal(first, again)
    assert first.min() < 40
    assert first.max() > 215
    assert len(check_images(96, [first])) == 2


# --- the command ----------------------------------------------------------------------------------------------------


def run(folder, *args: str) -> tuple[int, str]:
    """The command line in this process: exit code and stderr."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv, code = ["dsconvert", *args], 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = argv
    return code, err.getvalue()


def test_export_refuses_with_exit_1_and_writes_nothing(converted, tmp_path, monkeypatch):
    picture = cv2.resize(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8), (90, 70))
    cv2.imwrite(str(tmp_path / "a.jpg"), picture)
    options = {"source": "best.pt", "options": {"calib": str(tmp_path)}}
    (tmp_path / "m.safetensors").write_bytes(model_bytes(replace(converted, provenance=options)))
    tried = []
    monkeypatch.setattr(exporting, "check_export", lambda *args: (tried.append(len(args[3])), check_export(*args)))
    assert run(tmp_path, "export", "m.safetensors", "--onnx", "--out", "good.onnx") == (0, "")
    assert tried == [2]  # the calibration image and the drawn one
    monkeypatch.setattr(
        exporting, "export_quantized",
        lambda *args: tampered(export_quantized(*args), "model.1.cds", lambda a: a * np.float32(2)),
    )  # fmt: skip
    code, err = run(tmp_path, "export", "m.safetensors", "--onnx")
    assert code == 1
    assert err == (
        "Error: The exported file computes something else than it should at layer model.1, so it was not written; "
        "please report it.\n"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.jpg", "good.onnx", "m.safetensors"]
    assert run(tmp_path, "export", "m.safetensors", "--onnx", "--no-check") == (0, "")
    assert (tmp_path / "m-packed.onnx").is_file()


def test_calibration_images_that_are_gone_are_done_without(converted, tmp_path):
    for calib in (None, str(tmp_path / "gone"), str(tmp_path)):
        model = replace(converted, provenance={"options": {"calib": calib}})
        assert exporting.first_calibration_image(model, Size.of(SIDE)) == []
