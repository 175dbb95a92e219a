"""Every family of networks: the published sizes, and from a checkpoint to integers, ONNX files and detections."""

from __future__ import annotations

import copy
import json
from collections import Counter

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import randomise, write_pictures
from fake_trees import trained
from formats import nearest
from tables import P6, SHORT, gflops, meta, parameters, yolov5, yolov7, yolov7_tiny

from dsconvert.base.size import Size
from dsconvert.dsconv.codes import usual_format
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of, integer_step, keeps_grid
from dsconvert.graph.ir import INPUT
from dsconvert.graph.run import run_float
from dsconvert.measure.grids import IMAGE_GRID
from dsconvert.model.model import DSModel
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode
from dsconvert.yolo.lower import lower, split_detect

SIZES = {"n": (0.33, 0.25), "s": (0.33, 0.5), "m": (0.67, 0.75), "l": (1.0, 1.0), "x": (1.33, 1.25)}
P5 = {"n": (1.9, 4.5), "s": (7.2, 16.5), "m": (21.2, 49.0), "l": (46.5, 109.1), "x": (86.7, 205.7)}
P6S = {"n": (3.2, 4.6), "s": (12.6, 16.8), "m": (35.7, 50.0), "l": (76.8, 111.4), "x": (140.7, 209.8)}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [P6[:3] + P6[4:], P6], ids=["P5", "P6"])
def test_yolov5_has_its_published_parameters_and_flops(size, channels):
    """In 10^6, and 10^9 at 640 pixels, of YOLOv5's table of models (which also counts BatchNorm and activations)."""
    millions, billions = (P6S if channels == P6 else P5)[size]
    network = meta(yolov5(*SIZES[size], channels=channels))
    assert parameters(network) / 1e6 == pytest.approx(millions, abs=0.1)
    assert gflops(network) == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("config", "trained", "fused", "billions"),
    [
        # as YOLOv7 prints them: issues 256 (one class) and 504, and of the fused models behind pull request 148
        (yolov7(), 37_622_682, 36_905_341, 104.5),
        (yolov7(1), 37_196_556, None, 103.2),
        (yolov7_tiny(), None, 6_219_709, 13.7),
        (yolov7(detect="Detect"), 37_620_125, 36_905_341, 104.5),
    ],
)
def test_yolov7_has_its_published_parameters_and_flops(config, trained, fused, billions):
    network = meta(config)
    if trained:
        assert parameters(network) == trained
    assert gflops(network) == pytest.approx(billions, abs=0.05)
    if fused:
        assert parameters(network.fused()) == fused


def test_yolov5s_ghost_has_its_published_parameters():
    """3.9 million, of the pull request that added it (4412)."""
    network = meta(yolov5(0.33, 0.5, conv="GhostConv", block="C3Ghost"))
    assert parameters(network) / 1e6 == pytest.approx(3.9, abs=0.05)


# Whole tables, narrow: (model yaml, strides, class Model)
NARROW = {
    "P6": (yolov5(0.33, 0.0625, 2, P6), [8, 16, 32, 64], False),
    "lite, C3SPP": (yolov5(0.2, 0.0625, 2, spp="C3SPP"), [8, 16, 32], True),
    "ghost": (yolov5(0.2, 0.125, 2, conv="GhostConv", block="C3Ghost"), [8, 16, 32], False),
    "attention": (yolov5(0.5, 0.125, 2, deepest="C3TR"), [8, 16, 32], False),
    "YOLOv7-tiny": (yolov7_tiny(2, 0.125), [8, 16, 32], True),
    "YOLOv7": (yolov7(2, 0.0625), [8, 16, 32], True),
}


@pytest.fixture(scope="module", params=NARROW)
def family(request, tmp_path_factory):
    """(name, loaded checkpoint, what gives the stand-in's raw maps of an image)."""
    config, strides, old = NARROW[request.param]
    data, run = trained(config, strides, randomise, old=old)
    path = tmp_path_factory.mktemp("family") / "best.pt"
    path.write_bytes(data)
    return request.param, load_checkpoint(path), run


def image_of(checkpoint, cells: int) -> torch.Tensor:
    """Noise on the 8-bit grid, so many cells of the coarsest map wide."""
    side = cells * checkpoint.head.stride
    return torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)).mul(255).round() / 255


def close(found, wanted, tolerance: float = 1e-5) -> None:
    for a, b in zip(found, wanted, strict=True):
        assert float((a.detach() - b).abs().max()) <= tolerance * float(b.abs().max())


