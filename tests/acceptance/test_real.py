"""Whole commands on a real COCO yolov5n and a custom best.pt, where ../shared/data has them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import HANGS, SHARED, by_quads

from dsconvert.graph.integer import run_integer
from dsconvert.model.file import load_model
from dsconvert.photos.dataset import read_data_yaml
from dsconvert.photos.images import letterbox, read_image, to_tensor
from dsconvert.yolo.decode import decode

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not SHARED.is_dir(), reason="../shared/data is not on this machine"),
]
COCO = SHARED / "coco" / "coco.yaml"


def dsconvert(*args: str | Path, cwd: Path) -> dict:
    done = subprocess.run(
        [sys.executable, "-m", "dsconvert", *map(str, args), "--json"],
        cwd=cwd, capture_output=True, text=True, timeout=HANGS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def yolov5n(tmp_path_factory) -> Path:
    """A folder in which yolov5n was quantized as the README says, and exported in every layout and as float32."""
    work = tmp_path_factory.mktemp("yolov5n")
    checkpoint = SHARED / "checkpoints" / "yolov5n.pt"
    dsconvert("quantize", checkpoint, "--block-size", "32", "--calib", COCO, cwd=work)
    dsconvert("export", "--onnx", "--out", "packed.onnx", cwd=work)
    dsconvert("export", "--onnx", "--layout", "int8", "--out", "int8.onnx", cwd=work)
    dsconvert("export", checkpoint, "--onnx", "--out", "float32.onnx", cwd=work)
    return work


def session(path: Path, saved: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    if saved:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
        options.optimized_model_filepath = str(saved)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def test_float_row_and_size_and_loss(yolov5n):
    result = dsconvert(
        "eval", SHARED / "checkpoints/yolov5n.pt", "float32.onnx", "packed.onnx", "--data", COCO, cwd=yolov5n
    )
    torch_row, onnx_row, packed = result["models"]
    assert abs(torch_row["map50_95"] - onnx_row["map50_95"]) <= 0.003  # acceptance: 0.3 points
    assert torch_row["map50_95"] > 0.3  # a published 28.0 on all of val2017; these 64 images are easier
    assert packed["size_bytes"] <= 1_200_000
    assert packed["map50_95"] > torch_row["map50_95"] - 0.02  # measured 0.8 points
    assert packed["images"] == 64
    assert 4 < packed["weight_bits"] <= 4.37  # no more than 4 bits everywhere take


def test_torch_packed_and_int8_agree(yolov5n):
    model = load_model(yolov5n / "runs/dsconvert/yolov5n/model.safetensors")
    packed, int8 = session(yolov5n / "packed.onnx"), session(yolov5n / "int8.onnx")
    for path in read_data_yaml(COCO).val[:2]:
        batch = to_tensor([letterbox(read_image(path), 640)[0]])
        a, b = (s.run(None, {"images": batch.numpy()})[0] for s in (packed, int8))
        assert np.array_equal(a, b)
        ours = decode(run_integer(model.graph, model.convs, model.activations, batch), model.head).numpy()
        # One activation step moves a score by at most a quarter of the step's size (the sigmoid's slope) and a
        # centre by half a step of a stride of 32; torch gives the same integers, so only float32 decoding differs.
        np.testing.assert_allclose(a, ours, rtol=1e-5, atol=5e-4)


def test_folded_packed_graph_is_all_qlinearconv_with_the_same_integers(yolov5n, tmp_path):
    model = load_model(yolov5n / "runs/dsconvert/yolov5n/model.safetensors")
    for layout in ("packed", "int8"):
        session(yolov5n / f"{layout}.onnx", tmp_path / layout)
        graph = onnx.load(tmp_path / layout).graph
        weights = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
        convs = [n for n in graph.node if n.op_type == "QLinearConv"]
        assert len(convs) == len(model.convs) == 66  # 57 of the network, Detect's three in three parts each
        assert not [n for n in graph.node if n.op_type in ("Conv", "Cast")]
        for node in convs:
            key = node.name if node.name in model.convs else f"{node.name}.conv"
            wanted, found = model.convs[key].weight.merged().numpy(), weights[node.input[3]]
            if layout == "packed" and key == "model.0.conv":
                wanted = by_quads(wanted)
            if layout == "packed" and len(found) > len(wanted):  # channels of zeros, for a kernel that wants them
                assert not found[len(wanted) :].any()
                found = found[: len(wanted)]
            assert np.array_equal(found, wanted)


def test_head_bottlenecks_alone_lose_under_one_point(tmp_path):
    checkpoint = SHARED / "checkpoints" / "yolov5n.pt"
    dsconvert("quantize", checkpoint, "--blocks", "head", "--scope", "bottleneck", "--bits", "4", "--calib", COCO,
              "--activations", "float", cwd=tmp_path)  # fmt: skip
    rows = dsconvert("eval", "--data", COCO, cwd=tmp_path)["models"]
    assert rows[1]["map50_95"] > rows[0]["map50_95"] - 0.01


def test_custom_checkpoint_without_calibration_images(tmp_path):
    dsconvert(
        "quantize", SHARED / "checkpoints/ppe_best.pt", "--samples", "16", cwd=tmp_path
    )  # 48 take three times as long
    dsconvert("export", "--onnx", cwd=tmp_path)
    folder = tmp_path / "runs/dsconvert/ppe_best"
    model = load_model(folder / "model.safetensors")
    assert model.head.names == ("helmet", "vest")
    out = session(folder / "model-packed.onnx").run(None, {"images": np.zeros((1, 3, 640, 640), np.float32)})[0]
    assert out.shape == (1, 25200, 7)
    assert np.isfinite(out).all()
    rows = dsconvert("eval", "--data", SHARED / "coco/images/val2017", cwd=tmp_path)["models"]
    assert rows[1]["map50"] > 0.85  # agreement with the float model, measured 0.98 on all 192 images
