"""YOLOv7 networks of one class: their class is never trained, and their score is objectness alone, everywhere."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE, TINY, convert, randomise, smooth_picture
from pt_writer import yolov5_bytes

from dsconvert.export.check import check_export, check_images, float_reference, reference_of
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import PLAIN, Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.model.check import check_model
from dsconvert.model.file import _head, load_model, model_bytes
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.detect import DetectOptions, find
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode, detection_measure
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head, Network, head_from_detect


def network_of(last: str = "IDetect", nc: int = 1, second: str = "Conv") -> tuple[Network, Head]:
    """The tiny network with another head, and perhaps a layer of YOLOv7 in it. Its class scores are 0.3."""
    config = copy.deepcopy(TINY)
    config["head"][-1] = [[7, 4], 1, last, ["nc", "anchors"]]
    if second == "RepConv":
        config["backbone"][1] = [-1, 1, "RepConv", [64, 3, 2]]
    network = Network(config, nc=nc, na=3).eval()
    randomise(network)
    for conv in network.detect.m:
        conv.weight.data.view(3, 5 + nc, -1)[:, 5:] = 0
        conv.bias.data.view(3, 5 + nc)[:, 5:] = float(np.log(0.3 / 0.7))
    for m in getattr(network.detect, "im", ()):
        m.implicit.data.fill_(1.0)
    network.requires_grad_(False)
    names = [f"class {i}" for i in range(nc)]
    return network, head_from_detect(network.detect, [4, 8], names, network.is_yolov7)


@pytest.fixture(scope="module")
def seven() -> tuple[Network, Head]:
    return network_of()


@pytest.fixture(scope="module")
def made(seven):
    network, head = copy.deepcopy(seven)
    return convert(network, head, smooth_picture())


@pytest.mark.parametrize(
    ("last", "nc", "second", "untrained"),
    [
        ("IDetect", 1, "Conv", True),
        ("Detect", 1, "RepConv", True),  # YOLOv7's deployed yamls
        ("Detect", 1, "Conv", False),  # YOLOv5 multiplies, whatever the number of classes
        ("IDetect", 2, "RepConv", False),
    ],
)
def test_checkpoints_say_whose_head_they_have(tmp_path, last, nc, second, untrained):
    network, head = network_of(last, nc, second)
    assert head.class_untrained == untrained
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(network, head))
    assert load_checkpoint(tmp_path / "best.pt").head.class_untrained == untrained
    scores = load_candidate(tmp_path / "best.pt", SIDE).predict(smooth_picture().numpy())[0]
    # 0.3 but for the float16 that a checkpoint stores, and 1 exactly
    np.testing.assert_allclose(scores[:, 5:], 1 if untrained else 0.3, rtol=0 if untrained else 1e-3)


def test_objectness_is_decoded_as_it_is(seven):
    network, head = copy.deepcopy(seven)
    graph, params = lower(network.fused())
    raw = network(smooth_picture())
    plain, own = decode(raw, replace(head, class_untrained=False)), decode(raw, head)
    assert torch.equal(own[..., :5], plain[..., :5])
    assert torch.equal(own[..., 5], torch.ones_like(own[..., 5]))
    split_graph, split_params = split_detect(graph, params, head)
    from dsconvert.graph.run import run_float

    with torch.no_grad():
        split = decode(run_float(split_graph, split_params, smooth_picture()), head)
    assert torch.equal(split[..., 5], own[..., 5])


def test_an_object_of_four_tenths_is_found(tmp_path):
    """Its class would make 0.12 of it, below every usual threshold. In the checkpoint, the model file, and the ONNX
    files of every layout."""
    network, head = network_of()
    for conv in network.detect.m:
        conv.weight.data.view(3, 6, -1)[:, 4] = 0
        conv.bias.data.view(3, 6)[:, 4] = -9.0
        conv.bias.data.view(3, 6)[0, 4] = float(np.log(0.4 / 0.6))
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(network, head))
    model = convert(copy.deepcopy(network), head, smooth_picture())
    (tmp_path / "m.safetensors").write_bytes(model_bytes(model))
    files = ["best.pt", "m.safetensors"]
    for layout in ("packed", "fused", "int8"):
        (tmp_path / f"{layout}.onnx").write_bytes(
            export_quantized(model, layout_named(layout), SIDE).SerializeToString()
        )
        files.append(f"{layout}.onnx")
    ends = Ends(nms=Nms())
    (tmp_path / "nms.onnx").write_bytes(export_quantized(model, layout_named("packed"), SIDE, ends).SerializeToString())
    image = (smooth_picture()[0] * 255).byte().permute(1, 2, 0).numpy()
    for name in [*files, "nms.onnx"]:
        candidate = load_candidate(tmp_path / name, SIDE)
        found = find(candidate.predict, image, SIDE, DetectOptions())
        assert len(found) > 3, name
        # a step of the grid of Detect's outputs
        np.testing.assert_allclose(found[:, 4], 0.4, atol=0.02, err_msg=name)


@pytest.mark.parametrize("layout", ["packed", "fused", "blocked", "int8"])
def test_exported_files_say_one_for_the_class(made, layout):
    """So that readers who multiply, as YOLOv5's scripts do, are right too. `check_export` is what `export` asks."""
    data = export_quantized(made, layout_named(layout), SIDE).SerializeToString()
    check_export(data, reference_of(made, layout_named(layout)), PLAIN, check_images(SIDE))
    if layout != "blocked":  # ONNX Runtime's own 4-bit blocks: the check above ran it
        out = ort.InferenceSession(data).run(None, {"images": smooth_picture().numpy()})[0]
        assert (out[..., 5] == 1).all()
        assert out[..., 4].std() > 0.01


