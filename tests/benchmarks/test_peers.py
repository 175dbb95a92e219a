"""What others make of a float file: each by its own way, on the images that `quantize` takes."""

from __future__ import annotations

import sys

import cv2
import numpy as np
import onnx
import pytest
from conftest import ROOT

from dsconvert.export.onnx import export_float
from dsconvert.yolo.lower import lower

sys.path.insert(0, str(ROOT / "benchmarks"))

import peers

SIDE = 64


@pytest.fixture
def float_file(tmp_path, tiny):
    network, head = tiny
    path = tmp_path / "float32.onnx"
    path.write_bytes(export_float(*lower(network.fused()), head, SIDE).SerializeToString())
    return path


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        noise = np.random.default_rng(i).integers(0, 256, (40, SIDE, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), noise)
    (folder / "5.png").write_bytes(b"no image")
    return folder


def quantized(path) -> list[onnx.NodeProto]:
    """Convolutions whose weights are integers."""
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    return [n for n in graph.node if n.op_type == "Conv" and made[n.input[1]].op_type == "DequantizeLinear"]


def test_peers_get_the_images_that_quantize_takes(images):
    """Spread over the whole list, letterboxed with grey, one at a time; files that are no images are left out."""
    found = peers.decoded(images, SIDE, 3)
    assert [image.shape for image in found] == [(1, 3, SIDE, SIDE)] * 3
    expected = [cv2.imread(str(images / f"{i}.png"))[..., ::-1].transpose(2, 0, 1) / np.float32(255) for i in (0, 2, 4)]
    for image, picture in zip(found, expected, strict=True):
        np.testing.assert_allclose(image[0, :, 12:52], picture, atol=1e-6)  # (64 - 40) / 2 rows of margin
        np.testing.assert_allclose(image[0, :, :12], 114 / 255, atol=1e-6)
    assert len(peers.decoded(images, SIDE, 100)) == 5


def scales(path) -> list[int]:
    """How many scales the weights of each such convolution have."""
    graph = onnx.load(path).graph
    made = {name: node for node in graph.node for name in node.output}
    size = {t.name: int(np.prod(t.dims)) for t in graph.initializer}
    return [size[made[n.input[1]].input[1]] for n in quantized(path)]


def test_ultralytics_way_is_static_on_every_convolution_with_one_scale_a_layer(tmp_path, float_file, images):
    ours, rival = tmp_path / "ultralytics.onnx", tmp_path / "static.onnx"
    peers.ultralytics_int8(float_file, ours, peers.decoded(images, SIDE, 3))
    peers.ort_static(float_file, rival, peers.decoded(images, SIDE, 3), convs_only=True)
    convs = sum(n.op_type == "Conv" for n in onnx.load(float_file).graph.node)
    assert scales(ours) == [1] * convs  # Detect's too
    assert len(scales(rival)) == convs
    assert all(count > 1 for count in scales(rival))  # one a channel
    for path, kind in ((ours, onnx.TensorProto.INT8), (rival, onnx.TensorProto.UINT8)):
        graph = onnx.load(path).graph
        zeros = {t.name: t.data_type for t in graph.initializer}
        assert {zeros[n.input[2]] for n in graph.node if n.op_type == "QuantizeLinear"} == {kind}  # of activations
        # the decoding's arithmetic is float, up to the output
        last = next(n for n in graph.node if "output0" in n.output)
        assert last.op_type not in {"DequantizeLinear", "QuantizeLinear"}
    assert not list(tmp_path.glob("*.src.onnx"))


def test_mnn_runs_the_same_network_and_low_bits_make_its_file_smaller(tmp_path, float_file, images):
    pytest.importorskip("MNN")
    image = peers.decoded(images, SIDE, 1)[0]
    expected = peers.ort_predictor(float_file, exact=True)(image)
    found, size = {}, {}
    for bits in (None, 4, 3):
        path = tmp_path / f"{bits}.mnn"
        peers.mnn_convert(float_file, path, bits)
        found[bits], size[bits] = peers.mnn_predictor(path, 1)(image), path.stat().st_size
        assert found[bits].shape == expected.shape
    # boxes reach 64: float32 with other orders of operations differs in the fifth digit
    np.testing.assert_allclose(found[None], expected, atol=64e-4)
    assert size[3] < size[4] < size[None]
    off = {bits: np.abs(found[bits] - expected).mean() for bits in (4, 3)}
    assert off[3] > off[4] > np.abs(found[None] - expected).mean()


def test_mnn_is_asked_without_its_command_which_installs_packages(tmp_path, float_file):
    pytest.importorskip("MNN")
    assert "MNN.tools" not in peers.MNN_CONVERT
    (tmp_path / "old.mnn").write_bytes(b"of an earlier run")
    with pytest.raises(SystemExit, match="MNN made no file"):
        peers.mnn_convert(tmp_path / "none.onnx", tmp_path / "old.mnn", 4)


def test_openvino_runs_float_in_what_it_is_told(float_file, images):
    pytest.importorskip("openvino")
    image = peers.decoded(images, SIDE, 1)[0]
    model, used = peers.openvino_model(float_file, "f32", 1)
    assert used == "f32"
    expected = peers.ort_predictor(float_file, exact=True)(image)
    # boxes reach 64: float32 with other orders of operations differs in the fifth digit; bfloat16 in the third
    np.testing.assert_allclose(model([image])[0], expected, atol=64e-4)
    assert peers.openvino_model(float_file, None, 1)[1] in {"f32", "bf16", "f16"}


def test_the_accuracy_table_has_every_peer_by_its_file(tmp_path, float_file, images):
    for name in ("MNN", "openvino", "nncf"):
        pytest.importorskip(name)
    import accuracy

    image = peers.decoded(images, SIDE, 2)
    rows = accuracy.peer_rows(float_file, image, tmp_path)
    names = [row.name for row in rows if "as it runs on this CPU" not in row.name]
    assert names == [
        "ONNX Runtime int8, convolutions only, exact products", "ONNX Runtime int8, exact products",
        "Ultralytics' way of int8 ONNX, exact products", "OpenVINO NNCF int8",
        "MNN, 4-bit weights", "MNN, 3-bit weights",
    ]  # fmt: skip
    expected = peers.ort_predictor(float_file, exact=True)(image[0])
    for row in rows:
        assert row.path.stat().st_size > 0
        assert row.predict(image[0]).shape == expected.shape
    assert all(row.seconds is None for row in accuracy.peer_rows(float_file, image, tmp_path))  # kept, not made again
