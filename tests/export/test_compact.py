"""The compact file: the same numbers, the names people look for, nothing spelled twice."""

from __future__ import annotations

from itertools import islice

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from conftest import SIDE
from onnx import TensorProto, helper, numpy_helper

from dsconvert.export.onnx import Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.onnxfile.compact import compact, short_names


def run(model: onnx.ModelProto, image: np.ndarray) -> np.ndarray:
    return ort.InferenceSession(model.SerializeToString()).run(None, {"images": image})[0]


@pytest.mark.parametrize("layout", ["packed", "int8"])
def test_only_names_differ(converted, picture, layout):
    before = export_quantized(converted, layout_named(layout), SIDE)
    after = compact(before)
    onnx.checker.check_model(after, full_check=True)
    assert np.array_equal(run(before, picture.numpy()), run(after, picture.numpy()))
    assert after.ByteSize() < 0.9 * before.ByteSize()
    renamed: dict[str, str] = {}
    for old, new in zip(before.graph.node, after.graph.node, strict=True):
        assert (old.op_type, old.name, list(old.attribute)) == (new.op_type, new.name, list(new.attribute))
        for a, b in zip([*old.input, *old.output], [*new.input, *new.output], strict=True):
            assert renamed.setdefault(a, b) == b  # one old name, one new name
    assert len(set(renamed.values())) == len(renamed)
    kept = {name for name in renamed if renamed[name] == name}
    weights = {t.name for t in before.graph.initializer if t.name.startswith("model.")}
    assert {*weights, "images", "output0"} <= kept
    assert max(len(name) for name in renamed.values() if name not in kept) == 2


def test_short_names_start_with_the_letters_and_never_repeat():
    names = list(islice(short_names(), 52 + 52 * 62 + 1000))
    assert names[:3] == ["a", "b", "c"]
    assert len(set(names)) == len(names)
    assert all(name.isidentifier() for name in names)
    assert [len(n) for n in names] == sorted(len(n) for n in names)


def test_names_that_stay_are_never_given_again():
    value = numpy_helper.from_array(np.ones(1, np.float32), "c.w")
    nodes = [helper.make_node("Add", ["a", "c.w"], ["long"]), helper.make_node("Add", ["long", "long"], ["b"])]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1]) for n in "ab"]
    model = helper.make_model(helper.make_graph(nodes, "g", ends[:1], ends[1:], [value]))
    made = compact(model).graph
    assert [(list(n.input), list(n.output)) for n in made.node] == [(["a", "c.w"], ["c"]), (["c", "c"], ["b"])]


def test_optional_inputs_stay_empty_and_so_does_the_original(converted):
    before = export_quantized(converted, layout_named("blocked"), SIDE, Ends(dynamic_batch=True))
    text = before.SerializeToString()
    resize = next(n for n in compact(before).graph.node if n.op_type == "Resize")
    assert resize.input[1] == ""
    assert before.SerializeToString() == text


def test_a_lean_file_is_smaller_still_and_gives_the_same(converted, picture):
    """All values but inputs and outputs have short names, and an integer below 128 takes a byte."""
    before = export_quantized(converted, layout_named("packed"), SIDE)
    plain, lean = compact(before), compact(before, True)
    onnx.checker.check_model(lean, full_check=True)
    assert np.array_equal(run(before, picture.numpy()), run(lean, picture.numpy()))
    assert lean.ByteSize() < plain.ByteSize()
    ends = {v.name for v in (*lean.graph.input, *lean.graph.output)}
    assert max(len(t.name) for t in lean.graph.initializer) == 2
    assert all(len(name) <= 2 for node in lean.graph.node for name in node.output if name not in ends)
    assert [n.name for n in lean.graph.node] == [n.name for n in before.graph.node]  # convolutions can be found
    for old, new in zip(before.graph.initializer, lean.graph.initializer, strict=True):
        assert np.array_equal(numpy_helper.to_array(old), numpy_helper.to_array(new))
        assert new.ByteSize() <= old.ByteSize()
    axes = [t for t in lean.graph.initializer if t.data_type == TensorProto.INT64 and t.dims]
    assert all(t.int64_data and not t.raw_data for t in axes if max(numpy_helper.to_array(t), default=0) > 0)
