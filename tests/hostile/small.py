"""Small files that held a machine for minutes, or took gigabytes: each with the commands that read it."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zlib import compress

import onnx
from forge import archive, text
from onnx import TensorProto, helper
from pictures import chunk, saved
from PIL import Image

DETECT, COMPARE = ["detect", "{}", "images"], ["compare", "{}", "{}", "images"]
BENCH, EVAL = ["bench", "{}", "--threads", "1", "--runs", "20"], ["eval", "{}", "--data", "images", "--threads", "1"]
QUANTIZE, INFO = ["quantize", "{}", "--calib", "images"], ["info", "{}"]
EVERY = [DETECT, COMPARE, BENCH, EVAL, QUANTIZE]
TOO_MUCH, TOO_LARGE = r"needs over \d+ MB of memory", r"takes \[.*\] numbers at once"
TWICE = "}" + ")q\0" + 40 * "h\0\x86q\0" + "Ns."  # each tuple twice in the next


@dataclass(frozen=True)
class Small:
    """A file, written by `write` under its name, the commands that read it ({} is the file), and the words of their
    refusal (None: they do their work)."""

    name: str
    write: Callable[[Path], object]
    commands: list[list[str]]
    words: str | None


def of(data: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(data)


def pickled() -> Iterator[Small]:
    key = "not pickled like a PyTorch checkpoint"
    prime = (1 << 61) - 1
    ints = b"".join(b"\x8a\x0b" + (prime * (i + 1)).to_bytes(11, "little") + b"N" for i in range(120_000))
    for name, data in {
        "tuples": b"\x80\x02" + TWICE.encode("latin-1"),
        "integers": b"\x80\x02}(" + ints + b"u.",
    }.items():
        yield Small(f"{name}.pt", of(archive(data, {})), [INFO, ["quantize", "{}"], DETECT], key)
    old = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    facts = b"\x80\x02}(" + text("little_endian") + b"\x88u."
    yield Small("legacy.pt", of(old + facts + b"\x80\x02" + TWICE.encode("latin-1") + b"\x80\x02]."), [INFO], key)


def detector(body: str, side: str = "64, 64", out: str = "1, 3, 6", names: str = "{0: 'a'}", **more: str) -> bytes:
    """A file that takes an image x and makes `out` of it."""
    model = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["" : 18]>
        agraph (float[1, 3, {side}] x) => (float[{out}] out) {{ {body} }}""")
    model.metadata_props.add(key="names", value=names)
    for key, value in more.items():
        model.metadata_props.add(key=key.replace("_", "."), value=value)
    return bytes(model.SerializeToString())


def constant(shape: str, value: float = 0.9) -> str:
    """An output of this shape of one number, and a little of the image."""
    return f"""m = ReduceMin<keepdims = 0>(x) n = Constant<value = int64[{shape.count(",") + 1}] {{{shape}}}>()
        z = Constant<value = float {{0.0}}>() v = Constant<value = float {{{value}}}>() e = Expand(v, n)
        t = Mul(m, z) out = Add(e, t)"""


def named() -> Iterator[Small]:
    """Texts in Python's notation that take for ever to read."""
    unreadable, prime = "names no readable classes", (1 << 61) - 1
    ints = "{" + ", ".join(f"{prime * i}: 'a'" for i in range(1, 40_000)) + "}"
    body = constant("1, 3, 6")
    for name, value in {
        "integers": ints, "negative": ints.replace("{", "{-").replace(", ", ", -"), "sums": "1" + "+1" * 300_000,
        "dots": "a" + ".a" * 400_000, "calls": "a" + "()" * 400_000, "brackets": "[" * 500_000 + "]" * 500_000,
        "longer": "['" + "a" * (2 << 20) + "']", "joined": "['a'" + " 'a'" * 200_000 + "]",
        "million": "[" + "'a'," * 250_000 + "]",
        "floats": "{" + ", ".join(f"{i}.0: 'a'" for i in range(40_000)) + "}",
    }.items():  # fmt: skip
        yield Small(f"names-{name}.onnx", of(detector(body, names=value)), [DETECT], unreadable)
    nms = f"{{'confidence': {{{ints[1:-1]}}}}}"
    for name, value in {"integers": nms, "brackets": "[" * 100_000, "minus": "-" * 100_000 + "1",
                        "set": "{" + ints[1:-1].replace(": 'a'", "") + "}"}.items():  # fmt: skip
        data = detector(body, names="['a']", dsconvert_nms=value)
        yield Small(f"nms-{name}.onnx", of(data), [DETECT], "does not describe its non-maximum suppression readably")


