"""Layout fast: fused with every activation looked up by the operator of dsconvert-ops; the same integers without it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from built import needs_ops
from conftest import HANGS, ROOT, SIDE
from onnx import TensorProto, helper, numpy_helper

import dsconvert
from dsconvert.base.errors import InputError
from dsconvert.convert.exporting import onnx_bytes
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import PLAIN, Ends, export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.activations import ACTIVATIONS, activation_table
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import run_integer
from dsconvert.model.file import model_bytes
from dsconvert.onnxfile import operators
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.engines import load_file, session
from dsconvert.yolo.decode import decode

PIP = "pip install ./ops"
EVERY = {
    "plain": PLAIN, "batch": Ends(dynamic_batch=True), "bytes": Ends(input_type="uint8"),
    "half": Ends(input_type="float16"), "nms": Ends(nms=Nms()),
}  # fmt: skip


@pytest.fixture
def without(monkeypatch) -> None:
    """No library, whatever is installed."""
    monkeypatch.setattr(operators, "library", lambda: None)


def needing(path: Path, table: np.ndarray | None = None) -> Path:
    """A file of one node that needs the library: an image's bytes through a table, as float."""
    graph = helper.make_graph(
        [
            helper.make_node("Lookup", ["t", "images"], ["b"], domain="dsconvert"),
            helper.make_node("Cast", ["b"], ["output0"], to=TensorProto.FLOAT),
        ],
        "one",
        [helper.make_tensor_value_info("images", TensorProto.UINT8, [1, 3, 32, 32])],
        [helper.make_tensor_value_info("output0", TensorProto.FLOAT, [1, 3, 32, 32])],
        [numpy_helper.from_array(np.zeros(256, np.uint8) if table is None else table, "t")],
    )
    sets = [helper.make_opsetid("", 21), helper.make_opsetid("dsconvert", 1)]
    onnx.save(helper.make_model(graph, opset_imports=sets, ir_version=10), path)
    return path


def outputs(model: onnx.ModelProto, feed: np.ndarray) -> np.ndarray:
    return session(model.SerializeToString(), 2).run(None, {"images": feed})[0]


@needs_ops
@pytest.mark.parametrize("name", EVERY)
def test_the_same_bits_as_packed_and_fused(converted, name):
    ends = EVERY[name]
    packed, fused, fast = (
        export_quantized(converted, layout_named(layout), SIDE, ends) for layout in ("packed", "fused", "fast")
    )
    feed = np.random.default_rng(0).integers(0, 256, (3 if ends.dynamic_batch else 1, 3, SIDE, SIDE), dtype=np.uint8)
    if ends.input_type != "uint8":
        feed = (feed / np.float32(255)).astype(ends.input_type)
    wanted = outputs(packed, feed)
    assert np.array_equal(outputs(fused, feed), wanted)
    assert np.array_equal(outputs(fast, feed), wanted)
    assert np.array_equal(outputs(compact(fast), feed), wanted)
    for part in ("input", "output"):
        assert getattr(fast.graph, part) == getattr(packed.graph, part)


@needs_ops
@pytest.mark.parametrize("kind", sorted({*ACTIVATIONS} - {"ReLU"}))
def test_every_activation_is_one_pass_and_the_reference_s_integers(converted, picture, kind):
    nodes = tuple(replace(n, attrs={"kind": kind}) if n.op == "act" else n for n in converted.graph.nodes)
    model = replace(converted, graph=replace(converted.graph, nodes=nodes))
    fast = export_quantized(model, layout_named("fast"), SIDE)
    kinds = Counter(node.op_type for node in fast.graph.node)
    assert 0 < kinds["Lookup"] <= sum(n.op in ("act", "concat") for n in nodes)
    assert not {"QLinearSigmoid", "QLinearMul", "QLinearLeakyRelu"} & set(kinds)
    maps = run_integer(model.graph, model.convs, model.activations, picture)
    found = outputs(fast, picture.numpy())
    wanted = decode(maps, model.head).numpy()
    assert np.allclose(found, wanted, rtol=1e-5, atol=1e-4)  # decoding in float, two libraries' roundings


