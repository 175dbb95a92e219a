"""The files in OpenVINO: integer convolutions, and the maps of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SIDE

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.ends.decode import Decoded
from dsconvert.export.ends.nms import Nms, add_nms
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named

openvino = pytest.importorskip("openvino")
pytestmark = pytest.mark.long


def compiled(model: onnx.ModelProto):
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def with_maps(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """The file with the raw detection maps as further outputs."""
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.q", onnx.TensorProto.UINT8, None))
    return model


@pytest.mark.parametrize("layout", ["packed", "blocked", "openvino", "int8"])
def test_every_convolution_is_int8_and_the_maps_are_onnx_runtimes(widened, picture, layout):
    file = with_maps(export_quantized(widened, layout_named(layout), SIDE), widened.graph.outputs)
    engine = compiled(file)
    kinds = {
        node.get_friendly_name().split("/")[0]: node.rt_info["runtimePrecision"].value
        for node in engine.get_runtime_model().get_ops()
        if node.rt_info["layerType"].value == "Convolution"
    }
    assert len(kinds) == len(widened.convs)
    # packed hands the image to the first as ONNX Runtime likes it, between the quantizers, which OpenVINO does not see
    assert [name for name, kind in kinds.items() if kind != "u8"] == (["model.0"] if layout == "packed" else [])
    feed = {"images": picture.numpy()}
    wanted = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[1:]
    found = list(engine(feed).values())[1:]
    for a, b in zip(wanted, found, strict=True):
        # OpenVINO computes SiLU and additions in float between the quantizers: on average less than one activation
        # step apart, as in ONNX Runtime without optimisation; a wrong weight moves the maps by tens of steps
        assert np.abs(a.astype(int) - b).mean() < 1
        assert a.std() > 10  # and there is something to compare


def test_suppression_keeps_the_best_though_topk_reorders_equals():
    """Boxes far apart, so that all survive, of three images, the best five of each wanted. OpenVINO's TopK does not
    keep the order of equal values, as ONNX says: sorting by image alone lost the best box."""
    b, parts = OnnxBuilder(13), ["box", "objectness", "classes"]
    b.nodes.append(onnx.helper.make_node("Split", ["predictions", b.shape(4, 1, 2)], parts, axis=2))
    add_nms(b, Decoded(*parts), Nms(0.25, 0.45, 5), "detections")
    model = b.model({"predictions": (3, 16, 7)}, {"detections": ("k", 7)}, {})
    rng = np.random.default_rng(0)
    centre = 20 + 40 * np.stack(np.meshgrid(np.arange(4), np.arange(4)), 2).reshape(1, 16, 2).repeat(3, 0)
    scores = 0.3 + 0.7 * rng.permuted(np.arange(48) / 48).reshape(3, 16, 1)
    rows = np.concatenate([centre, centre * 0 + 10, scores, scores * 0 + 1, scores * 0], 2).astype(np.float32)
    found = next(iter(compiled(model)({"predictions": rows}).values()))
    best = -np.sort(-scores[..., 0], axis=1)[:, :5]
    np.testing.assert_allclose(found[:, [0, 5]], [[i, s] for i in range(3) for s in best[i]], rtol=1e-6)