def shaped() -> Iterator[Small]:
    """Inputs, outputs and prototypes that are larger than any network's."""
    for name, side in {"height": "h, 8192", "width": "8192, w", "both": "8192, 8192"}.items():
        data = detector(constant("1, 3, 6"), side)
        yield Small(f"open-{name}.onnx", of(data), EVERY, TOO_LARGE)
    yield Small("fine.onnx", of(detector(constant("1, 3, 6"))), [DETECT, BENCH, EVAL], None)
    wide = str([*range(7000)])
    for boxes, side, words in ((12000, "640, 640", TOO_MUCH), (12000, "64, 64", "does not have YOLOv5's output")):
        data = detector(constant(f"1, {boxes}, 7005"), side, f"1, {boxes}, 7005", wide)
        yield Small(f"wide-{boxes}-{side[:3].strip(',')}.onnx", of(data), [DETECT, EVAL], words)
        more = TOO_MUCH if words == TOO_MUCH else r"outputs of \d+ numbers; at most \d+ can be compared"
        yield Small(f"wider-{boxes}-{side[:3].strip(',')}.onnx", of(data), [COMPARE], more)
    for shape in ("1, 5, 20000", "1, 5, 200000"):
        data = detector(constant(shape), out=shape, names="")
        yield Small(f"classes-{shape[6:]}.onnx", of(data), [DETECT], "does not have YOLOv5's output")
        yield Small(f"compared-{shape[6:]}.onnx", of(data), [COMPARE], None)
    for shape in ("0, 5, 6", "1, 5, 4", "1, 5, 1", "1, 0, 1", "2, 5, 6", "1, 5, 0", "1, 5", "5", "1, 1, 5, 6"):
        data = detector(constant(shape), out=shape, names="")
        yield Small(f"output-{shape}.onnx", of(data), [DETECT, EVAL],
                    "does not have YOLOv5's output|does not say how many classes")  # fmt: skip
        yield Small(f"compared-{shape}.onnx", of(data), [COMPARE], None)
    for name, protos in {"5000": "1, 1, 5000, 5000", "many": "1, 1024, 320, 320", "long": "1, 1, 1, 100000",
                         "none": "1, 1, 0, 0"}.items():  # fmt: skip
        body = constant("1, 300, 7").replace("out = Add(e, t)", "out = Add(e, t) k = Constant<value = int64[4] {"
                                             + protos + "}>() p = Expand(v, k)")  # fmt: skip
        count = int(protos.split(", ")[1])
        data = detector(body.replace("1, 300, 7", f"1, 300, {6 + count}"), "640, 640", f"1, 300, {6 + count}")
        model = onnx.load_from_string(data)
        model.graph.output.append(
            helper.make_tensor_value_info("p", TensorProto.FLOAT, [int(n) for n in protos.split(", ")])
        )
        yield Small(f"prototypes-{name}.onnx", of(model.SerializeToString()), [DETECT, EVAL],
                    f"the outputs of YOLOv5's segmentation|{TOO_MUCH}|classes")  # fmt: skip