@needs_ops
def test_tables_are_the_integer_reference_s(converted):
    fast = export_quantized(converted, layout_named("fast"), SIDE)
    stored = {t.name: numpy_helper.to_array(t) for t in fast.graph.initializer}
    found = [
        row for node in fast.graph.node if node.op_type == "Lookup" for row in stored[node.input[0]].reshape(-1, 256)
    ]
    grids = converted.activations
    wanted = {
        activation_table("SiLU", QParams(*_of(grids[n.inputs[0]])), QParams(*_of(grids[n.name]))).tobytes()
        for n in converted.graph.nodes
        if n.op == "act"
    }
    assert {t.tobytes() for t in found} - wanted == {np.arange(256, dtype=np.uint8).tobytes()}  # of what is joined
    assert {t.tobytes() for t in found} >= wanted


def _of(grid: QParams) -> tuple[float, int]:
    return grid.scale, grid.zero_point


@needs_ops
def test_maps_are_joined_in_the_same_pass(converted):
    """No Concat of bytes is left, and no activation is looked up before it is joined unless something else reads it."""
    fused, fast = (export_quantized(converted, layout_named(layout), SIDE) for layout in ("fused", "fast"))
    concats = [node for node in fused.graph.node if node.op_type == "Concat" and node.attribute[0].i == 3]
    joined = [node for node in fast.graph.node if node.op_type == "Lookup" and len(node.input) > 2]
    assert len(joined) == len(concats) > 0
    assert not any(node.op_type == "Concat" and node.attribute[0].i == 3 for node in fast.graph.node)
    reads = Counter(name for node in fast.graph.node for name in node.input)
    makers = {out: node.op_type for node in fast.graph.node for out in node.output}
    for node in joined:
        assert all(makers[name] != "Lookup" or reads[name] > 1 or _joined(fast, name) for name in node.input[1:])


def _joined(model: onnx.ModelProto, name: str) -> bool:
    return any(name in node.output and len(node.input) > 2 for node in model.graph.node)


@needs_ops
def test_maps_are_turned_around_no_more_often_than_in_fused(converted):
    """What ONNX Runtime runs, after its optimiser: it puts no Transpose around the operator that it does not know."""
    counts = []
    for layout in ("fused", "fast"):
        made = export_quantized(converted, layout_named(layout), SIDE)
        running = Counter(node.op_type for node in optimised(made).graph.node)
        counts.append(running["Transpose"])
    assert counts[1] <= counts[0]


def optimised(model: onnx.ModelProto) -> onnx.ModelProto:
    import tempfile

    import onnxruntime as ort

    with tempfile.TemporaryDirectory() as folder:
        options = operators.with_operators(ort.SessionOptions())
        options.log_severity_level, options.optimized_model_filepath = 4, f"{folder}/made.onnx"
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        return onnx.load(f"{folder}/made.onnx")


@needs_ops
def test_the_same_bytes_every_time_and_the_check_passes(converted, tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(converted))
    one, two = (onnx_bytes(path, layout_named("fast"), None) for _ in "ab")
    assert one == two
    model = onnx.load_from_string(one)
    assert {o.domain for o in model.opset_import} == {"", "com.microsoft", "dsconvert"}
    onnx.checker.check_model(model)


@needs_ops
@pytest.mark.parametrize("table", [np.zeros(255, np.uint8), np.zeros(256, np.int8), np.zeros((2, 2, 256), np.uint8)])
def test_a_table_of_another_size_or_type_is_refused_in_one_sentence(table, tmp_path, call):
    path = needing(tmp_path / "hostile.onnx", table)
    answer = call("bench", path, cwd=tmp_path)
    assert answer.code == 2
    assert answer.err.count("\n") == 1
    assert "is not an ONNX file that ONNX Runtime can run" in answer.err


