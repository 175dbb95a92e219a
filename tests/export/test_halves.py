"""Half floats in small files: what is stored comes back exactly, and what is rounded moves by one part in 2048."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.codes import usual_format
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.biases import Biases
from dsconvert.export.halves import in_halves, join_scales, significant
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import INPUT, Graph, Node
from dsconvert.model.model import Converted

ATTRS = {"stride": 1, "padding": 1, "dilation": 1, "groups": 1}


def nearest(n: int) -> set[int]:
    """The integers of 11 significant bits that are nearest to n, by looking at all near it."""
    step = max(1, 1 << max(0, abs(n).bit_length() - 12))  # a neighbour across a power of two is nearer
    near = [m for m in range(abs(n) - 2 * step, abs(n) + 2 * step + 1) if m >= 0 and m >> max(0, m.bit_length() - 11)
            << max(0, m.bit_length() - 11) == m]  # fmt: skip
    least = min(abs(abs(n) - m) for m in near)
    return {(1 if n >= 0 else -1) * m for m in near if abs(abs(n) - m) == least}


def test_integers_are_rounded_to_eleven_bits():
    rng = np.random.default_rng(0)
    given = np.concatenate([rng.integers(-(1 << b), 1 << b, 40) for b in (3, 11, 12, 13, 17)]).astype(np.int32)
    for n, found in zip(given.tolist(), significant(given).tolist(), strict=True):
        assert int(found) in nearest(n)
    # the largest bias that there is, and the smallest beside it
    assert significant(np.array([1 << 29, 1, 0, -1], np.int32)).tolist() == [1 << 29, 1, 0, -1]


@pytest.mark.parametrize("bits", [5, 11, 20, 29])
def test_biases_and_scales_come_back_exactly(bits):
    rng, edge = np.random.default_rng(bits), 1 << bits
    b, wanted, names = OnnxBuilder(21), [], []
    biases = Biases(b, True)
    for i, count in enumerate((16, 3)):
        integers = significant(rng.integers(-edge, edge, count).astype(np.int32)).astype(np.int32)
        cds = (rng.random(count) + 2.0**-12).astype(np.float16).astype(np.float32) * 2.0**-13
        units = biases.add(f"m.{i}", integers, b.tensor(f"m.{i}.cds", cds), 0.5)
        names.append(b.node("DequantizeLinear", [*units], f"m.{i}.b", axis=0))
        wanted.append(integers.astype(np.float32) * (cds * np.float32(0.5)))
    biases.finish()
    join_scales(b)
    model = b.model({}, {name: (len(x),) for name, x in zip(names, wanted, strict=True)}, {})
    for found, expected in zip(ort.InferenceSession(model.SerializeToString()).run(None, {}), wanted, strict=True):
        assert np.array_equal(found, expected)
    kinds = [t.data_type for t in model.graph.initializer if t.dims and t.dims[0] == 19]
    assert kinds == [onnx.TensorProto.FLOAT16] * 2


def a_model(factors: list[float]) -> Converted:
    """One convolution whose output channels are larger by these factors."""
    torch.manual_seed(0)
    weight = torch.randn(len(factors), 8, 3, 3) * torch.tensor(factors)[:, None, None, None]
    conv = QConv(DSTensor.nearest(weight, usual_format(5, 8, 16)), torch.randn(len(factors)) * torch.tensor(factors))
    graph = Graph((Node("conv", "layer", (INPUT,), ATTRS),), ("layer",))
    return Converted(graph, {"layer": conv}, {INPUT: QParams(1 / 255, 0), "layer": QParams(0.1, 128)})


def test_a_model_moves_by_one_part_in_2048():
    model = a_model([1.0, 1e-3, 7.0, 300.0])
    made = in_halves(model)
    assert made is not None
    before, after = model.convs["layer"], made.convs["layer"]
    assert torch.equal(after.weight.vqk, before.weight.vqk)
    assert ((after.weight.cds_w / before.weight.cds_w - 1).abs() <= 2**-11).all()
    # CDSw and the integer each move so far; half a unit is the integer's own rounding
    unit = after.weight.cds_w / 255
    assert ((after.bias - before.bias).abs() <= before.bias.abs() * 2**-11 + 0.51 * unit).all()
    assert in_halves(made) is not None
    again = in_halves(made).convs["layer"]
    assert torch.equal(again.bias_int(1 / 255), after.bias_int(1 / 255))  # what is rounded stays as it is
    assert torch.equal(again.weight.cds_w, after.weight.cds_w)


def test_a_dead_channel_keeps_its_bias_and_a_layer_of_tiny_numbers_is_left_alone():
    made = in_halves(a_model([1.0, 1e-12]))
    assert made is not None
    layer = made.convs["layer"]
    assert float(layer.weight.weight()[1].abs().max()) < 1e-6 * float(layer.weight.weight()[0].abs().max())
    assert in_halves(a_model([1e-12, 1e-12])) is None
    assert in_halves(a_model([1e-12, 1e-7])) is None  # a grid could tell these two apart
