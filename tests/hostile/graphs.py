"""ONNX files no one should trust."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from case import EVIL_NAMES, Case
from onnx import TensorProto, helper


def onnx_files(good: onnx.ModelProto, folder: Path) -> Iterator[Case]:
    """Files that point elsewhere, go in circles, or have other ends than a detector's."""
    (folder / "inside.bin").write_bytes(bytes(4096))
    (folder / "link.bin").symlink_to("/etc/passwd")
    outside, unusable = "outside of its own folder", "not an ONNX file"
    yield Case("onnx untouched", good.SerializeToString(), None)
    for what, location in {
        "absolute": "/etc/passwd", "up": "../../../../../../etc/passwd", "up and down": "a/../../x/y.bin",
        "a link": "link.bin", "the folder": ".", "device": "/dev/zero", "escape": "/\x1b[31m", "nul": "a\0b",
        "empty": "",
    }.items():  # fmt: skip
        yield Case(f"external data: {what}", external(good, location), outside)
    yield Case("external data in a node", external_constant(good, "/etc/passwd"), outside)
    yield Case("external data in a branch", external_branch(good, "/etc/passwd"), outside)
    yield Case("external data in a function", external_function(good, "../x.bin"), outside)
    yield Case("external data inside, too short", external(good, "inside.bin", length=1 << 40), unusable)
    for what, data in {"empty": b"", "text": b"hello", "zeros": bytes(1000), "cut": good.SerializeToString()[:-1000],
                       "pickle": b"\x80\x02cposix\nsystem\n.", "deep": deep(), }.items():  # fmt: skip
        yield Case(f"onnx: {what}", data, f"{unusable}|does not take one image")
    yield Case("onnx: a circle of weights", circle(good), unusable)
    yield Case("onnx: 2^60 paths to a weight", doubled(good), unusable)
    yield Case("onnx: weights of 2^60", large(good, [1 << 30, 1 << 30]), unusable)
    yield Case("onnx: weights of 2^1240", large(good, [1 << 62] * 20), unusable)
    for what, model, words in ends():
        yield Case(f"onnx: {what}", model.SerializeToString(), words)
    for what, names, words in (
        ("code", "__import__('os').system('id')", "no readable classes"),
        ("deep", "[" * 100_000, "no readable classes"),
        ("minus", "-" * 100_000 + "1", "no readable classes"),
        ("2 MB", "[" + "'a'," * 500_000 + "]", "no readable|output"),
        ("a number", "5", None), ("escapes", str(dict(enumerate(EVIL_NAMES))), None),
    ):  # fmt: skip
        model = copy.deepcopy(good)
        next(p for p in model.metadata_props if p.key == "names").value = names
        yield Case(f"onnx names: {what}", model.SerializeToString(), words)


def point(tensor: TensorProto, location: str, length: int) -> None:
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
        entry = tensor.external_data.add()
        entry.key, entry.value = key, value


def external(good: onnx.ModelProto, location: str, length: int = 512) -> bytes:
    model = copy.deepcopy(good)
    point(max(model.graph.initializer, key=lambda t: len(t.raw_data)), location, length)
    return model.SerializeToString()


def elsewhere(location: str) -> TensorProto:
    tensor = helper.make_tensor("evil", TensorProto.FLOAT, [8], np.zeros(8, np.float32))
    tensor.ClearField("float_data")
    point(tensor, location, 32)
    return tensor


def external_constant(good: onnx.ModelProto, location: str) -> bytes:
    model = copy.deepcopy(good)
    model.graph.node.insert(0, helper.make_node("Constant", [], ["evil"], value=elsewhere(location)))
    return model.SerializeToString()


def external_branch(good: onnx.ModelProto, location: str) -> bytes:
    model = copy.deepcopy(good)
    out = helper.make_tensor_value_info("evil", TensorProto.FLOAT, [8])
    branch = helper.make_graph([], "branch", [], [out], [elsewhere(location)])
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    model.graph.initializer.append(condition)
    model.graph.node.insert(0, helper.make_node("If", ["yes"], ["chosen"], then_branch=branch, else_branch=branch))
    return model.SerializeToString()


