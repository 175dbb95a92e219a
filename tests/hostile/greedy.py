"""ONNX files of some hundred bytes that are valid, take an image and have a detector's output, and ask for gigabytes or
for hours on the way: of constants, of the image's shape, of the image."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper

GIGABYTES_4 = "n = Constant<value = int64[1] {1073741824}>() one = Constant<value = float[1] {1.0}>()"
MEMORY = {
    "ConstantOfShape": f"{GIGABYTES_4} big = ConstantOfShape(n)",
    "Expand": f"{GIGABYTES_4} big = Expand(one, n)",
    "Tile": f"{GIGABYTES_4} big = Tile(one, n)",
    "Range": "a = Constant<value = float {0.0}>() z = Constant<value = float {1073741824.0}>()"
             " s = Constant<value = float {1.0}>() big = Range(a, z, s)",
    "OneHot": "d = Constant<value = int64[1] {1073741824}>() v = Constant<value = float[2] {0.0, 1.0}>()"
              " i = Constant<value = int64[1] {5}>() big = OneHot(i, d, v)",
    "the image's shape": "n = Shape(x) k = Constant<value = int64[4] {1, 100, 8, 100}>() p = Mul(n, k)"
                         " big = ConstantOfShape(p)",
    "Resize": "e = Constant<value = float[0] {}>() k = Constant<value = float[4] {1.0, 1.0, 300.0, 300.0}>()"
              " big = Resize(x, e, k)",
    "Pad": "k = Constant<value = int64[8] {0, 0, 9999, 9999, 0, 0, 9999, 9999}>() big = Pad(x, k)",
    "MatMul": "n = Constant<value = int64[2] {40000, 1}>() a = ConstantOfShape(n) b = Transpose<perm = [1, 0]>(a)"
              " big = MatMul(a, b)",
    "outputs of a Loop": "n = Constant<value = int64 {100000}>() c = Constant<value = bool {1}>()"
                         " big = Loop<body = b (int64 i, bool c_in) => (bool c_out, float[1, 3, 64, 64] v)"
                         " { c_out = Identity(c_in) v = Abs(x) }>(n, c)",
    "outputs of a Scan": "k1 = Constant<value = int64[2] {100000, 1}>()"
                         " f = Constant<value = float[1] {1.0}>() s = Expand(f, k1)"
                         " d = Constant<value = int64[1] {20000}>()"
                         " big = Scan<num_scan_inputs = 1, body = b (float[1] v) => (float[20000] vv)"
                         " { vv = Expand(v, d) }>(s)",
    "text": "n = Constant<value = int64[1] {100000000}>() s = Constant<value_strings = [\"1\"]>()"
            " t = Expand(s, n) big = Cast<to = 1>(t)",
    "a sequence": "n = Constant<value = int64 {100000}>() c = Constant<value = bool {1}>() q = SequenceConstruct(x)"
                  " z = Constant<value = int64 {0}>()"
                  " grown = Loop<body = b (int64 i, bool c_in, seq(float[1, 3, 64, 64]) q_in)"
                  " => (bool c_out, seq(float[1, 3, 64, 64]) q_out)"
                  " { c_out = Identity(c_in) q_out = SequenceInsert(q_in, x) }>(n, c, q) big = SequenceAt(grown, z)",
    "many of 512 MB": "n = Constant<value = int64[1] {134217728}>() "
                      + " ".join(f"b{i} = ConstantOfShape(n)" for i in range(12))
                      + f" big = Concat<axis = 0>({', '.join(f'b{i}' for i in range(12))})",
}  # fmt: skip
ENDLESS = """n = Constant<value = int64 {9000000000000000000}>() c = Constant<value = bool {1}>()
    z = Constant<value = float {0.0}>()
    big = Loop<body = b (int64 i, bool c_in, float v_in) => (bool c_out, float v_out)
    { c_out = Identity(c_in) v_out = Abs(v_in) }>(n, c, z)"""


def greedy(body: str) -> bytes:
    """A file that computes the value `big` of the image x (1, 3, 64, 64) on the way to its output (1, 3, 6)."""
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 17]>
        agraph (float[1, 3, 64, 64] x) => (float[1, 3, 6] out) {{
        {body} r = ReduceMax<keepdims = 0>(big) y = Conv(x, w) m = ReduceMax<axes = [3], keepdims = 0>(y)
        st = Constant<value = int64[1] {{0}}>() en = Constant<value = int64[1] {{6}}>()
        ax = Constant<value = int64[1] {{2}}>() sl = Slice(m, st, en, ax) out = Add(sl, r) }}""")
    model.graph.initializer.append(numpy_helper.from_array(np.full((3, 3, 1, 1), 1 / 8, np.float32), "w"))
    model.metadata_props.add(key="names", value="{0: 'a'}")
    return bytes(model.SerializeToString())


def large_images() -> Iterator[bytes]:
    """Files of nothing but a large input."""
    for shape in ([1, 3, 8192, 8192], [64, 3, 640, 640]):
        given = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)
        made = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, None)
        graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", ["x"], ["y"])], "g", [given], [made])
        opset = [onnx.helper.make_opsetid("", 17)]
        yield onnx.helper.make_model(graph, opset_imports=opset, ir_version=8).SerializeToString()