def many() -> Iterator[Small]:
    """Parts of two bytes by the million, and weights that all hang on each other."""
    graph = detector(constant("1, 3, 6"))
    for name, part, words in (
        ("nodes", b"\x0a\x00", "more than 100000 nodes"), ("initializers", b"\x2a\x00", "1000000 parts"),
        ("inputs", b"\x5a\x00", "1000000 parts"), ("outputs", b"\x62\x00", "1000000 parts"),
    ):  # fmt: skip
        data = part * 10_000_000
        yield Small(
            f"many-{name}.onnx", of(graph + field(7, data)), [*EVERY, INFO] if name == "nodes" else [INFO], words
        )
    attribute = field(2, b"") + b"\x4a\x00" * 10_000_000  # strings
    for name, data in {
        "strings": field(7, field(1, field(5, attribute))), "names": field(7, field(1, b"\x0a\x00" * 10_000_000)),
        "tensors": field(7, field(1, field(5, b"\x52\x00" * 10_000_000))), "functions": b"\xca\x01\x00" * 3_000_000,
        "dims": field(7, field(5, b"\x08\x01" * 10_000_000)), "opsets": b"\x42\x00" * 10_000_000,
        "dimensions": field(7, field(11, field(2, field(1, field(2, b"\x0a\x00" * 10_000_000))))),
        "graphs": field(7, field(1, field(5, b"\x5a\x00" * 10_000_000))),
    }.items():  # fmt: skip
        yield Small(f"many-{name}.onnx", of(graph + data), [INFO], "more than")
    yield Small("deep.onnx", of(graph + field(7, nested(200))), [INFO, DETECT], "deeper than in any|not an ONNX file")
    for name, through in {"shared": "", "each": "Identity", "joined": "Concat", "reshaped": "Transpose"}.items():
        yield Small(
            f"web-{name}.onnx", of(web(through)), [INFO], None if name != "joined" else "in more ways|readable|"
        )


def field(number: int, data: bytes) -> bytes:
    """A message within a protobuf."""

    def varint(n: int) -> bytes:
        return bytes([n & 127 | 128]) + varint(n >> 7) if n > 127 else bytes([n])

    return varint(number << 3 | 2) + varint(len(data)) + data


def nested(depth: int) -> bytes:
    data = b""
    for _ in range(depth):
        data = field(1, field(5, field(6, data)))
    return data


def web(through: str) -> bytes:
    """20,000 convolutions that share a weight joined of 15,000."""
    names = [f"w{i}" for i in range(15_000)]
    stored = [TensorProto(name=n, dims=[1, 1, 1, 1], data_type=1, raw_data=b"\0\0\x80?") for n in names]
    nodes = [helper.make_node("Concat", names, ["w"], axis=0)]
    for i in range(20_000):
        source = f"v{i}" if through else "w"
        if through:
            more = ["w", f"w{i % 15_000}"] if through == "Concat" else ["w"]
            nodes.append(helper.make_node(through, more, [source], **({"axis": 0} if len(more) > 1 else {})))
        nodes.append(helper.make_node("Conv", ["x", source], [f"y{i}"]))
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 1, 8, 8])
    made = helper.make_tensor_value_info("y0", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [given], [made], stored)
    return bytes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8).SerializeToString()
    )


def greedy_later() -> Iterator[Small]:
    """Files whose first runs are like any other's. The draws of one seed are the same in every session."""
    big = "n = Constant<value = int64[1] {800000000}>() b = ConstantOfShape(n) r = ReduceMax<keepdims = 0>(b)"
    yield Small("later.onnx", of(later(big)), [BENCH, EVAL], TOO_MUCH)


ENDLESS_THEN = """n = Constant<value = int64 {9000000000000000000}>() c = Constant<value = bool {1}>()
    z = Constant<value = float {0.0}>()
    r = Loop<body = b (int64 i, bool c_in, float v_in) => (bool c_out, float v_out)
    { c_out = Identity(c_in) v_out = Abs(v_in) }>(n, c, z)"""


