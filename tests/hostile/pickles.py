"""Pickles that would run something, and pickles that misuse what is allowed."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

from case import DAMAGED, PROTOCOL, REFUSED, STRANGE, Case
from forge import Obj, Raw, archive, dump, name, text

HEAD, END = b"\x80\x02", b"."


def call(function: str, *arguments: str) -> bytes:
    return name(function) + b"(" + b"".join(map(text, arguments)) + b"tR"


def code(canary: Path) -> Iterator[Case]:
    """Pickles that would run something. All are real: tests let plain pickle run some of them."""
    touch, line = f"touch {canary}", f"open({str(canary)!r}, 'w')"
    calls = {
        "os.system": call("os.system", touch), "posix.system": call("posix.system", touch),
        "builtins.eval": call("builtins.eval", line), "builtins.exec": call("builtins.exec", line),
        "__builtin__.eval": call("__builtin__.eval", line), "builtins.open": call("builtins.open", str(canary), "w"),
        "builtins.__import__": call("builtins.__import__", "antigravity"),
        "builtins.getattr": call("builtins.getattr", "os", "system"),
        "subprocess.Popen": call("subprocess.Popen", touch), "runpy.run_path": call("runpy.run_path", str(canary)),
        "webbrowser.open": call("webbrowser.open", "http://127.0.0.1:9/"),
        "torch.load": call("torch.load", str(canary)), "torch.hub.load": call("torch.hub.load", "a/b", "c"),
        "torch.serialization.load": call("torch.serialization.load", str(canary)),
        "numpy.load": call("numpy.load", str(canary)), "numpy.testing._private.utils.runstring": call(
            "numpy.testing._private.utils.runstring", line),
        "pickle.loads": call("pickle.loads", line), "shutil.rmtree": call("shutil.rmtree", str(canary.parent)),
        "pathlib.Path.write_text": call("pathlib.Path.write_text", line), "torch.jit.load": call(
            "torch.jit.load", str(canary)), "torch._dynamo.eval_frame.set": call("torch._dynamo.eval_frame.set", line),
        "models.yolo.DetectionModel.__init__": call("models.yolo.DetectionModel.__init__", line),
        "nested: OrderedDict.__init__.__globals__": name("collections.OrderedDict.__init__.__globals__"),
        "nested: Conv.forward": name("models.common.Conv.forward"),
        "dotted in the name": b"ctorch._utils\n_rebuild_tensor_v2.__globals__\n",
        "dotted away": b"cmodels.common\nConv.__init__.__globals__\n", "empty module": b"c\nsystem\n",
        "spaces": b"cos system\neval\n", "newline tricks": b"ctorch.nn.modules.conv\nConv2d \n",
        "unicode twin": "cmodels.соmmon\nConv\n".encode(), "case": b"cOS\nsystem\n",
    }  # fmt: skip
    for what, payload in calls.items():
        yield Case(f"calls {what}", archive(HEAD + payload + END, {}), DAMAGED if what == "unicode twin" else REFUSED)
    for place in ("ema", "model", "epoch", "optimizer"):
        content = HEAD + b"}(" + text(place) + call("os.system", touch) + b"u."
        yield Case(f"calls os.system as {place}", archive(content, {}), "os.system.*" + REFUSED)
    inside = Raw(call("os.system", touch))
    for kind in ("models.yolo.DetectionModel", "torch.nn.modules.conv.Conv2d", "argparse.Namespace"):
        yield Case(f"os.system as state of {kind}", archive(dump({"model": Obj(kind, {"a": inside})}), {}), REFUSED)
    yield Case("os.system as a key", archive(HEAD + b"}(" + call("os.system", touch) + b"Nu.", {}), REFUSED)
    command = text(touch)
    yield Case("INST", archive(HEAD + b"(" + command + b"iposix\nsystem\n.", {}), REFUSED)
    yield Case("OBJ", archive(HEAD + b"(cposix\nsystem\n" + command + b"o.", {}), REFUSED)
    stacked = text("os") + text("system") + b"\x93" + command + b"\x85R"
    yield Case("STACK_GLOBAL", archive(HEAD + stacked + END, {}), PROTOCOL)
    yield Case("STACK_GLOBAL in protocol 4", archive(b"\x80\x04\x95" + struct.pack("<Q", len(stacked) + 1) + stacked
                                                     + END, {}), PROTOCOL)  # fmt: skip
    yield Case("NEWOBJ_EX", archive(HEAD + name("argparse.Namespace") + b")}\x92.", {}), PROTOCOL)
    for code_length, opcode in ((1, b"\x82"), (2, b"\x83"), (4, b"\x84")):
        extension = opcode + (7).to_bytes(code_length, "little")
        yield Case(f"extension registry {code_length}", archive(HEAD + extension + END, {}), PROTOCOL)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", dump({"model": None}))
        target.writestr("other/data.pkl", HEAD + call("os.system", touch) + END)
    yield Case("a second pickle", buffer.getvalue(), "zip archive but not")
    yield Case("a bare pickle", HEAD + call("os.system", touch) + END, STRANGE)


def opcodes() -> Iterator[Case]:
    """Pickles that name only what is allowed and misuse it."""
    detection, conv = "models.yolo.DetectionModel", "torch.nn.modules.conv.Conv2d"
    build = name(conv) + b"N}" + text("__setstate__") + name(detection) + b"s\x86b"
    yield Case("BUILD on a class", archive(HEAD + build + END, {}), DAMAGED)
    slots = name(conv) + b")\x81N}" + text("__class__") + name(detection) + b"s\x86b"
    yield Case("BUILD with slots", archive(HEAD + slots + END, {}), "not a YOLOv5 checkpoint")
    state = {"__class__": 1, "__dict__": {}, "__setstate__": 2, "kind": "models.yolo.Detect", "args": 3, "append": 4}
    yield Case("BUILD of special names", archive(dump({"model": Obj(detection, state)}), {}), "no yaml or no weights")
    get = name("__builtin__.getattr")
    for what, arguments in {
        "texts": text("os") + text("system"), "Detect's constructor": name("models.yolo.Detect") + text("__init__"),
        "forward of another": name(detection) + text("forward"), "a function": name("torch._utils._rebuild_tensor_v2")
        + text("__globals__"), "itself": get + text("forward"),
    }.items():  # fmt: skip
        yield Case(f"getattr: {what}", archive(HEAD + get + arguments + b"\x86R.", {}), DAMAGED)
    yield Case("getattr: too few", archive(HEAD + get + name("models.yolo.Detect") + b"\x85R.", {}), DAMAGED)
    made = get + name("models.yolo.Detect") + text("forward") + b"\x86R}" + text("args") + b"Nsb"
    yield Case("getattr: state", archive(HEAD + made + END, {}), "not a YOLOv5 checkpoint dictionary")
    yield Case("a class for a model", archive(dump({"model": Raw(name(detection))}), {}), "no model")
    yield Case("append to a record", archive(HEAD + name(conv) + b")\x81Na.", {}), DAMAGED)
    yield Case("items of a record", archive(HEAD + name(conv) + b")\x81NNs.", {}), DAMAGED)
    floats, cpu, one = text("storage") + name("torch.FloatStorage"), text("cpu"), b"K\x01"
    pids = {
        "text": text("storage"), "empty": b")", "number": b"K\x01", "class": name("torch.FloatStorage"),
        "too short": b"(" + text("storage") + b"t", "module": b"(" + text("module") + name(conv) + b"NNt",
        "no class": b"(" + text("storage") + text("FloatStorage") + text("0") + text("cpu") + b"K\x01t",
        "another class": b"(" + text("storage") + name(conv) + text("0") + text("cpu") + b"K\x01t",
        "negative": b"(" + floats + text("0") + cpu + b"J\xff\xff\xff\xfft",
        "path": b"(" + floats + b"]" + cpu + one + b"t",
    }  # fmt: skip
    for what, pid in pids.items():
        yield Case(f"persistent id: {what}", archive(HEAD + pid + b"Q.", {}), DAMAGED)
    yield Case("persistent id: text opcode", archive(HEAD + b"Pos.system\n.", {}), PROTOCOL)
    bomb = HEAD + name("_codecs.encode") + b"q\x00" + text("abcd") + text("latin1") + b"\x86R"
    bomb += 60 * (b"q\x01h\x00h\x01" + text("hex") + b"\x86R")
    yield Case("2^60 bytes by encoding", archive(bomb + END, {}), "not a YOLOv5 checkpoint")
    yield Case("memo of 64 GB", archive(HEAD + b"Nr\xff\xff\xff\xff.", {}), PROTOCOL)
    yield Case("unknown memo", archive(HEAD + b"j\xff\xff\xff\x7f.", {}), DAMAGED)
    yield Case("a text of 4 GB", archive(HEAD + b"X\xff\xff\xff\xffabc.", {}), DAMAGED)
    yield Case("bytes of 2^63", archive(HEAD + b"\x8e" + struct.pack("<Q", 1 << 63) + b"abc.", {}), DAMAGED)
    yield Case("a number of 4 MB", archive(HEAD + b"\x8b" + struct.pack("<I", 4 << 20) + bytes(4 << 20) + END, {}),
               "larger")  # fmt: skip
    yield Case("a decimal of 100000 digits", archive(HEAD + b"L" + b"9" * 100000 + b"L\n.", {}), DAMAGED)
    yield Case("a million objects", archive(HEAD + b"(" + b"}" * (1 << 20) + b"t.", {}), "tuple")
    yield Case("a larger pickle", archive(HEAD + b"(" + b"}" * (3 << 20) + b"t.", {}), "larger")
    yield Case("a million tuples deep", archive(HEAD + b")" + b"\x85" * 1000000 + END, {}), PROTOCOL)
    yield Case("hash of deep tuples", archive(HEAD + b"})" + b"\x85" * 1000000 + b"Ns.", {}), PROTOCOL)
    yield from endless()
    yield Case("a list in itself", archive(HEAD + b"]q\x00h\x00a.", {}), "list")
    for what, content in {"no stop": b"N", "nothing": b"", "no stack": b"0.", "marks": b"((((.", "setitem": b"}s.",
                          "garbage": bytes(range(256))}.items():  # fmt: skip
        yield Case(f"pickle: {what}", archive(HEAD + content, {}), f"{DAMAGED}|{PROTOCOL}")


def endless() -> Iterator[Case]:
    """Small pickles whose dictionaries take for ever to make: in C, where no interrupt is heard."""
    twice = b")q\x00" + 40 * b"h\x00\x86q\x00"
    prime = (1 << 61) - 1  # hashes of integers are their remainders

    def key(made: bytes) -> bytes:
        return HEAD + b"}" + made + b"Ns."

    def keys(numbers: Iterator[int], length: int, tail: bytes = b"") -> bytes:
        each = (b"\x8a" + bytes([length]) + n.to_bytes(length, "little", signed=True) + tail + b"N" for n in numbers)
        return HEAD + b"}(" + b"".join(each) + b"u."

    for what, content in {
        "a key of 2^40 leaves": key(twice),
        "a tuple of 2^40 leaves": HEAD + twice + END,
        "a key of 3^40 leaves": key(b")q\x00" + 40 * b"h\x00h\x00\x87q\x00"),
        "a key of 16^20 leaves": key(20 * b"(" + b")" + 20 * (b"q\x00" + 15 * b"h\x00" + b"t")),
        "2^40 leaves in an OrderedDict": HEAD + name("collections.OrderedDict") + b")R" + twice + b"Ns.",
        "2^40 leaves in a call": HEAD + name("__builtin__.frozenset") + twice + b"\x85R.",
        "2^40 leaves among others": HEAD + b"}(" + text("a") + b"N" + twice + b"Nu.",
        "a key in a key": key(b"K\x01\x85\x85"),
        "a key of many parts": key(b"(" + 1000 * b"N" + b"t"),
        "keys of one hash": keys((prime * (i + 1) for i in range(120_000)), 11),
        "keys of one hash in 255 bytes": keys((prime * (i + 1) << 900 for i in range(8_000)), 255),
        "keys of one hash in 8 bytes": keys((prime * i for i in range(-4, 5)), 8),
        "keys of one hash in tuples": keys((prime * i for i in range(-4, 5)), 8, b"\x85"),
        "a number of 9 bytes": HEAD + b"\x8a\x09" + (1 << 64).to_bytes(9, "little") + END,
    }.items():
        yield Case(f"endless: {what}", archive(content, {}), PROTOCOL)
    numbers = HEAD + b"}(" + b"".join(b"J" + struct.pack("<i", n) + b"N" for n in range(200_000)) + b"u."
    yield Case("200000 keys of their own hashes", archive(numbers, {}), "no model")
    lists = HEAD + b"]q\x00" + 60 * b"](h\x00h\x00eq\x00" + END
    yield Case("2^60 lists in lists", archive(lists, {}), "a list")
    for what, content in {
        "a list": b"]",
        "a dictionary": b"}",
        "an OrderedDict": name("collections.OrderedDict") + b")R",
    }.items():
        yield Case(f"for a key {what}", archive(key(content), {}), f"{DAMAGED}|{PROTOCOL}")
    made = HEAD + b"}(" + name("datetime.date") + b"K\x01\x85RNK\x01K\x02\x86N" + text("a") + b"NNN\x88N" + b"u."
    yield Case("keys of the usual kinds", archive(made, {}), "no model")
