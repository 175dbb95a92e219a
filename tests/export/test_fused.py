"""Layout fused: what ONNX Runtime makes of packed, in as few bytes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from dsconvert.base.errors import InputError
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import PLAIN, Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.inspect import conv_weights

SIDE = 64


def outputs(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"images": feed})[0]


@pytest.mark.parametrize(
    "ends", [PLAIN, Ends(dynamic_batch=True), Ends(input_type="uint8"), Ends(input_type="float16"), Ends(nms=Nms())],
    ids=["plain", "batch", "bytes", "half", "nms"],
)  # fmt: skip
def test_the_same_numbers_as_packed(converted, ends):
    packed, fused = (export_quantized(converted, layout_named(layout), SIDE, ends) for layout in ("packed", "fused"))
    count = 3 if ends.dynamic_batch else 1
    feed = np.random.default_rng(0).integers(0, 256, (count, 3, SIDE, SIDE), dtype=np.uint8)
    if ends.input_type != "uint8":
        feed = (feed / np.float32(255)).astype(ends.input_type)
    wanted = outputs(packed, feed)
    assert np.array_equal(outputs(fused, feed), wanted)
    assert np.array_equal(outputs(compact(fused), feed), wanted)
    for part in ("input", "output"):
        assert getattr(fused.graph, part) == getattr(packed.graph, part)
    props, others = ({p.key: p.value for p in m.metadata_props} for m in (packed, fused))
    assert others == {**props, "dsconvert.layout": "fused"}


def test_nothing_is_left_to_fuse_and_nothing_is_stored_twice(converted):
    packed, fused = (compact(export_quantized(converted, layout_named(layout), SIDE)) for layout in ("packed", "fused"))
    ops = Counter(node.op_type for node in fused.graph.node)
    assert ops["QLinearConv"] == len(converted.convs)
    assert ops["QuantizeLinear"] == 1  # the image
    assert not ops["Conv"]
    found, wanted = ({(w.name, w.shape, w.bits) for w in conv_weights(model)} for model in (fused, packed))
    assert found == wanted
    assert fused.ByteSize() < packed.ByteSize()
    assert {"model.2.m.0.cv1.vqk", "model.2.m.0.cv1.kds"} <= {t.name for t in fused.graph.initializer}
    assert {o.domain for o in fused.opset_import} == {"", "com.microsoft"}
    onnx.checker.check_model(fused)


def test_the_same_bytes_every_time(converted):
    one, two = (
        compact(export_quantized(converted, layout_named("fused"), SIDE)).SerializeToString(deterministic=True)
        for _ in "ab"
    )
    assert one == two


def test_float_activations_have_nothing_to_fuse(converted):
    with pytest.raises(InputError, match="int8 activations"):
        export_quantized(replace(converted, activations={}), layout_named("fused"), SIDE)