@needs_ops
def test_commands_and_the_python_api_load_the_library_by_themselves(work, call, converted):
    (work / "model.safetensors").write_bytes(model_bytes(converted))
    for layout in ("packed", "fast"):
        answer = call("export", "model.safetensors", "--layout", layout, "--out", f"{layout}.onnx", cwd=work)
        assert answer.code == 0, answer.err
    packed, fast = (
        dsconvert.detect(work / f"{x}.onnx", work / "images/val", conf_thres=0.01) for x in ("packed", "fast")
    )
    assert fast == packed
    assert any(photo.objects for photo in fast)
    assert call("detect", "fast.onnx", "images/val", "--nosave", cwd=work).code == 0
    assert call("bench", "fast.onnx", "--runs", "2", "--threads", "1", cwd=work).code == 0
    answer = call("eval", "packed.onnx", "fast.onnx", "--data", "data.yaml", "--json", cwd=work)
    assert answer.code == 0, answer.err
    rows = json.loads(answer.out)["models"]
    assert rows[0]["map50_95"] == rows[1]["map50_95"]


@needs_ops
def test_the_line_that_the_documentation_has_for_a_user_s_own_program(converted, tmp_path):
    """The program of docs/howto.md, run as it stands there, in a process that knows nothing of dsconvert."""
    page = (ROOT / "docs/howto.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (program,) = [block for block in blocks if "register_custom_ops_library" in block]
    model = export_quantized(converted, layout_named("fast"), SIDE)
    onnx.save(model, tmp_path / "best-fast.onnx")
    image = np.random.default_rng(0).random((1, 3, SIDE, SIDE), np.float32)
    np.save(tmp_path / "image.npy", image)
    (tmp_path / "own.py").write_text(
        "import numpy as np\nimage = np.load('image.npy')\n" + program + "\nnp.save('boxes.npy', boxes)\n"
    )
    done = subprocess.run([sys.executable, "own.py"], cwd=tmp_path, capture_output=True, text=True, timeout=HANGS,
                          env=os.environ, check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert np.array_equal(np.load(tmp_path / "boxes.npy"), outputs(model, image))


def test_a_file_that_needs_the_library_is_refused_with_the_line_that_helps(without, work, call):
    path, photos = needing(work / "best-fast.onnx"), work / "images/val"
    for words in (("bench", path), ("detect", path, photos), ("eval", path, "--data", work / "data.yaml"),
                  ("quantize", path, "--calib", photos)):  # fmt: skip
        answer = call(*words, cwd=work)
        assert answer.code == 2, answer.err
        assert answer.err.count("\n") == 1, answer.err
        assert "best-fast.onnx needs the operator library" in answer.err
        assert answer.err.rstrip().endswith(f"{PIP}.")
    with pytest.raises(InputError, match=PIP):
        load_file(path, 1, path.stat().st_size)
    with pytest.raises(InputError, match=PIP):
        session(path.read_bytes(), 1)


def test_export_says_what_the_layout_needs_before_it_makes_anything(without, converted, tmp_path, call):
    (tmp_path / "model.safetensors").write_bytes(model_bytes(converted))
    answer = call("export", "model.safetensors", "--layout", "fast", cwd=tmp_path)
    assert answer.code == 2
    assert answer.err == f"Error: Layout fast {operators.MISSING}.\n"
    assert list(tmp_path.glob("*.onnx")) == []
    with pytest.raises(InputError, match=PIP):
        dsconvert.load(tmp_path / "model.safetensors").export(tmp_path / "own.onnx", layout="fast")


def test_a_faulty_file_that_needs_nothing_is_refused_as_ever(without, tmp_path):
    path = tmp_path / "bad.onnx"
    path.write_bytes(b"\x08\x0a\x12\x03abc")
    with pytest.raises(InputError, match="is not an ONNX file that ONNX Runtime can run"):
        load_file(path, 1, path.stat().st_size)


def test_one_size_and_int8_activations_as_for_fused(converted, monkeypatch):
    monkeypatch.setattr(operators, "library", lambda: "somewhere")
    with pytest.raises(InputError, match="int8 activations"):
        export_quantized(replace(converted, activations={}), layout_named("fast"), SIDE)
    with pytest.raises(InputError, match="needs one image size"):
        export_quantized(converted, layout_named("fast"), SIDE, Ends(open_size=True))