def test_the_float_file_and_suppression_in_the_file(seven):
    network, head = copy.deepcopy(seven)
    graph, params = lower(network.fused())
    reference = float_reference(graph, params, head)
    for ends in (PLAIN, Ends(nms=Nms(0.05, 0.45, 50))):
        data = export_float(graph, params, head, SIDE, ends).SerializeToString()
        check_export(data, reference, ends, check_images(SIDE))
    found = ort.InferenceSession(data).run(None, {"images": smooth_picture().numpy()})[0]
    with torch.no_grad():
        best = float(decode(network(smooth_picture()), head)[0, :, 4].max())
    np.testing.assert_allclose(found[0, 5], best, rtol=1e-4)  # float sums in another order


def test_the_fit_measures_objectness(seven):
    """The class's logit changes nothing, objectness changes the scores as much as it changes."""
    network, head = copy.deepcopy(seven)
    raw = network.fused()(smooth_picture())
    other = [t.clone().unflatten(1, (3, 6)) for t in raw]
    for t in other:
        t[:, :, 5] = 4
    changed = [t.flatten(1, 2) for t in other]
    for a, b in zip(detection_measure(raw, raw, head), detection_measure(changed, raw, head), strict=True):
        assert torch.equal(a, b)
    for scores, t in zip(detection_measure(raw, raw, head)[::3], raw, strict=True):
        assert torch.equal(scores[:, :, 0], t.unflatten(1, (3, 6))[:, :, 4].sigmoid())
    plain = replace(head, class_untrained=False)
    assert not torch.equal(detection_measure(raw, raw, plain)[0], detection_measure(changed, raw, plain)[0])


def test_model_files_remember_it(made, tmp_path):
    (tmp_path / "m.safetensors").write_bytes(model_bytes(made))
    assert load_model(tmp_path / "m.safetensors").head == made.head
    assert made.head.class_untrained
    # files of other networks are as they were
    assert "class_untrained" not in _head(replace(made.head, class_untrained=False))


def test_only_one_class_can_be_untrained(made):
    two = replace(made.head, names=("a", "b"))
    with pytest.raises(ValueError, match="untrained"):
        check_model(replace(made, head=two))


def test_from_the_command_line(seven, work, call):
    """quantize, export and compare; the class has no say in the fit, and nothing divides by that."""
    (work / "best.pt").write_bytes(yolov5_bytes(*seven))
    done = call("quantize", "best.pt", "--calib", "images", "--imgsz", SIDE, "--out", "q", "--quiet", cwd=work)
    assert done.code == 0, done.err
    done = call("export", "q/model.safetensors", "--onnx", "--out", "q.onnx", cwd=work)
    assert done.code == 0, done.err
    for second in ("q/model.safetensors", "q.onnx"):
        done = call("compare", "best.pt", second, "images", "--conf-thres", 0.1, "--json", "--imgsz", SIDE, cwd=work)
        assert done.code == 0, done.err
        found = json.loads(done.out)
        assert abs(found["mean_best_score_first"] - found["mean_best_score_second"]) < 0.03
        assert found["mean_best_score_first"] > 0.3  # more than a class of 0.3 would leave of any objectness
