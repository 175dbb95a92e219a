"""Side-by-side measurements: ratios with exact answers, memory a known tensor needs, files of every input type."""

from __future__ import annotations

import os
import sys

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from dsconvert.base.errors import InputError
from dsconvert.onnxfile.engines import as_input, engine_version, open_model
from dsconvert.scoring.bench import bench, only_cpus
from dsconvert.scoring.footprint import measure_footprint
from dsconvert.scoring.latency import ratio


def write(path, inputs=(("x", TensorProto.FLOAT, (1, 3, 8, 8)),), weights: int = 1):
    """A file that adds up its first input and `weights` random float32 numbers."""
    values = np.random.default_rng(0).random(weights, np.float32)
    nodes = [
        helper.make_node("Cast", [inputs[0][0]], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["f"], ["a"], keepdims=0),
        helper.make_node("Mul", ["w", "a"], ["m"]),
        helper.make_node("ReduceSum", ["m"], ["y"], keepdims=0),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(*i) for i in inputs],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [])],
        [numpy_helper.from_array(values, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=7), path)
    return path


def test_ratio_of_equal_rounds_is_exact_however_much_they_drift():
    base = np.array([10.0, 11, 30, 9, 50, 10])  # the machine was slow twice
    found = ratio(base / 2, base)
    assert (found.value, found.low, found.high) == (0.5, 0.5, 0.5)


def test_interval_holds_the_ratio_and_narrows_with_rounds():
    rng = np.random.default_rng(1)
    widths = []
    for rounds in (20, 500):
        base, times = rng.normal(100, 5, rounds), rng.normal(80, 5, rounds)
        found = ratio(times, base)
        assert found.low <= 0.8 <= found.high
        assert found.low <= found.value <= found.high
        widths.append(found.high - found.low)
    # the width falls with the square root of the rounds: by 5
    assert 3 < widths[0] / widths[1] < 8


def test_same_times_same_interval():
    times = np.random.default_rng(2).random((2, 30)) + 1
    assert ratio(*times) == ratio(*times)


def test_memory_of_a_fresh_process_holds_the_weights(tmp_path):
    small = write(tmp_path / "small.onnx")
    large = write(tmp_path / "large.onnx", weights=32 << 20)  # 128 MiB
    feet = [measure_footprint(p, "onnxruntime", 1, None) for p in (large, small)]
    for foot in feet:
        assert foot.peak_bytes >= foot.base_bytes > 10 << 20
        assert foot.load_ms > 0
    assert feet[0].peak_bytes - feet[1].peak_bytes > 127 << 20
    # the engine alone weighs the same with either; a parent's peak would show here
    assert abs(feet[0].base_bytes - feet[1].base_bytes) < 8 << 20


def test_images_as_bytes_are_rounded_not_cut():
    whole = np.arange(256, dtype=np.float32) / 255
    assert np.array_equal(as_input(whole, np.uint8), np.arange(256))
    assert as_input(whole, np.float16).dtype == np.float16


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.UINT8])
def test_every_input_type_and_open_shapes_run(tmp_path, kind):
    path = write(tmp_path / "m.onnx", [("x", kind, ("n", 3, "h", "w"))])
    outputs = open_model(path, "onnxruntime", 1, 16)()
    image = np.random.default_rng(0).random((1, 3, 16, 16), np.float32)
    numpy_kind = helper.tensor_dtype_to_np_dtype(kind).type
    wanted = as_input(image, numpy_kind).astype(np.float64).sum() * np.random.default_rng(0).random(1, np.float32)
    # a float32 sum of 768 numbers
    np.testing.assert_allclose(outputs[0], wanted[0], rtol=1e-5)


def test_what_is_no_image_model_is_refused(tmp_path):
    image = ("x", TensorProto.FLOAT, (1, 3, 8, 8))
    for name, inputs in {
        "two": [image, ("z", TensorProto.FLOAT, (1,))],
        "flat": [("x", TensorProto.FLOAT, (1, 8))],
        "int64": [("x", TensorProto.INT64, (1, 3, 8, 8))],
    }.items():
        with pytest.raises(InputError, match="one image"):
            open_model(write(tmp_path / f"{name}.onnx", inputs), "onnxruntime", 1, None)
    (tmp_path / "bad.onnx").write_bytes(b"no model")
    with pytest.raises(InputError, match="not an ONNX file"):
        open_model(tmp_path / "bad.onnx", "onnxruntime", 1, None)
    with pytest.raises(InputError, match=r"bad\.onnx is not an ONNX file"):
        measure_footprint(tmp_path / "bad.onnx", "onnxruntime", 1, None)
    with pytest.raises(InputError, match="no ONNX file"):
        open_model(tmp_path / "none.onnx", "onnxruntime", 1, None)


def test_missing_openvino_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # makes the import fail
    with pytest.raises(InputError, match="not installed"):
        engine_version("openvino")


def test_cpus_are_given_back():
    before = os.sched_getaffinity(0)
    with only_cpus(1):
        assert os.sched_getaffinity(0) == {min(before)}
    assert os.sched_getaffinity(0) == before
    with pytest.raises(InputError, match="CPUs"), only_cpus(len(before) + 1):
        pass


def test_bench_rows_are_every_file_in_every_engine(tmp_path):
    paths = [write(tmp_path / "a.onnx"), write(tmp_path / "b.onnx", weights=1000)]
    rows = bench(paths, ["onnxruntime"], 1, runs=5)
    assert [r.path for r in rows] == paths
    assert [r.size_bytes for r in rows] == [p.stat().st_size for p in paths]
    assert all(r.latency.runs == 5 and r.latency.min_ms <= r.latency.median_ms for r in rows)
    assert (rows[0].ratio.value, rows[0].ratio.low, rows[0].ratio.high) == (1, 1, 1)


@pytest.mark.long
def test_bench_in_openvino(tmp_path):
    pytest.importorskip("openvino")
    paths = [write(tmp_path / "a.onnx", [("x", TensorProto.UINT8, ("n", 3, "h", "w"))])]
    rows = bench(paths, ["onnxruntime", "openvino"], 1, runs=3, imgsz=8)
    assert [r.engine for r in rows] == ["onnxruntime", "openvino"]
    engines = [open_model(paths[0], engine, 1, 8)() for engine in ("onnxruntime", "openvino")]
    np.testing.assert_allclose(engines[0][0], engines[1][0], rtol=1e-5)  # a float32 sum of 192 numbers
