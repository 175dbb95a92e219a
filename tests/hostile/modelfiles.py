"""Model files (safetensors) no one should trust."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from case import Case
from fuzz_damage import resealed


def raw_safetensors(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


class Opened:
    """A model file taken apart: its tensors as (type, shape, bytes), and the JSON of its header."""

    def __init__(self, data: bytes, key: str = "dsconvert") -> None:
        self.key = key
        (length,) = struct.unpack("<Q", data[:8])
        table = json.loads(data[8 : 8 + length])
        self.json = json.loads(table.pop("__metadata__")[key])
        body = data[8 + length :]
        self.tensors = {n: [t["dtype"], t["shape"], body[slice(*t["data_offsets"])]] for n, t in table.items()}

    def bytes(self, text: str | None = None) -> bytes:
        table: dict[str, Any] = {"__metadata__": {self.key: text if text is not None else json.dumps(self.json)}}
        body = b""
        for name, (kind, shape, data) in self.tensors.items():
            table[name] = {"dtype": kind, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
            body += data
        return raw_safetensors(json.dumps(table).encode(), body)


def model_files(good: bytes) -> Iterator[Case]:
    """Damage to the container, then to each thing its header says."""
    unreadable = "not a readable safetensors"
    for what, data in {
        "empty": b"", "short": b"12", "length 2^63": struct.pack("<Q", 1 << 63) + b"{}",
        "length 90 MB": struct.pack("<Q", 90 << 20) + b"{}", "not JSON": raw_safetensors(b"hello"),
        "deep JSON": raw_safetensors(b"[" * 100_000), "pickle": b"\x80\x02cposix\nsystem\n(X\x02\x00\x00\x00idtR.",
        "shape of 2^60": raw_safetensors(b'{"a":{"dtype":"F32","shape":[1152921504606846976],"data_offsets":[0,4]}}'),
        "overlap": raw_safetensors(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},'
                                   b'"b":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}', bytes(4)),
        "offsets reversed": raw_safetensors(b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[4,0]}}', bytes(4)),
        "a file for 1 MB": good[: len(good) // 2],
    }.items():  # fmt: skip
        yield Case(f"safetensors {what}", data, unreadable)
    yield Case("safetensors of another kind", raw_safetensors(b'{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}',
               b"1"), "not one made by dsconvert")  # fmt: skip
    yield Case("safetensors untouched", good, None)
    yield Case("safetensors with its digest made again", changed(good, lambda m: None), None)
    yield Case("no digest", changed(good, lambda m: m.json.pop("digest")), "is damaged")
    yield Case("a digest of another file", Opened(good).bytes(), "is damaged: its content does not match its checksum")
    yield Case(
        "a digest of no kind", Opened(good).bytes(json.dumps({**Opened(good).json, "digest": [1]})), "is damaged"
    )
    yield Case("a part of no kind", changed(good, put({}, "digesu")), "is damaged")
    for what, text in {"text": "hello", "nothing": "", "deep": "[" * 200_000, "a list": "[]", "a number": "5",
                       "10^5000": "1" * 5000}.items():  # fmt: skip
        yield Case(f"header {what}", Opened(good).bytes(text), "is damaged")
    yield Case("header of 20 MB", Opened(good).bytes(" " * (20 << 20)), "larger header")
    yield Case("version of another time", changed(good, lambda m: m.json.update(version="\x1b[31m")), r"version '\\x1b")
    for what, change in changes().items():
        yield Case(f"model: {what}", changed(good, change), "is damaged")


def changed(good: bytes, change: Callable[[Opened], Any]) -> bytes:
    """With a digest that is right, so that what it says is looked at."""
    opened = Opened(good)
    change(opened)
    return resealed(opened.bytes(), opened.key)


def put(value: Any, *path: Any) -> Callable[[Opened], None]:
    """Another value at this place of the header's JSON."""

    def change(m: Opened) -> None:
        place = m.json
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = value

    return change


