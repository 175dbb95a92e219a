"""Layout float: the paper's real shifts in ONNX's blocked DequantizeLinear, the same numbers as torch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import SIDE
from formats import fit_weight, fit_weight_real
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.export.weights.real import add_real_weight
from dsconvert.graph.ir import ConvParams
from dsconvert.graph.run import run_float
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.inspect import conv_weights
from dsconvert.scoring.candidates import load_candidate
from dsconvert.yolo.decode import decode


@pytest.fixture
def real(converted) -> DSModel:
    """The tiny network with real alpha and float activations; 40 input channels make some blocks of 16 short."""
    convs = {
        name: c if c.weight.is_plain_int8 else replace(c, weight=fit_weight_real(c.weight.weight(), 4, 16))
        for name, c in converted.convs.items()
    }
    return replace(converted, convs=convs, activations={})


def run(model: onnx.ModelProto, feed: dict) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, feed)[0]


def test_the_file_is_torchs_network(real, picture, tmp_path):
    model = compact(export_quantized(real, layout_named("float"), SIDE))
    params = {name: ConvParams(c.weight.weight(), c.bias) for name, c in real.convs.items()}
    wanted = decode(run_float(real.graph, params, picture), real.head).numpy()
    # float32 convolutions summed in another order; boxes up to 64 pixels
    np.testing.assert_allclose(run(model, {"images": picture.numpy()}), wanted, rtol=1e-4, atol=1e-3)
    path = tmp_path / "m.safetensors"
    path.write_bytes(model_bytes(real))
    np.testing.assert_allclose(load_candidate(path, None).predict(picture.numpy()), wanted, rtol=1e-4, atol=1e-3)


def test_the_operator_is_the_blocked_dequantization_of_alphas_own_shape(real):
    graph = export_quantized(real, layout_named("float"), SIDE).graph
    tensors = {t.name: t for t in graph.initializer}
    name, conv = next(
        (n, c) for n, c in real.convs.items() if c.weight.format.code.real and c.weight.vqk.shape[1] % 16 == 0
    )
    stem = name.removesuffix(".conv")
    node = next(n for n in graph.node if n.input[:2] == [f"{stem}.vqk", f"{stem}.alpha"])
    assert {a.name: a.i for a in node.attribute} == {"axis": 1, "block_size": 16}
    assert tensors[f"{stem}.vqk"].data_type == TensorProto.INT4
    assert np.array_equal(numpy_helper.to_array(tensors[f"{stem}.alpha"]), conv.weight.m.numpy())  # CDSw is 1
    assert node.output[0] in next(n for n in graph.node if n.op_type == "Conv" and n.name == stem).input


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize(("chi", "block"), [(32, 32), (48, 32), (5, 2), (3, 32)])
@pytest.mark.parametrize("integer", [False, True])
def test_stored_weights_are_the_weight(bits, chi, block, integer):
    source = torch.randn(3, chi, 3, 3, generator=torch.Generator().manual_seed(chi))
    weight = (fit_weight if integer else fit_weight_real)(source, bits, block)
    weight = replace(weight, cds_w=weight.cds_w * torch.tensor([1.0, 0.3, 7.0]))
    b = OnnxBuilder(21)
    name = add_real_weight(b, "w", weight)
    b.node("Identity", [name], "out")
    model = b.model({}, {"out": tuple(source.shape)}, {})
    for found in (run(model, {}), ReferenceEvaluator(model).run(None, {})[0]):
        np.testing.assert_allclose(found, weight.weight().numpy(), rtol=3e-7)  # products in another order


def test_inspection_counts_alpha(real):
    found = {w.name: w for w in conv_weights(export_quantized(real, layout_named("float"), SIDE))}
    for name, conv in real.convs.items():
        entry = found[name.removesuffix(".conv")]
        assert entry.shape == tuple(conv.weight.vqk.shape)
        assert entry.bits == round(conv.weight.weight_bits * entry.count)


def test_layouts_that_cannot_hold_a_model_say_so(real, converted):
    for layout in ("packed", "blocked", "int8"):
        with pytest.raises(InputError, match="use layout float"):
            export_quantized(real, layout_named(layout), SIDE)
    with pytest.raises(InputError, match=" activations float"):
        export_quantized(converted, layout_named("float"), SIDE)
