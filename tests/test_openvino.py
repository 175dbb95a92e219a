"""The files in OpenVINO: integer convolutions, and the maps of ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SIDE

from dsconvert.export.onnx import export_quantized

openvino = pytest.importorskip("openvino")


def compiled(model: onnx.ModelProto):
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def with_maps(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """The file with the raw detection maps as further outputs."""
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.q", onnx.TensorProto.UINT8, None))
    return model


@pytest.mark.parametrize("layout", ["packed", "blocked", "int8"])
def test_every_convolution_is_int8_and_the_maps_are_onnx_runtimes(widened, picture, layout):
    file = with_maps(export_quantized(widened, layout, SIDE), widened.graph.outputs)
    engine = compiled(file)
    kinds = [
        node.rt_info["runtimePrecision"].value
        for node in engine.get_runtime_model().get_ops()
        if node.rt_info["layerType"].value == "Convolution"
    ]
    assert kinds == ["u8"] * len(widened.convs)
    feed = {"images": picture.numpy()}
    wanted = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[1:]
    found = list(engine(feed).values())[1:]
    for a, b in zip(wanted, found, strict=True):
        # OpenVINO computes SiLU and additions in float between the quantizers: on average less than one activation
        # step apart, as in ONNX Runtime without optimisation; a wrong weight moves the maps by tens of steps
        assert np.abs(a.astype(int) - b).mean() < 1
        assert a.std() > 10  # and there is something to compare
