"""The operator of dsconvert-ops: known answers of every kernel and of the node, and what it refuses."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from built import needs_ops
from conftest import HANGS
from onnx import TensorProto, helper, numpy_helper

from dsconvert.onnxfile.operators import DOMAIN, LOOKUP, library, with_operators

pytestmark = needs_ops
KERNELS = ("AVX-512 VBMI", "AVX2", "NEON", "plain")
CANARY = 7  # bytes on either side that nobody may touch


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape)).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="module")
def compiled() -> ctypes.CDLL:
    found = ctypes.CDLL(str(library()))
    found.dsconvert_ops_kernel.restype = ctypes.c_char_p
    found.dsconvert_ops_lookup.argtypes = [ctypes.c_char_p, *[ctypes.c_void_p] * 3, ctypes.c_size_t]
    return found


@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_looks_every_byte_up_and_leaves_what_is_beside_alone(compiled, kernel):
    table = drawn(256)
    if not compiled.dsconvert_ops_lookup(kernel.encode(), table.ctypes.data, None, None, 0):
        pytest.skip(f"this processor does not run {kernel}")
    for count in (*range(1, 300), 4096, 5000):
        source = np.concatenate((np.arange(256, dtype=np.uint8), drawn(count)))[-count:].copy()
        made = np.full(count + 2 * CANARY, 99, np.uint8)
        made[CANARY:-CANARY] = source  # in place, and where no address is round
        place = made.ctypes.data + CANARY
        assert compiled.dsconvert_ops_lookup(kernel.encode(), table.ctypes.data, place, place, count)
        assert np.array_equal(made[CANARY:-CANARY], table[source])
        assert (made[:CANARY] == 99).all()
        assert (made[-CANARY:] == 99).all()


def test_all_256_bytes_by_the_chosen_kernel(compiled):
    every, table = np.arange(256, dtype=np.uint8), drawn(256)
    made = np.empty_like(every)
    name = compiled.dsconvert_ops_kernel()
    assert name.decode() in KERNELS
    assert compiled.dsconvert_ops_lookup(name, table.ctypes.data, every.ctypes.data, made.ctypes.data, 256)
    assert np.array_equal(made, table)


def test_the_environment_names_another_kernel():
    code = (
        "import ctypes, sys; name = ctypes.CDLL(sys.argv[1]).dsconvert_ops_kernel; "
        "name.restype = ctypes.c_char_p; print(name())"
    )
    found = subprocess.run([sys.executable, "-c", code, str(library())], capture_output=True, text=True, check=True,
                           env={**os.environ, "DSCONVERT_OPS_KERNEL": "plain"}, timeout=HANGS)  # fmt: skip
    assert found.stdout.strip() == "b'plain'"


def file(shape: list, table: np.ndarray, kind: int = TensorProto.UINT8, constant: bool = True) -> bytes:
    """One node; its table is an initializer, or an input."""
    inputs = [helper.make_tensor_value_info("x", kind, shape)]
    stored = [numpy_helper.from_array(table, "t")]
    if not constant:
        inputs.append(helper.make_tensor_value_info("t", TensorProto.UINT8, table.shape))
    graph = helper.make_graph(
        [helper.make_node(LOOKUP, ["t", "x"], ["y"], domain=DOMAIN)], "one", inputs,
        [helper.make_tensor_value_info("y", kind, shape)], stored if constant else [],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


def opened(model: bytes, threads: int = 2) -> ort.InferenceSession:
    options = with_operators(ort.SessionOptions())
    options.intra_op_num_threads, options.log_severity_level = threads, 4
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (1, 16, 16, 3), (2, 320, 320, 16), (1 << 20,)])
def test_the_node_gives_each_byte_of_a_map_its_own(shape, threads):
    x, table = drawn(*shape), drawn(256)
    for named in (list(shape), [f"d{i}" for i in range(len(shape))]):
        assert np.array_equal(opened(file(named, table), threads).run(None, {"x": x})[0], table[x])


@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 3, 5, 7), (1, 160, 160, 32), (4096,), (0, 5)])
def test_the_node_gives_each_channel_its_own_table(shape):
    x, tables = drawn(*shape), drawn(shape[-1], 256)
    made = opened(file(list(shape), tables)).run(None, {"x": x})[0]
    assert np.array_equal(made, tables[np.arange(shape[-1]), x])


def test_a_shape_that_nobody_knows_before_it_comes():
    graph = onnx.load_from_string(file([4, 4], drawn(256)))
    graph.graph.node.insert(0, helper.make_node("Reshape", ["x", "to"], ["z"]))
    graph.graph.node[1].input[1] = "z"
    graph.graph.input.append(helper.make_tensor_value_info("to", TensorProto.INT64, ["rank"]))
    del graph.graph.output[0].type.tensor_type.shape.dim[:]
    graph.graph.output[0].type.tensor_type.ClearField("shape")
    x = drawn(4, 4)
    running = opened(graph.SerializeToString())
    for to in ((16,), (2, 8), (1, 2, 2, 2, 2)):
        made = running.run(None, {"x": x, "to": np.array(to)})[0]
        assert np.array_equal(made, drawn(256)[x].reshape(to))


def test_what_reads_a_map_of_unknown_shape_takes_it(tmp_path):
    """ONNX Runtime checks shapes that are said to be known: here a pooling wants four dimensions."""
    for operator in (file([None, None, None, None], drawn(256)), joining([[None] * 4] * 2, drawn(2, 256))):
        model = onnx.load_from_string(operator)
        inputs = [v.name for v in model.graph.input]
        for i, name in enumerate(inputs):
            model.graph.node.insert(0, helper.make_node("Reshape", [name, "to"], [f"unknown{i}"]))
            model.graph.node[-1].input[1 + i] = f"unknown{i}"
        model.graph.input.append(helper.make_tensor_value_info("to", TensorProto.INT64, ["rank"]))
        model.graph.node.append(helper.make_node("MaxPool", ["y"], ["pooled"], kernel_shape=[1, 1]))
        model.graph.output[0].CopyFrom(helper.make_tensor_value_info("pooled", TensorProto.UINT8, None))
        feed = {name: drawn(1, 4, 4, 3) for name in inputs}
        made = opened(model.SerializeToString()).run(None, {**feed, "to": np.array((1, 4, 4, 3))})[0]
        tables = drawn(256)[None] if len(inputs) == 1 else drawn(2, 256)
        wanted = [table[x] for table, x in zip(tables, feed.values(), strict=True)]
        assert np.array_equal(made, np.concatenate(wanted, -1))


REFUSED = {
    "255 bytes": (drawn(255), "not of 256 bytes each"),
    "a number": (drawn(), "not of 256 bytes each"),
    "three dimensions": (drawn(1, 3, 256), "not of 256 bytes each"),
    "tables of 255": (drawn(3, 255), "not of 256 bytes each"),
    "no channel": (drawn(0, 256), "not of 256 bytes each"),
    "signed": (drawn(256).astype(np.int8), "Type Error"),
    "floats": (drawn(256).astype(np.float32), "Type Error"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_table_of_another_size_or_type_is_refused_when_the_file_is_loaded(name):
    table, message = REFUSED[name]
    with pytest.raises(Exception, match=message):
        opened(file([1, 2, 2, 3], table))


def test_a_table_that_is_no_constant_is_refused_when_the_file_is_loaded():
    with pytest.raises(Exception, match="are not a constant"):
        opened(file([4], drawn(256), constant=False))


def test_a_map_that_is_no_bytes_is_refused_when_the_file_is_loaded():
    with pytest.raises(Exception, match="Type Error"):
        opened(file([4], drawn(256), TensorProto.FLOAT))


@pytest.mark.parametrize("shape", [(1, 4, 4, 2), (1, 4, 4, 4), (3, 1), ()])
def test_tables_for_another_number_of_channels_are_refused_when_it_runs(shape):
    running = opened(file([None] * len(shape), drawn(3, 256)))
    with pytest.raises(Exception, match="another number of channels"):
        running.run(None, {"x": drawn(*shape)})


def test_maps_of_more_dimensions_than_any_has_are_refused():
    running = opened(file([1] * 17, drawn(256)))
    with pytest.raises(Exception, match="for maps of bytes"):
        running.run(None, {"x": drawn(*[1] * 17)})


def test_a_map_that_others_read_too_is_not_overwritten():
    """The operator may work in place; ONNX Runtime lets it do so only where nobody else reads its input."""
    model = onnx.load_from_string(file([1, 64, 64, 16], drawn(256)))
    model.graph.node.insert(0, helper.make_node("Identity", ["x"], ["own"]))
    model.graph.node.insert(1, helper.make_node("Max", ["x", "own"], ["kept"]))
    model.graph.node[2].input[1] = "kept"
    model.graph.node.append(helper.make_node("Max", ["kept", "own"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.UINT8, [1, 64, 64, 16]))
    x = drawn(1, 64, 64, 16)
    made, again = opened(model.SerializeToString()).run(None, {"x": x})
    assert np.array_equal(made, drawn(256)[x])
    assert np.array_equal(again, x)


def joining(shapes: list[list], tables: np.ndarray) -> bytes:
    """One node that joins as many maps as there are shapes."""
    names = [f"x{i}" for i in range(len(shapes))]
    graph = helper.make_graph(
        [helper.make_node(LOOKUP, ["t", *names], ["y"], domain=DOMAIN)], "joined",
        [helper.make_tensor_value_info(n, TensorProto.UINT8, s) for n, s in zip(names, shapes, strict=True)],
        [helper.make_tensor_value_info("y", TensorProto.UINT8, None)], [numpy_helper.from_array(tables, "t")],
    )  # fmt: skip
    sets = [helper.make_opsetid("", 21), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=sets, ir_version=10).SerializeToString()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("sides", "widths"),
    [((1, 160, 160), (16, 16)), ((2, 9, 7), (1, 3, 0, 40)), ((), (5, 6)), ((1, 3, 3), (5000, 33)), ((0, 4), (2, 2)),
     ((1, 1, 1), (1,) * 64), ((1, 80, 80), (32, 48, 64))],
)  # fmt: skip
def test_several_maps_are_joined_each_by_its_own_table(sides, widths, threads):
    maps, tables = [drawn(*sides, width) for width in widths], drawn(len(widths), 256)
    tables[-1] = np.arange(256)  # which changes nothing
    wanted = np.concatenate([table[x] for table, x in zip(tables, maps, strict=True)], -1)
    feed = {f"x{i}": x for i, x in enumerate(maps)}
    for shapes in ([list(x.shape) for x in maps], [[None] * x.ndim for x in maps]):
        made = opened(joining(shapes, tables), threads).run(None, feed)[0]
        assert np.array_equal(made, wanted)


def test_tables_for_another_number_of_maps_are_refused_when_the_file_is_loaded():
    for tables in (drawn(256), drawn(1, 256), drawn(3, 256)):
        with pytest.raises(Exception, match="another number of tables"):
            opened(joining([[1, 2, 2, 3]] * 2, tables))
    with pytest.raises(Exception, match="too many maps"):
        opened(joining([[1, 2]] * 65, drawn(65, 256)))


@pytest.mark.parametrize("shapes", [[(1, 2, 2, 3), (1, 2, 3, 3)], [(1, 4, 3), (4, 3)], [(), ()]])
def test_maps_that_do_not_fit_are_refused_when_it_runs(shapes):
    running = opened(joining([[None] * len(s) for s in shapes], drawn(2, 256)))
    with pytest.raises(Exception, match="differ in more than their channels"):
        running.run(None, {f"x{i}": drawn(*s) for i, s in enumerate(shapes)})