def external_function(good: onnx.ModelProto, location: str) -> bytes:
    model = copy.deepcopy(good)
    node = helper.make_node("Constant", [], ["y"], value=elsewhere(location))
    model.functions.append(helper.make_function("x", "F", [], ["y"], [node], [helper.make_opsetid("", 21)]))
    return model.SerializeToString()


def deep() -> bytes:
    """Graphs within graphs, 300 deep."""
    data = b""
    for _ in range(300):
        for tag in (0x32, 0x2A, 0x0A):  # attribute's graph, node's attribute, graph's node
            size, length = len(data), b""
            while size > 127:
                length += bytes([size & 127 | 128])
                size >>= 7
            data = bytes([tag]) + length + bytes([size]) + data
    return b"\x3a" + data[1:]


def circle(good: onnx.ModelProto) -> bytes:
    model = copy.deepcopy(good)
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    conv.input[1] = "round"
    model.graph.node.append(helper.make_node("Add", ["round", "about"], ["round"]))
    model.graph.node.append(helper.make_node("Reshape", ["round", "round"], ["about"]))
    return model.SerializeToString()


def doubled(good: onnx.ModelProto) -> bytes:
    """The first weight, added to itself 60 times: 2^60 paths, and no convolution an engine would find."""
    model = copy.deepcopy(good)
    index, conv = next((i, n) for i, n in enumerate(model.graph.node) if n.op_type == "Conv")
    last = conv.input[1]
    for step in range(60):
        model.graph.node.insert(index + step, helper.make_node("Concat", [last, last], [f"twice{step}"], axis=9))
        last = f"twice{step}"
    conv = next(n for n in model.graph.node if n.op_type == "Conv")
    conv.input[1] = last
    return model.SerializeToString()


def large(good: onnx.ModelProto, dims: list[int]) -> bytes:
    model = copy.deepcopy(good)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.dims[:] = dims
    return model.SerializeToString()


def ends() -> Iterator[tuple[str, onnx.ModelProto, str]]:
    """Small graphs with unusual inputs and outputs."""
    image, kinds = ["n", 3, "h", "w"], TensorProto

    def model(*inputs: tuple[int, list[Any] | None], op: str = "Identity", out: int = kinds.FLOAT) -> onnx.ModelProto:
        given = [helper.make_tensor_value_info(f"x{i}", k, s) for i, (k, s) in enumerate(inputs)]
        made = [helper.make_tensor_value_info("y", out, None)]
        nodes = [helper.make_node(op, ["x0"] if inputs else ["c"], ["y"])]
        constant = [] if inputs else [helper.make_tensor("c", kinds.FLOAT, [1], [1.0])]
        graph = helper.make_graph(nodes, "g", given, made, constant)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)

    other = "does not take one image|not an ONNX file"
    yield "no input", model(), other
    yield "two inputs", model((kinds.FLOAT, image), (kinds.FLOAT, image)), other
    yield "a scalar", model((kinds.FLOAT, [])), other
    yield "a matrix", model((kinds.FLOAT, [1, 3])), other
    yield "any rank", model((kinds.FLOAT, None)), other
    yield "text", model((kinds.STRING, image), out=kinds.STRING), other
    yield "doubles", model((kinds.DOUBLE, image), out=kinds.DOUBLE), other
    yield "of 10^9 pixels", model((kinds.FLOAT, [1, 3, 10**9, 10**9])), "images of shape|not an ONNX"
    yield "of 10^9 images", model((kinds.FLOAT, [10**9, 3, 64, 64])), "images of shape|not an ONNX"
    yield "of 0 pixels", model((kinds.FLOAT, [1, 3, 0, 0])), "images of shape|not an ONNX"
    yield "of 4 channels", model((kinds.FLOAT, [1, 4, 64, 64])), "images of shape"