def test_a_checkpoint_gives_its_own_models_maps(family):
    """Loaded, fused (float32 rounding through a hundred layers) and lowered; seven cells show the widest pool."""
    _, checkpoint, run = family
    image, network = image_of(checkpoint, 7), checkpoint.network
    wanted = run(image)
    close(network(image), wanted)
    fused = network.fused()
    close(fused(image), wanted, 1e-4)
    close(run_float(*lower(fused), image), wanted, 1e-4)
    assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in fused.modules())
    assert not [name for name in fused.state_dict() if "implicit" in name or "rbr_1x1" in name]


def quick_model(checkpoint, image) -> DSModel:
    """Integers in a second: 4 bits by least squares, plain int8 first and last, ranges as they are on one image."""
    graph, params = split_detect(*lower(checkpoint.network.fused()), checkpoint.head)
    own: dict[str, QParams] = {}
    run_float(graph, params, image, lambda n, v: own.__setitem__(n, QParams.of_range(float(v.min()), float(v.max()))))
    own = {INPUT: IMAGE_GRID} | {n.name: own[n.name] for n in graph.nodes if not keeps_grid(n.op)}
    grids = grid_of(graph, own)
    convs = {}
    for node in graph.convs():
        p = params[node.name]
        bits = 8 if node.name in (graph.nodes[0].name, *graph.outputs) else 4
        width = usual_format(bits, p.weight.shape[1], 16)
        conv = QConv(nearest(p.weight, width), p.bias)
        convs[node.name] = conv.with_room(grids[node.inputs[0]].scale)
    return DSModel(graph, convs, own, checkpoint.head, Size.of(image.shape[-1]), {})


def session(data: onnx.ModelProto) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 4
    return ort.InferenceSession(data.SerializeToString(), options, providers=["CPUExecutionProvider"])


def test_onnx_computes_the_integers(family):
    """Each layer, given what ONNX Runtime gives it, makes the same integers in torch: all of them, but for SiLU and
    attention, where two libraries' floats may fall to two sides of a tie. All layouts make the same detections."""
    name, checkpoint, _ = family
    image = image_of(checkpoint, 2)
    model = quick_model(checkpoint, image)
    feed = {INPUT: image.numpy()}
    packed = export_quantized(model, layout_named("packed"), model.imgsz)
    exposed = copy.deepcopy(packed)
    names = [o for n in packed.graph.node for o in n.output if o.endswith(".q")]
    exposed.graph.output.extend(onnx.helper.make_tensor_value_info(n, onnx.TensorProto.UINT8, None) for n in names)
    values = session(exposed).run(None, feed)
    got = {n.removesuffix(".q"): torch.from_numpy(v).float() for n, v in zip(names, values[1:], strict=True)}
    grids = grid_of(model.graph, model.activations)
    off: Counter[str] = Counter()
    for node in model.graph.nodes:
        wanted = integer_step(node, [got[x] for x in node.inputs], model.convs, grids)
        difference = (got[node.name] - wanted).abs()
        may_tie = node.attrs.get("kind") == "SiLU" or node.op == "attention"
        assert float(difference.max()) <= may_tie, node.name
        off[node.op] += int((difference > 0).sum())
    assert sum(off.values()) <= 1e-3 * sum(v.numel() for v in got.values())
    if name == "YOLOv7-tiny":
        assert not any(off.values())
    raw = [grids[o].dequantize(got[o]) for o in model.graph.outputs]
    np.testing.assert_allclose(values[0], decode(raw, model.head).numpy(), rtol=1e-5, atol=1e-3)
    for layout in ("blocked", "int8", "fused"):
        out = session(export_quantized(model, layout_named(layout), model.imgsz)).run(None, feed)[0]
        np.testing.assert_allclose(out, values[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("name", SHORT)
def test_the_commands_take_it_all_the_way(name, tmp_path, call):
    """quantize, export, eval and detect as they are typed, on few layers of each kind."""
    config, strides = SHORT[name]
    data, _ = trained(config, strides, randomise, old="7" in name)
    (tmp_path / "best.pt").write_bytes(data)
    write_pictures(tmp_path)
    side = str(2 * max(strides))
    line = ("quantize", "best.pt", "--calib", "images", "--samples", "1", "--bits", "4", "--imgsz", side, "--out", "q")
    done = call(*line, cwd=tmp_path)
    assert done.code == 0, done.err
    done = call("export", "q/model.safetensors", "--onnx", "--out", "best.onnx", cwd=tmp_path)
    assert done.code == 0, done.err
    done = call("eval", "best.pt", "best.onnx", "--data", "data.yaml", "--imgsz", side, "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    rows = json.loads(done.out)["models"]
    assert len(rows) == 2
    assert all(0 <= row["map50_95"] <= 1 for row in rows)
    done = call("detect", "best.onnx", "images", "--conf-thres", "0.01", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    assert len(json.loads(done.out)["files"]) == 4
