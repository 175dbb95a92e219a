"""Damage to files' bytes, and to what lies inside of archives, headers and graphs, by a random generator."""

from __future__ import annotations

import json
import random
import re
import struct
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from safetensors import safe_open
from safetensors.numpy import save

from dsconvert.base.seal import DIGEST, seal
from dsconvert.base.sealed import DAMAGE

INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"-1", b"1e999",
               b"nan", b"[" * 50, b"\x1b[31m", b"../../", b"&a *a", b"<<: ", b"!!python/name:os.system ")  # fmt: skip
NUMBERS = ("0", "-1", "1", "2", "3.5", "1e30", "NaN", "null", "true", "[]", "99999999999999999999", '"a"')
INTEGERS = (-1, 0, 1, 2, 3, 4, 5, 7, 8, 16, 99, 65535, 1 << 20, 1 << 31, (1 << 63) - 1, -(1 << 63))


def damage(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to six random changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = rng.choice(INTERESTING) * rng.choice((1, 1, 1, 100))
        elif kind == 4:
            word = rng.choice(INTERESTING)
            out[place : place + len(word)] = word
        elif kind == 5:
            out[place:place] = out[place : place + length] * rng.choice((1, 2, 50))
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[place : place + length] = other[start : start + length]
    return bytes(out[: rng.randrange(len(out) + 1)]) if rng.random() < 0.05 else bytes(out)


def inside_archive(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose pickle alone is damaged, and all of whose checksums are right again."""
    with tempfile.TemporaryFile() as buffer:
        buffer.write(data)
        with zipfile.ZipFile(buffer) as source:
            entries = {i.filename: source.read(i) for i in source.infolist()}
    pickle = next(n for n in entries if n.endswith("data.pkl"))
    entries[pickle] = damage(entries[pickle], [entries[pickle]], rng)
    with tempfile.TemporaryFile() as buffer:
        with zipfile.ZipFile(buffer, "w") as target:
            for name, content in entries.items():
                target.writestr(name, content)
        buffer.seek(0)
        return buffer.read()


def inside_header(key: str) -> Callable[[bytes, random.Random], bytes]:
    """A safetensors file whose JSON under `key` alone is damaged, and whose length is right again."""

    def inside(data: bytes, rng: random.Random) -> bytes:
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        text = table["__metadata__"][key]
        changed = damage(text.encode(), [text.encode()], rng).decode("utf-8", "replace")
        if rng.random() < 0.7:  # also numbers alone: then it is JSON still
            numbers = [m.span() for m in re.finditer(r"-?\d+(\.\d+)?", text)]
            start, end = rng.choice(numbers)
            changed = text[:start] + rng.choice(NUMBERS) + text[end:]
        table["__metadata__"][key] = changed
        header = json.dumps(table).encode()
        return resealed(struct.pack("<Q", len(header)) + header + data[8 + length :], key)

    return inside


def resealed(data: bytes, key: str) -> bytes:
    """A file with a digest (see `dsconvert.base.seal`) made right again, so that what it says is looked at; any other
    file, and one that cannot be read, as it is."""
    try:
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            Path(file.name).write_bytes(data)
            with safe_open(file.name, framework="numpy") as stored:
                about = json.loads((stored.metadata() or {})[key])
                tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
        del about[DIGEST]
        return save(tensors, {key: seal(about, tensors)})
    except DAMAGE:
        return data


def anywhere(key: str) -> Callable[[bytes, random.Random], bytes]:
    """Damage anywhere in a safetensors file, every second time with its digest made right again."""

    def inside(data: bytes, rng: random.Random) -> bytes:
        changed = damage(data, [data], rng)
        return resealed(changed, key) if rng.random() < 0.5 else changed

    return inside


def inside_graph(data: bytes, rng: random.Random) -> bytes:
    """An ONNX file with one to four things of its graph changed: it can be parsed, and often even run."""
    model = onnx.load_from_string(data)
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        rng.choice(LEGAL_CHANGES if rng.random() < 0.7 else GRAPH_CHANGES)(model, rng)
    return model.SerializeToString()


def _node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    nodes = list(model.graph.node)
    nodes += [inner for n in nodes for a in n.attribute for inner in a.g.node]
    return rng.choice(nodes) if nodes else model.graph.node.add()


def _rewire(model: onnx.ModelProto, rng: random.Random) -> None:
    node, names = _node(model, rng), ["", *(t.name for t in model.graph.initializer)]
    names += [name for n in model.graph.node for name in n.output]
    side = node.input if rng.random() < 0.8 else node.output
    if side and rng.random() < 0.8:
        side[rng.randrange(len(side))] = rng.choice(names)
    elif side and rng.random() < 0.5:
        side.pop()
    else:
        side.append(rng.choice(names))


def _move(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = list(model.graph.node)
    if nodes:
        moved = nodes.pop(rng.randrange(len(nodes))) if rng.random() < 0.7 else rng.choice(nodes)
        if rng.random() < 0.5:
            nodes.insert(rng.randrange(len(nodes) + 1), moved)
        del model.graph.node[:]
        model.graph.node.extend(nodes)


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if not node.attribute:
        node.attribute.append(onnx.helper.make_attribute(rng.choice(("group", "axis", "to", "alpha")), 2))
        return
    a = node.attribute[rng.randrange(len(node.attribute))]
    if rng.random() < 0.2:
        node.attribute.remove(a)
    elif a.ints:
        a.ints[rng.randrange(len(a.ints))] = rng.choice(INTEGERS)
    elif rng.random() < 0.2:
        a.type = rng.choice(list(onnx.AttributeProto.AttributeType.values()))
    elif a.type == onnx.AttributeProto.INT:
        a.i = rng.choice(INTEGERS)
    else:
        a.f, a.s = rng.choice((0.0, -1.0, 1e38, float("nan"))), rng.choice((b"SAME_UPPER", b"\xff", b""))


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _node(model, rng)
    if rng.random() < 0.1:
        node.domain = rng.choice(("ai.onnx", "com.microsoft", "\x1b[31m"))
    else:
        node.op_type = rng.choice(("Conv", "Gemm", "MatMul", "Add", "Relu", "Identity", "If", "Loop", "Transpose",
                                   "Reshape", "Constant", "Shape", "Concat", "Resize", "\x1b[31m"))  # fmt: skip


def _tensor(model: onnx.ModelProto, rng: random.Random) -> None:
    tensors = [*model.graph.initializer, *(a.t for n in model.graph.node for a in n.attribute if a.HasField("t"))]
    tensor, kind = rng.choice(tensors), rng.randrange(6)
    if kind == 0 and tensor.dims:
        tensor.dims[rng.randrange(len(tensor.dims))] = rng.choice(INTEGERS)
    elif kind == 1:
        tensor.dims[:] = rng.choice(([], [0], [1], [1 << 40, 1 << 40], [*tensor.dims[::-1]], [1, *tensor.dims]))
    elif kind == 2:
        tensor.data_type = rng.randrange(26)
    elif kind == 3:
        tensor.name = rng.choice(("", "x", "y", "w", "\x1b[31m"))
    elif kind == 4:
        tensor.raw_data = damage(tensor.raw_data, [tensor.raw_data], rng)
    else:
        special = struct.pack("<f", rng.choice((0.0, float("nan"), float("inf"), 3e38, 1e-45)))
        tensor.raw_data = special * (len(tensor.raw_data) // 4)


def _frame(model: onnx.ModelProto, rng: random.Random) -> None:
    kind = rng.randrange(5)
    if kind == 0:
        model.opset_import[rng.randrange(len(model.opset_import))].version = rng.choice((0, 1, 6, 7, 9, 11, 21, 99, -1))
    elif kind == 1:
        model.ir_version = rng.choice((0, 1, 3, 4, 99, -1))
    elif kind == 2:
        value = rng.choice([*model.graph.input, *model.graph.output])
        shape = value.type.tensor_type.shape
        if shape.dim and rng.random() < 0.7:
            shape.dim[rng.randrange(len(shape.dim))].dim_value = rng.choice(INTEGERS)
        else:
            value.type.tensor_type.elem_type = rng.randrange(26)
    elif kind == 3:
        model.graph.output.append(onnx.ValueInfoProto(name=rng.choice([*_node(model, rng).output, "x", "w"])))
    elif model.graph.output:
        del model.graph.output[rng.randrange(len(model.graph.output))]


def _between(model: onnx.ModelProto, rng: random.Random) -> None:
    """One more node before one of a node's inputs."""
    place = rng.randrange(len(model.graph.node))
    node = model.graph.node[place]
    if not node.input:
        return
    at, free = rng.randrange(len(node.input)), f"free{rng.randrange(1 << 30)}"
    kind = rng.choice(("Relu", "Identity", "Neg", "Sigmoid", "Exp", "Sqrt", "Log", "Dropout", "Shape", "Size", "Round"))
    model.graph.node.insert(place, onnx.helper.make_node(kind, [node.input[at]], [free]))
    model.graph.node[place + 1].input[at] = free


def _twice(model: onnx.ModelProto, rng: random.Random) -> None:
    """A node's like, added behind it to what it makes or to another output."""
    place = rng.randrange(len(model.graph.node))
    again = onnx.NodeProto()
    again.CopyFrom(model.graph.node[place])
    again.name, again.output[0] = "", f"free{rng.randrange(1 << 30)}"
    model.graph.node.insert(place + 1, again)
    model.graph.output.append(onnx.ValueInfoProto(name=again.output[0]))


def _stored(model: onnx.ModelProto, rng: random.Random) -> None:
    """A stored tensor as a Constant node, as an input with a default, or with special values."""
    if not model.graph.initializer:
        return
    at = rng.randrange(len(model.graph.initializer))
    tensor, kind = model.graph.initializer[at], rng.randrange(3)
    if kind == 0:
        node = onnx.helper.make_node("Constant", [], [tensor.name], value=tensor)
        del model.graph.initializer[at]
        model.graph.node.insert(0, node)
    elif kind == 1:
        shape = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
        model.graph.input.insert(rng.randrange(len(model.graph.input) + 1), shape)
    else:
        values = onnx.numpy_helper.to_array(tensor) * np.float32(rng.choice((0, 1e-30, 1e-45, 1e30, 1e38, -1)))
        tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def _convolution(model: onnx.ModelProto, rng: random.Random) -> None:
    """Other strides, dilations or padding, as they may be."""
    nodes = [n for n in model.graph.node if n.op_type == "Conv"]
    if not nodes:
        return
    node, key = rng.choice(nodes), rng.choice(("strides", "dilations", "pads", "auto_pad"))
    for a in [a for a in node.attribute if a.name in (key, "auto_pad")]:
        node.attribute.remove(a)
    ways = ("SAME_UPPER", "SAME_LOWER", "VALID", "NOTSET")
    count, most = (4, 6) if key == "pads" else (2, 4)
    value = rng.choice(ways) if key == "auto_pad" else [rng.randint(key != "pads", most) for _ in range(count)]
    node.attribute.append(onnx.helper.make_attribute(key, value))


LEGAL_CHANGES = (_between, _twice, _stored, _convolution)
GRAPH_CHANGES = (_rewire, _rewire, _move, _attribute, _attribute, _operator, _tensor, _tensor, _frame)