def later(then: str, limit: float = 0.9) -> bytes:
    """Does what `then` says (a number r) in a run that draws more than the limit."""
    body = f"""u = RandomUniform<shape = [1], seed = {SEED}>() l = Constant<value = float[1] {{{limit}}}>()
        g = Greater(u, l) q = Squeeze(g)
        s = If (q) <then_branch = then () => (float r) {{ {then} }},
                    else_branch = other () => (float r2) {{ r2 = Constant<value = float {{0.0}}>() }}>
        m = ReduceMin<keepdims = 0>(x) k = Constant<value = int64[3] {{1, 3, 6}}>()
        v = Constant<value = float {{0.9}}>() e = Expand(v, k) z0 = Constant<value = float {{0.0}}>()
        t = Mul(m, z0) o = Add(e, t) out = Add(o, s)"""
    return detector(body)


SEED = 1.0  # its tenth draw is the first above the limit


def pictured() -> Iterator[Small]:
    """Pictures that are decoded for ever."""
    scans = "more scans than any camera"
    plain = saved(Image.new("L", (2000, 1500), 90), "JPEG", progressive=True)
    last = plain.rindex(b"\xff\xda")
    tables = plain.rindex(b"\xff\xc4", 0, last) if b"\xff\xc4" in plain[:last] else last
    for name, data in {
        "scans": plain[:-2] + plain[last:-2] * 8000 + b"\xff\xd9",
        "cut": plain[:-2] + plain[last:-2] * 8000,
        "behind": plain[:2] + b"\xff\xfe\x00\x02" * 100_001 + plain[2:-2] + plain[last:-2] * 8000 + b"\xff\xd9",
        "restarts": plain[:-2] + plain[tables:-2] * 8000 + b"\xff\xd9",
    }.items():
        yield Small(f"jpeg-{name}.jpg", of(data), [["detect", "fine.pt", "{}"]], scans)
    strip = plain[:-2] + plain[last:-2] * 2000
    large = saved(Image.new("L", (11_000, 12_000), 90), "JPEG", progressive=True)
    last = large.rindex(b"\xff\xda")
    yield Small(
        "jpeg-large.jpg", of(large[:-2] + large[last:-2] * 200 + b"\xff\xd9"), [["detect", "fine.pt", "{}"]], scans
    )
    yield Small("jpeg-tiff.tif", of(with_strip(strip)), [["detect", "fine.pt", "{}"]], scans)
    animation = [Image.new("P", (8, 8), i % 200) for i in range(2)]
    gif = saved(animation[0], "GIF", save_all=True, append_images=animation[1:])
    frame = gif[gif.index(b"\x2c") : -1]
    yield Small("gif.jpg", of(gif[:-1] + frame * 100_000 + b";"), [["detect", "fine.pt", "{}"]], None)
    one = saved(Image.new("RGB", (64, 64), (9, 90, 9)), "PNG")
    for kind, head in {"iCCP": b"x\0\0", "zTXt": b"x\0\0", "iTXt": b"x\0\1\0\0\0"}.items():
        piled = chunk(kind.encode(), head + compress(bytes(1 << 30), 9))
        yield Small(f"png-{kind}.png", of(one[:33] + piled + one[33:]), [["detect", "fine.pt", "{}"]], None)
    texts = chunk(b"tEXt", b"a\0b") * 500_000
    yield Small("png-texts.png", of(one[:33] + texts + one[33:]), [["detect", "fine.pt", "{}"]], None)


def with_strip(data: bytes) -> bytes:
    """A TIFF of one strip that is a JPEG."""
    entries = [(256, 4, 1, 2000), (257, 4, 1, 1500), (258, 3, 1, 8), (259, 3, 1, 7), (262, 3, 1, 1), (273, 4, 1, 200),
               (277, 3, 1, 1), (278, 4, 1, 1500), (279, 4, 1, len(data))]  # fmt: skip
    table = b"".join(struct.pack("<HHII", *e) for e in entries)
    head = b"II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4)
    return head + bytes(200 - len(head)) + data


