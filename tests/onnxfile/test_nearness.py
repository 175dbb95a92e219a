"""The last look at a converted file: outputs that are far from the float file's are said, or refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from dsconvert.base.errors import CheckError
from dsconvert.onnxfile.nearness import how_far_off
from dsconvert.onnxfile.source import Source, read_source


def times(factor: float, path: Path) -> Source:
    """A file whose output is its image times a number."""
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])], "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 3, 8, 8])],
        [helper.make_tensor("f", TensorProto.FLOAT, [], [factor])],
    )  # fmt: skip
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return read_source(path, None, 1)


def images() -> list[np.ndarray]:
    return [np.random.default_rng(i).normal(size=(1, 3, 8, 8)).astype(np.float32) for i in range(2)]


def test_an_output_nearby_is_not_mentioned(tmp_path):
    source = times(1.0, tmp_path / "a.onnx")
    assert how_far_off(source, times(1.1, tmp_path / "b.onnx").model, images()) is None


def test_an_output_far_off_is_named_with_its_error(tmp_path):
    source = times(1.0, tmp_path / "a.onnx")
    said = how_far_off(source, times(3.0, tmp_path / "b.onnx").model, images())
    # twice the image too much: four times its variance, whose mean is nearly 0
    assert said is not None
    assert "output y is off by 40" in said


def test_no_numbers_are_refused(tmp_path):
    source = times(1.0, tmp_path / "a.onnx")
    with pytest.raises(CheckError, match="output y"):
        how_far_off(source, times(float("inf"), tmp_path / "b.onnx").model, images())
