"""The files in OpenVINO: integer convolutions, and the maps of ONNX Runtime."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE

from dsconvert.export.onnx import export_quantized
from dsconvert.fit.least_squares import fit_weight
from dsconvert.graph.integer import QConv

openvino = pytest.importorskip("openvino")


def compiled(model: onnx.ModelProto):
    core = openvino.Core()
    return core.compile_model(core.read_model(model.SerializeToString()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


def with_maps(model: onnx.ModelProto, names: tuple[str, ...]) -> onnx.ModelProto:
    """The file with the raw detection maps as further outputs."""
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"{name}.q", onnx.TensorProto.UINT8, None))
    return model


def widened(conv: QConv, index: int) -> QConv:
    """DSConv layers at 2, 3, 4, ... 8 bits in turn, every third with z; small enough that no engine saturates."""
    if conv.weight.is_plain_int8:
        return replace(conv, weight=replace(conv.weight, vqk=conv.weight.vqk // 2))
    fitted = fit_weight(conv.weight.weight(), 2 + index % 7, 16)
    shrink = replace(fitted, m=(fitted.m // 2).clamp_min(1), vqk=fitted.vqk // (1 if fitted.bits < 7 else 2))
    room = 63 - int(shrink.merged().int().abs().amax())
    if index % 3 or room < 1:
        return replace(conv, weight=shrink)
    return replace(conv, weight=replace(shrink, z=torch.full_like(shrink.m, room)))


@pytest.mark.parametrize("layout", ["packed", "blocked", "int8"])
def test_every_convolution_is_int8_and_the_maps_are_onnx_runtimes(converted, picture, layout):
    convs = {name: widened(conv, i) for i, (name, conv) in enumerate(converted.convs.items())}
    model = replace(converted, convs=convs)
    assert {c.weight.bits for c in convs.values()} == set(range(2, 9))
    file = with_maps(export_quantized(model, layout, SIDE), model.graph.outputs)
    engine = compiled(file)
    kinds = [
        node.rt_info["runtimePrecision"].value
        for node in engine.get_runtime_model().get_ops()
        if node.rt_info["layerType"].value == "Convolution"
    ]
    assert kinds == ["u8"] * len(convs)
    feed = {"images": picture.numpy()}
    wanted = ort.InferenceSession(file.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, feed)[1:]
    found = list(engine(feed).values())[1:]
    for a, b in zip(wanted, found, strict=True):
        # OpenVINO computes SiLU and additions in float between the quantizers: on average less than one activation
        # step apart, as in ONNX Runtime without optimisation; a wrong weight moves the maps by tens of steps
        assert np.abs(a.astype(int) - b).mean() < 1
        assert a.std() > 10  # and there is something to compare