def floats(name: str, value: float) -> Callable[[Opened], None]:
    """A tensor of this value alone."""

    def change(m: Opened) -> None:
        kind, shape, data = m.tensors[name]
        m.tensors[name] = [kind, shape, np.full(len(data) // 4, value, np.float32).tobytes()]

    return change


def added(name: str, kind: str, shape: list[int], value: float) -> Callable[[Opened], None]:
    """One tensor more, or another in its place, of this value alone."""
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I32": np.int32, "I8": np.int8, "U8": np.uint8}

    def change(m: Opened) -> None:
        m.tensors[name] = [kind, shape, np.full(shape, value, kinds[kind]).tobytes()]

    return change


def changes() -> dict[str, Callable[[Opened], Any]]:
    """One thing wrong in each."""

    def node(op: str, **attrs: Any) -> Callable[[Opened], None]:
        return lambda m: next(n for n in m.json["graph"]["nodes"] if n["op"] == op)["attrs"].update(attrs)

    def layer(key: str, value: Any) -> Callable[[Opened], None]:
        return lambda m: m.json["layers"]["model.2.cv1.conv"].update({key: value})

    head, nodes, grids = "head", ("graph", "nodes"), "activations"
    bomb: list[Any] = []
    for _ in range(500):
        bomb = [bomb]
    return {
        **{f"{key} missing": (lambda k: lambda m: m.json.pop(k))(key) for key in
           ("version", "imgsz", "head", "provenance", "graph", "layers", "activations")},
        **{f"{key} a number": put(5, key) for key in ("head", "provenance", "graph", "layers", "activations")},
        **{f"image size {n}": put(n, "imgsz") for n in (
            0, -64, 63, 1 << 40, "64px", "64", None, True, 1e400, 64.0, [64], [64, 64], [64, 60], [60, 64], [64, -64],
            [64, 32.0], ["64", 32], [64, 32, 3], [1 << 40, 64])},
        "no classes": put([], head, "names"),
        "names nested": put([bomb, "b"], head, "names"), "100000 classes": put(["a"] * 100_000, head, "names"),
        **{f"strides {s}": put(s, head, "strides") for s in ([], [0, 8], [-4, 8], [4], [4, 16], [4, 8, 16],
           [1e400, 8])},
        "no anchors": put([], head, "anchors"), "anchors of 0": put([[[0, 0]] * 3] * 2, head, "anchors"),
        "anchors ragged": put([[[1, 1]] * 3, [[1, 1]] * 2], head, "anchors"),
        "anchors NaN": put([[[float("nan"), 1]] * 3] * 2, head, "anchors"),
        "anchors of 10^30": put([[[1e30, 1]] * 3] * 2, head, "anchors"),
        "a loop": put(["model.0.conv"], *nodes, 0, "inputs"), "an unknown input": put(["x"], *nodes, 0, "inputs"),
        "two inputs of a conv": put(["images", "images"], *nodes, 0, "inputs"),
        "an input of no kind": put([["images"]], *nodes, 0, "inputs"),
        "an unknown op": put("system", *nodes, 0, "op"), "a name with an escape": put("\x1b[31m", *nodes, 0, "name"),
        "a name of no kind": put(["a"], *nodes, 0, "name"), "no nodes": put([], *nodes),
        "no outputs": put([], "graph", "outputs"),
        "outputs of another layer": put(["model.0.conv"] * 4, "graph", "outputs"),
        "outputs missing one": lambda m: m.json["graph"]["outputs"].pop(),
        "6000 nodes": lambda m: m.json["graph"]["nodes"].extend(
            {"op": "act", "name": f"n{i}", "inputs": ["images"], "attrs": {"kind": "SiLU"}} for i in range(6000)),
        **{f"conv stride {v}": node("conv", stride=v) for v in (0, -1, 1.5, "2", 10**9, None, [2, 2], True)},
        **{f"conv padding {v}": node("conv", padding=v) for v in (-1, 10**9)},
        **{f"conv groups {v}": node("conv", groups=v) for v in (0, 7, 10**9)},
        "an attribute too many": node("conv", auto_pad="SAME"),
        "an attribute missing": lambda m: m.json["graph"]["nodes"][0]["attrs"].pop("stride"),
        "an activation of code": node("act", kind="__import__('os').system('id')"),
        "an activation of no kind": node("act", kind=["SiLU"]), "pool of 10^9": node("maxpool", kernel=10**9),
        "pool of even size": node("maxpool", kernel=4), "upsampling by 10^9": node("upsample", scale=10**9),
        "upsampling by 16": node("upsample", scale=16),
        **{f"shape {s}": layer("shape", s) for s in ([], [8, 16, 1], [0, 16, 1, 1], [-8, -16, 1, 1], [8, 17, 1, 1],
           [1 << 40, 1 << 40, 1, 1], [1 << 32, 1 << 32, 1, 1], "8x16")},
        **{f"bits {b}": layer("bits", b) for b in (0, -4, 1, 5, 9, 64, 10**9, None)},
        "no bits for a large shape": lambda m: (layer("bits", 0)(m), layer("shape", [1 << 16, 1 << 16, 1, 1])(m),
                                                m.tensors.__setitem__("model.2.cv1.conv.vqk", ["U8", [0], b""])),
        **{f"block size {b}": layer("block_size", b) for b in (0, -1, 1 << 20, 10**12, None)},
        "a layer missing": lambda m: m.json["layers"].pop("model.2.cv1.conv"),
        "a tensor missing": lambda m: m.tensors.pop("model.2.cv1.conv.cdsw"),
        "a tensor of another type": lambda m: m.tensors["model.2.cv1.conv.cdsw"].__setitem__(0, "I32"),
        "weights of another type": lambda m: m.tensors["model.2.cv1.conv.vqk"].__setitem__(0, "I8"),
        **{f"scales of {v}": floats("model.2.cv1.conv.cdsw", v) for v in
           (float("nan"), float("inf"), 0, -1, 1e-45, 1e-38, 3e38)},
        **{f"biases of {v}": floats("model.2.cv1.conv.cdsb", v) for v in (float("nan"), float("-inf"), 3e38, -3e38)},
        "biases beyond the sums": floats("model.2.cv1.conv.cdsb", 1e9),
        "a tensor too many": added("model.2.cv1.conv.more", "F32", [1], 1),
        "a tensor of no layer": added("x", "F32", [1], 1), "a tensor of another layer": added("y.cdsw", "F32", [1], 1),
        "a layer too many": lambda m: m.json["layers"].update(y=m.json["layers"]["model.2.cv1.conv"]),
        **{f"{part} of {kind}": added(f"model.2.cv1.conv.{part}", kind, [8, 1, 1, 1], value) for part, kind, value in (
           ("kdsb", "I8", 1), ("alpha", "F64", 1), ("alpha", "F16", 1),
           ("alpha", "I32", 1), ("alpha", "F32", 1), ("code", "U8", 1))},
        "shifts of another shape": lambda m: m.tensors["model.2.cv1.conv.kds"].__setitem__(1, [2, 2]),
        "a grid missing": lambda m: m.json[grids].pop("model.0.conv"),
        **{f"grid {g}": put(g, grids, "model.0.conv") for g in ([0, 0], [-1, 0], [1e-40, 0], [1e-30, 0], [1e30, 0],
           [1e40, 0], [0.1, 256],
           [0.1, -1], [float("nan"), 0], [0.1], "ab", [0.1, 0, 0])},
        "source a list": put(["a"], "provenance", "source"), "options a text": put("x", "provenance", "options"),
        "calib a list": put({"calib": ["/etc"]}, "provenance", "options"),
        "damage a number": put(5, "provenance", "damage"),
        "damage of another layer": put({"x": {"4": 1.0}}, "provenance", "damage"),
        "damage without bits": put({"model.2.cv1.conv": {}}, "provenance", "damage"),
        "damage NaN": put({"model.2.cv1.conv": {"4": float("nan")}}, "provenance", "damage"),
    }  # fmt: skip
