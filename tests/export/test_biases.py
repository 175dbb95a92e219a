"""Joint biases: every integer comes back, in its own layer's units."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dsconvert.base.builder import OnnxBuilder
from dsconvert.export.biases import Biases

CHANNELS = (16, 24, 3, 8)  # 3: no multiple of a run


def values(b: OnnxBuilder, names: list[str]) -> list[np.ndarray]:
    model = b.model({}, dict(zip(names, [(c,) for c in CHANNELS], strict=True)), {})
    return ort.InferenceSession(model.SerializeToString()).run(None, {})


@pytest.mark.parametrize(("bits", "stored_bits"), [(15, 20), (16, 20), (20, 20), (21, 24), (24, 24), (32, 32)])
def test_biases_and_units_are_exact(bits, stored_bits):
    rng = np.random.default_rng(bits)
    edge = 1 << bits - 1
    b, names, wanted = OnnxBuilder(21), [], []
    biases = Biases(b, False)
    for i, count in enumerate(CHANNELS):
        integers = rng.integers(-edge, edge, count).astype(np.int32)
        integers[:2] = -edge, edge - 1
        cds, scale = rng.random(count, np.float32), float(np.float32(rng.random()))
        stored = b.tensor(f"m.{i}.cds", cds)
        names.append(b.node("DequantizeLinear", [*biases.add(f"m.{i}", integers, stored, scale)], f"m.{i}.b", axis=0))
        wanted.append(integers.astype(np.float32) * (cds * np.float32(scale)))
    biases.finish()
    for found, expected in zip(values(b, names), wanted, strict=True):
        assert np.array_equal(found, expected)
    sizes = {onnx.TensorProto.UINT16: 16, onnx.TensorProto.INT4: 4, onnx.TensorProto.UINT4: 4}
    assert sum(sizes.get(t.data_type, 0) for t in b.initializers.values()) == stored_bits


def test_small_biases_take_two_bytes():
    b = OnnxBuilder(21)
    biases = Biases(b, False)
    parts = biases.add("m", np.array([0, 65535], np.int32), b.tensor("m.cds", np.ones(2, np.float32)), 0.5)
    name = b.node("DequantizeLinear", [*parts], "m.b", axis=0)
    biases.finish()
    model = b.model({}, {name: (2,)}, {})
    assert ort.InferenceSession(model.SerializeToString()).run(None, {})[0].tolist() == [0, 32767.5]
    assert [n.op_type for n in b.nodes].count("Cast") == 1


def test_without_convolutions_there_is_nothing():
    b = OnnxBuilder(21)
    Biases(b, False).finish()
    assert b.nodes == []