def sparse(path: Path, start: bytes, size: int) -> None:
    with path.open("wb") as stream:
        stream.write(start)
        stream.truncate(size)


def tensors_file(tensors: dict[str, tuple[str, list[int], int]], about: object) -> bytes:
    """The beginning of a safetensors file: its table."""
    table: dict[str, object] = {"__metadata__": {"dsconvert": json.dumps(about)}}
    at = 0
    for name, (kind, shape, size) in tensors.items():
        table[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(table).encode()
    return struct.pack("<Q", len(text)) + text


def listed() -> Iterator[Small]:
    """Data sets of one picture whose text goes on and on."""
    row = b"0 0.5 0.5 0.1 0.1\n"
    rows = {"rows": row * 900_000, "row": b"0" + b" 0.5" * 4_000_000, "lines": b"\n" * (16 << 20)}
    for name, labels in rows.items():
        yield Small(f"labels-{name}.yaml", data_set("train: {0}\nval: {0}\nnames: [a, b]\n", labels),
                    [["eval", "fine.pt", "--data", "{}", "--imgsz", "64"]], "label")  # fmt: skip
    for name, line in {"lines": "nowhere/{}.jpg\n", "empty": "\n", "same": "images/val/0.jpg\n"}.items():
        lines = "".join(line.format(i) for i in range(5_000_000)).encode()
        commands = [["detect", "fine.pt", "{}"], ["quantize", "fine.pt", "--calib", "{}"]]
        yield Small(f"list-{name}.txt", of(lines), commands,
                    "more than|longer than|neither")  # fmt: skip
    texts = {"nc": ("nc: 1{0}\nnames: [a]\n", "says nc"), "name": ("names: [1{0}, b]\nval: images/val\n", None)}
    for name, (yaml, words) in texts.items():
        minutes = yaml.format(":59" * 340_000).encode()
        yield Small(f"minutes-{name}.yaml", of(minutes), [["eval", "fine.pt", "--data", "{}", "--imgsz", "64"]], words)
    recipe = ("calib: images\nsamples: 1" + ":59" * 340_000 + "\n").encode()
    yield Small("minutes-recipe.yaml", of(recipe), [["quantize", "fine.pt", "--config", "{}"]], "YAML")


def data_set(text: str, labels: bytes) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        folder = path.with_suffix("")
        for kind in ("images", "labels"):
            (folder / kind).mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(folder / "images/a.png")
        (folder / "labels/a.txt").write_bytes(labels)
        path.write_text(text.format(f"{folder.name}/images"))

    return write


def holes() -> Iterator[Small]:
    """Files of some kilobytes that say they have gigabytes."""
    giga = 6 << 30
    about = {"version": 3, "imgsz": 64, "graph": {"nodes": []}, "head": {}, "provenance": {}, "activations": {},
             "layers": {"a": {"shape": [1 << 16, 1 << 16, 1, 1], "bits": 8, "block_size": 16}}}  # fmt: skip
    for name, tensors in {"one": {"a.vqk": ("U8", [giga], giga)}, "other": {"b": ("F32", [giga // 4], giga)}}.items():
        start = tensors_file(tensors, about)
        write = lambda path, start=start: sparse(path, start, len(start) + giga)  # noqa: E731
        yield Small(f"sparse-{name}.safetensors", write, [INFO, DETECT], "like a broken download|is damaged|do not fit")
    zeros = detector(constant("1, 3, 6"))
    begin = zeros + b"\x3a\x80\x80\x80\x80\x07"  # a graph of 1.9 GB
    yield Small(
        "sparse.onnx",
        lambda path: sparse(path, begin, len(begin) + (7 << 28)),
        [INFO, DETECT, QUANTIZE],
        "like a broken download",
    )
    long = struct.pack("<Q", 90 << 20) + b'{"a":' + b" " * (91 << 20)
    yield Small("table.safetensors", of(long), [INFO], "larger header")
    deep = b'{"__metadata__":{"dsconvert":"' + b"[" * 100_000 + b'"}}'
    yield Small("deep.safetensors", of(struct.pack("<Q", len(deep)) + deep), [INFO], "is damaged")
    for name in ("pipe.pt", "pipe.safetensors", "pipe.onnx"):
        commands = [INFO, DETECT, *([BENCH, QUANTIZE] if name == "pipe.onnx" else [])]
        yield Small(name, os.mkfifo, commands, "is a pipe or a device")
    yield Small("device.pt", lambda path: path.symlink_to("/dev/zero"), [INFO], "is a pipe or a device")
    yield Small("system.onnx", lambda path: path.symlink_to("/proc/kmsg"), [INFO, DETECT], "empty|cannot be read")
    yield Small("pipe.yaml", os.mkfifo, [["eval", "fine.pt", "--data", "{}"]], "pipe")
    yield Small("pipe.txt", os.mkfifo, [["detect", "fine.pt", "{}"], ["quantize", "fine.pt", "--calib", "{}"]],
                "neither|pipe")  # fmt: skip
    yield Small("beside.onnx", beside, [DETECT, QUANTIZE], "is a pipe or a device")
    yield Small("same.onnx", overlapping, [QUANTIZE], "larger than the 2 GB")


def beside(path: Path) -> None:
    """A file whose weights are a pipe."""
    os.mkfifo(path.with_suffix(".bin"))
    write_outside(path, path.with_suffix(".bin").name, 1, 64)


def overlapping(path: Path) -> None:
    """100 tensors that are the same 64 MB."""
    path.with_suffix(".data").write_bytes(bytes(64 << 20))
    write_outside(path, path.with_suffix(".data").name, 100, 64 << 20)


def write_outside(path: Path, location: str, count: int, length: int) -> None:
    model = onnx.load_from_string(detector(constant("1, 3, 6")))
    for i in range(count):
        tensor = model.graph.initializer.add(name=f"o{i}", dims=[length // 4], data_type=1, data_location=1)
        for key, value in {"location": location, "offset": "0", "length": str(length)}.items():
            tensor.external_data.add(key=key, value=value)
        model.graph.node.add(op_type="Identity", input=[f"o{i}"], output=[f"p{i}"])
    path.write_bytes(model.SerializeToString())


def crashes() -> Iterator[Small]:
    """Files that end the engine itself."""
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 3, 64, 64])
    made = helper.make_tensor_value_info("out", TensorProto.FLOAT, [1, 3, 6])
    for name, parts in {"split": ["a", "", "c"], "split-first": ["", "b", "c"]}.items():
        nodes = onnx.load_from_string(detector(constant("1, 3, 6"))).graph.node
        split = helper.make_node("Split", ["x"], parts, axis=1, num_outputs=3)
        graph = helper.make_graph([split, *nodes], "g", [given], [made])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
        model.metadata_props.add(key="names", value="{0: 'a'}")
        report = ["report", "model.safetensors", "--float", "fine.pt", "--data", "images", "--against", "{}"]
        yield Small(f"{name}.onnx", of(model.SerializeToString()), [*EVERY, report] if name == "split" else [DETECT],
                    "makes ONNX Runtime crash, so it was not loaded")  # fmt: skip
    model = onnx.load_from_string(detector(constant("1, 3, 6")))
    body = [helper.make_node("F", ["a"], ["b"], domain="own")]
    model.functions.append(helper.make_function("own", "F", ["a"], ["b"], body, [helper.make_opsetid("own", 1)]))
    model.opset_import.append(helper.make_opsetid("own", 1))
    model.graph.node.insert(0, helper.make_node("F", ["x"], ["f"], domain="own"))
    yield Small("function.onnx", of(model.SerializeToString()), [DETECT, QUANTIZE], "crash|not an ONNX file")


KINDS = (pickled, named, shaped, many, greedy_later, pictured, listed, holes, crashes)
