"""Checkpoints no one should trust, each with the words its refusal must hold (None: it loads, and does no harm)."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from forge import Forged, Obj, Raw, archive, dump, name, tensor, text

from dsconvert.yolo.archive import Record, Storage


@dataclass(frozen=True)
class Case:
    """One file's bytes; `words` is a regular expression."""

    name: str
    data: bytes
    words: str | None


REFUSED = "does not allow, so nothing was loaded"
PROTOCOL = "protocol"
DAMAGED = "damaged"
STRANGE = "not a PyTorch checkpoint"


def all_cases(good: Path, canary: Path) -> Iterator[Case]:
    """Every kind, made from one good checkpoint; the payloads of the first would write `canary`."""
    yield from code(canary)
    yield from opcodes()
    yield from zips(good)
    yield from other_files()
    yield from other_models()
    yield from tampered(good)


# --- what would run -------------------------------------------------------------------------------------------------

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
        "pathlib.Path.write_text": call("pathlib.Path.write_text", line), "models.common.DetectMultiBackend": call(
            "models.common.DetectMultiBackend", str(canary)),
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
    yield Case("two million objects", archive(HEAD + b"(" + b"}" * ((2 << 20) - 5) + b"t.", {}), "tuple")
    yield Case("a larger pickle", archive(HEAD + b"(" + b"}" * (3 << 20) + b"t.", {}), "larger")
    yield Case("a million tuples deep", archive(HEAD + b")" + b"\x85" * 1000000 + END, {}), PROTOCOL)
    yield Case("hash of deep tuples", archive(HEAD + b"})" + b"\x85" * 1000000 + b"Ns.", {}), PROTOCOL)
    yield Case("a list in itself", archive(HEAD + b"]q\x00h\x00a.", {}), "list")
    for what, content in {"no stop": b"N", "nothing": b"", "no stack": b"0.", "marks": b"((((.", "setitem": b"}s.",
                          "garbage": bytes(range(256))}.items():  # fmt: skip
        yield Case(f"pickle: {what}", archive(HEAD + content, {}), f"{DAMAGED}|{PROTOCOL}")


# --- the container --------------------------------------------------------------------------------------------------


def zips(good: Path) -> Iterator[Case]:
    """Archives that lie, or unfold into more than they are."""
    whole = good.read_bytes()
    for slip in ("../../evil", "/tmp/evil", "..\\evil", "archive/../../evil", "C:\\evil", "archive/data/../data.pkl2"):
        buffer = io.BytesIO(whole)
        with zipfile.ZipFile(buffer, "a") as target:
            target.writestr(slip, "evil")
        yield Case(f"zip slip {slip}", buffer.getvalue(), None)
    structure = dump({"model": None})
    for method in (zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as target:
            target.writestr("archive/data.pkl", structure)
            target.writestr("archive/data/0", bytes(4 << 20))
        yield Case(f"zip bomb, method {method}", buffer.getvalue(), "compressed archive")
    for method, data in ((12, bz2.compress(bytes(1 << 20))), (14, b"\t\x04\x05\0" + lzma.compress(bytes(1 << 20)))):
        lie = patched(archive(structure, {"0": data}), b"archive/data/0", method=method)
        yield Case(f"stored size, compressed by {method}", lie, "compressed archive")
    yield Case("4 GB declared", patched(archive(structure, {"0": b"abc"}), b"archive/data/0", size=(1 << 32) - 2),
               "compressed archive|not a PyTorch")  # fmt: skip
    yield Case("an encrypted pickle", patched(archive(structure, {}), b"archive/data.pkl", flags=1), DAMAGED)
    far = patched(archive(structure, {}), b"archive/data.pkl", offset=1 << 30)
    yield Case("the pickle beyond the end", far, DAMAGED)
    yield Case("a directory of 200000 entries", many_entries(200_000), STRANGE + "|zip archive but not")
    yield Case("a directory of 2^60 bytes", zip64(1 << 60, 0), "zip archive but not")
    yield Case("a directory at 2^63", zip64(46, (1 << 64) - 1), STRANGE)
    yield Case("a comment behind the end", whole + b"junk" * 10, STRANGE)
    yield Case("junk before the start", b"#!/bin/sh\n" + whole, None)
    yield Case("a zip in a zip", archive(whole, {}), DAMAGED + "|larger")
    yield Case("two pickles of one name", doubled(whole), "zip archive but not")
    yield Case("big endian", archive(structure, {}).replace(b"little", b"bigger"), DAMAGED)
    big = io.BytesIO()
    with zipfile.ZipFile(big, "w") as target:
        target.writestr("archive/data.pkl", structure)
        target.writestr("archive/byteorder", "big")
    yield Case("big endian, honestly", big.getvalue(), "big-endian")


def patched(data: bytes, entry: bytes, **fields: int) -> bytes:
    """The archive with some of an entry's directory fields changed (method, flags, size, offset)."""
    out = bytearray(data)
    start = data.rindex(b"PK\x01\x02", 0, data.rindex(entry))
    places = {"flags": (8, "<H"), "method": (10, "<H"), "size": (24, "<I"), "offset": (42, "<I")}
    for field, value in fields.items():
        place, kind = places[field]
        struct.pack_into(kind, out, start + place, value)
    return bytes(out)


def many_entries(count: int) -> bytes:
    """A zip of nothing but a directory, which costs a reader some twenty times its size in memory."""
    entries = b"".join(b"PK\x01\x02" + bytes(24) + struct.pack("<HHHHHII", 7, 0, 0, 0, 0, 0, 0) + b"%07d" % i
                       for i in range(count))  # fmt: skip
    return entries + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, len(entries), 0, 0)


def zip64(size: int, offset: int) -> bytes:
    """An empty zip whose 64-bit end record says where and how large the directory is."""
    end = b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1, 1, size, offset)
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    return end + locator + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def doubled(whole: bytes) -> bytes:
    """The pickle twice under one name: who checks the first may load the second."""
    source = zipfile.ZipFile(io.BytesIO(whole))
    pickled = next(n for n in source.namelist() if n.endswith("data.pkl"))
    out = archive(source.read(pickled), {"x": b""}, {pickled.replace("data.pkl", "dbtb.pkl"): dump({"model": None})})
    return out.replace(b"dbtb.pkl", b"data.pkl")


# --- files of another kind ------------------------------------------------------------------------------------------


def other_files() -> Iterator[Case]:
    """Nothing to do with PyTorch, whatever their name."""
    npz, tar = io.BytesIO(), b"data.pkl" + bytes(92) + b"0000644\0" + bytes(400)
    np.savez(npz, a=np.zeros(3))
    for what, data in {
        "empty": b"", "one byte": b"P", "text": b"These are not weights.\n", "html": b"<html><script>alert(1)</script>",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(100), "elf": b"\x7fELF" + bytes(100), "gzip": b"\x1f\x8b\x08" + bytes(100),
        "zip header only": b"PK\x03\x04" + bytes(100), "empty zip": b"PK\x05\x06" + bytes(18), "tar": tar,
        "safetensors": struct.pack("<Q", 2) + b"{}", "onnx": b"\x08\x07\x12\x04test", "zeros": bytes(100_000),
        "npz": npz.getvalue(), "pickle": pickle.dumps({"model": 1}),
    }.items():  # fmt: skip
        yield Case(f"file: {what}", data, f"{STRANGE}|zip archive but not")


def other_models() -> Iterator[Case]:
    """Models of other kinds, each to be called by its name."""
    for kind, words in {
        "models.yolo.SegmentationModel": "YOLOv5 segmentation", "models.yolo.ClassificationModel": "classification",
        "models.common.Classify": "classification", "models.yolo.Segment": "segmentation",
        "ultralytics.nn.tasks.DetectionModel": "YOLOv8 or later", "ultralytics.nn.tasks.SegmentationModel": "YOLOv8",
        "models.yolo.IDetect": "YOLOv7", "models.experimental.Ensemble": "ensemble",
        "torchvision.models.resnet.ResNet": "torchvision.models.resnet.ResNet", "models.common.GhostConv": "GhostConv",
    }.items():  # fmt: skip
        content = {"model": Obj(kind, {"names": []}), "ema": None}
        yield Case(f"model: {kind}", archive(dump(content), {}), f"{words}.*(dsconvert|nothing was loaded)")
    weights = torch.zeros(4)
    for what, content in {
        "state dict": {"a.weight": weights}, "in model": {"model": {"a": weights}, "epoch": 1},
        "in state_dict": {"state_dict": {"a": weights}},
    }.items():  # fmt: skip
        yield Case(f"state dict: {what}", saved(content), "plain state dict")
    for what, content in {"a tensor": weights, "a list": [1], "a number": 3}.items():
        yield Case(f"saved: {what}", saved(content), "not a YOLOv5 checkpoint dictionary")
    yield Case("saved: nothing", saved({}), "no model")
    yield Case("saved: a list of tensors as model", saved({"model": [weights], "ema": weights}), "no model")
    with tempfile.NamedTemporaryFile(suffix=".pt") as file:
        torch.jit.script(torch.nn.Identity()).save(file.name)
        yield Case("TorchScript", Path(file.name).read_bytes(), "TorchScript export")
    old = io.BytesIO()
    torch.save({"a": weights}, old, _use_new_zipfile_serialization=False)
    yield Case("before PyTorch 1.6", old.getvalue(), STRANGE)


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


# --- a good checkpoint with one thing wrong -------------------------------------------------------------------------


def nested(depth: int, width: int = 2) -> list[Any]:
    """`width` times the same list, `depth` deep: a few bytes that print as width^depth."""
    found: list[Any] = ["x"]
    for _ in range(depth):
        found = [found] * width
    return found


def itself() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


def tampered(good: Path) -> Iterator[Case]:
    """Each entry changes one thing of a checkpoint that loads."""
    yield Case("untouched", Forged(good).bytes(), None)
    for group in (numbers, networks, structures, labels):
        for what, (change, words) in group().items():
            forged = Forged(good)
            change(forged)
            yield Case(what, forged.bytes(), words)


Change = tuple[Callable[[Forged], Any], str | None]


def numbers() -> dict[str, Change]:
    """Tensors: their values, and where they say they are."""

    def weight(make: Callable[[Storage], Any]) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            stored = f.layers[1]._modules["conv"]._parameters["weight"]
            storage = stored.args[0].args[0]
            f.layers[1]._modules["conv"]._parameters["weight"] = make(storage)

        return change

    def values(place: str, value: float, dtype: torch.dtype = torch.float32) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            module = f.layers[1]._modules["bn"] if "." not in place else f.layers[1]._modules["conv"]
            shape = (16, 8, 3, 3) if "." in place else (16,)
            full = torch.full(shape, value, dtype=dtype)
            store = "_parameters" if place.endswith("weight") else "_buffers"
            getattr(module, store)[place.rpartition(".")[2]] = f.tensor(full, "new")

        return change

    def numel(storage: Storage, count: int) -> Storage:
        return Storage(storage.key, storage.dtype, count)

    def elsewhere(storage: Storage, key: str) -> Storage:
        return Storage(key, storage.dtype, storage.numel)

    shape, stride = (16, 8, 3, 3), (72, 9, 3, 1)
    larger, lie = "declares larger weights|too few", "damaged"
    return {
        "NaN weights": (values("conv.weight", float("nan")), "holds NaN"),
        "infinite weights": (values("conv.weight", float("inf")), "holds NaN or infinite"),
        "doubles too large for floats": (values("conv.weight", 1e300, torch.float64), "holds NaN or infinite"),
        "whole numbers for weights": (values("conv.weight", 1, torch.int64), "int64 numbers"),
        "NaN variance": (values("running_var", float("nan")), "holds NaN"),
        "zero variance": (values("running_var", 0.0), None),  # BatchNorm adds a thousandth to it
        "negative variance": (values("running_var", -1.0), "negative variances"),
        "weights as large as floats": (values("conv.weight", 3e38), "becomes infinite"),
        "shape of 2^40": (weight(lambda s: tensor(s, 0, (1 << 40,), (1,))), larger),
        "shape of 2^62 squared": (weight(lambda s: tensor(s, 0, (1 << 61, 1 << 61), (0, 0))), larger),
        "2^40 by stride 0": (weight(lambda s: tensor(s, 0, (1 << 20, 1 << 20), (0, 0))), larger),
        "stride beyond the end": (weight(lambda s: tensor(s, 0, shape, (1 << 40, 9, 3, 1))), larger),
        "offset beyond the end": (weight(lambda s: tensor(s, 1 << 40, shape, stride)), larger),
        "offset of one": (weight(lambda s: tensor(s, 1, shape, stride)), larger),
        "negative stride": (weight(lambda s: tensor(s, 1151, shape, (-72, -9, -3, -1))), lie),
        "negative shape": (weight(lambda s: tensor(s, 0, (-16, -8, 3, 3), stride)), lie),
        "negative offset": (weight(lambda s: tensor(s, -1, shape, stride)), lie),
        "shape of 1000 dimensions": (weight(lambda s: tensor(s, 0, (1,) * 1000, (1,) * 1000)), lie),
        "shape and stride of other lengths": (weight(lambda s: tensor(s, 0, shape, (1,))), larger),
        "shape of text": (weight(lambda s: tensor(s, 0, ("a",), (1,))), lie),
        "shape of True": (weight(lambda s: tensor(s, 0, (True,) * 4, stride)), lie),
        "a nested parameter": (weight(lambda s: Obj("torch._utils._rebuild_parameter", args=(3, False, None))), lie),
        "storage of 2^60": (weight(lambda s: tensor(numel(s, 1 << 60), 0, shape, stride)), "too few"),
        "storage of 4 GB": (weight(lambda s: tensor(numel(s, 1 << 31), 0, shape, stride)), "too few"),
        "no such storage": (weight(lambda s: tensor(elsewhere(s, "9999"), 0, shape, stride)), "missing"),
        "storage outside": (weight(lambda s: tensor(elsewhere(s, "../../etc/passwd"), 0, shape, stride)), "missing"),
        "one storage for all": (one_storage, "more weights than it holds|has shape"),
    }  # fmt: skip


def one_storage(f: Forged) -> None:
    """Every module of 3000 reads the same large storage: 3000 times its bytes."""
    big = Storage("big", torch.float32, 1 << 20)
    f.blobs["big"] = bytes(4 << 20)
    held = {f"w{i}": tensor(big, 0, (1 << 20,), (1,)) for i in range(3000)}
    for layer in f.layers[:2]:
        layer._modules["conv"]._parameters = {"weight": held["w0"]}


def networks() -> dict[str, Change]:
    """The model yaml."""

    def row(index: int, value: Any) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            f.model.yaml["backbone"][index] = value

        return change

    def setting(key: str, value: Any) -> Callable[[Forged], None]:
        return lambda f: f.model.yaml.__setitem__(key, value)

    fit, rows, unknown = "do not fit each other", r"not \[from, number, module, args\]", "does not know"
    return {
        "yaml: width 16, 65536 channels": (row(0, [-1, 1, "Conv", [65536, 6, 2, 2]]), "has shape"),
        "yaml: a kernel of 65535": (row(0, [-1, 1, "Conv", [32, 65535, 2, 2]]), f"{fit}|has shape"),
        "yaml: padding of 65536": (row(0, [-1, 1, "Conv", [32, 6, 2, 65536]]), fit),
        "yaml: stride 0": (row(0, [-1, 1, "Conv", [32, 6, 0, 2]]), fit),
        "yaml: stride -2": (row(0, [-1, 1, "Conv", [32, 6, -2, 2]]), "not a number from 0"),
        "yaml: 3 groups of 8": (row(1, [-1, 1, "Conv", [64, 3, 2, 1, 3]]), "cannot be used"),
        "yaml: groups of 0": (row(1, [-1, 1, "Conv", [64, 3, 2, 1, 0]]), "cannot be used"),
        "yaml: 100 of 1600 blocks": (setting("depth_multiple", 16.0), "does not match|blocks"),
        "yaml: depth infinite": (setting("depth_multiple", float("inf")), "impossible"),
        "yaml: depth NaN": (setting("depth_multiple", float("nan")), "impossible"),
        "yaml: width 10^600": (setting("width_multiple", 10**600), "no usable"),
        "yaml: width a list of lists": (setting("width_multiple", nested(60)), "no usable"),
        "yaml: 4 image channels": (setting("ch", 4), "4 channels"),
        "yaml: 10^9 image channels": (setting("ch", 10**9), "not a number"),
        "yaml: backbone text": (setting("backbone", "Conv" * 1000), "impossible"),
        "yaml: backbone a number": (setting("backbone", 5), "no usable"),
        "yaml: 100000 rows": (setting("backbone", [[-1, 1, "Conv", [8, 1]]] * 100_000), "impossible"),
        "yaml: rows of itself": (setting("backbone", itself()), rows),
        "yaml: a row of 2^60 texts": (row(0, nested(60, 4)), rows),
        "yaml: args of 2^60 texts": (row(0, [-1, 1, "Conv", nested(60)]), unknown),
        "yaml: channels of 2^60 texts": (row(0, [-1, 1, "Conv", [nested(60), 6]]), unknown),
        "yaml: repeats of 2^60 texts": (row(0, [-1, nested(60), "Conv", [32, 6]]), "a list as a repeat count"),
        "yaml: sources of 2^60 texts": (row(0, [nested(60), 1, "Conv", [32, 6]]), rows),
        "yaml: 10^5 sources": (row(1, [[-1] * 100_000, 1, "Concat", [1]]), "not before it"),
        "yaml: a source of infinity": (row(1, [float("inf"), 1, "Conv", [64, 3, 2]]), rows),
        "yaml: reads itself": (row(1, [1, 1, "Conv", [64, 3, 2]]), "not before it"),
        "yaml: reads what comes later": (row(1, [5, 1, "Conv", [64, 3, 2]]), "not before it"),
        "yaml: code for an argument": (row(0, [-1, 1, "Conv", ["__import__('os').system('id')", 6]]), unknown),
        "yaml: code for a module": (row(0, [-1, 1, "exec('1')", [32]]), "is not supported"),
        "yaml: an escape for a module": (row(0, [-1, 1, "\x1b]0;owned\x07\x1b[31m", [32]]), r"\?\]0;owned\?"),
        "yaml: a record for a module": (row(0, [-1, 1, Obj("argparse.Namespace"), [32]]), rows),
        "yaml: upsampling by 10^9": (head_row(0, [-1, 1, "nn.Upsample", ["None", 10**9, "nearest"]]), "not a number"),
        "yaml: upsampling by 64000": (head_row(0, [-1, 1, "nn.Upsample", ["None", 64000, "nearest"]]), "up to 16"),
        "yaml: concatenated 2^60 times": (doubling, "cannot be used|do not fit|has shape|not supported"),
        "yaml: maps that do not meet": (head_row(0, [-1, 1, "nn.Upsample", ["None", 3, "nearest"]]), fit),
        "yaml: pools of 65536": (row(4, [-1, 1, "SPP", [160, [65535, 9, 13]]]), "larger than 99"),
        "yaml: Detect of one level": (head_row(3, [[7], 1, "Detect", ["nc", "anchors"]]), "fit|strides|match"),
        "yaml: no Detect": (head_row(3, [-1, 1, "Conv", [32, 1]]), "not Detect"),
        "yaml: is a list": (lambda f: setattr(f.model, "yaml", [1]), "no yaml"),
    }  # fmt: skip


def head_row(index: int, value: Any) -> Callable[[Forged], None]:
    return lambda f: f.model.yaml["head"].__setitem__(index, value)


def doubling(f: Forged) -> None:
    f.model.yaml["backbone"] = [[-1, 1, "Conv", [32, 6, 2, 2]], *[[[-1, -1], 1, "Concat", [1]]] * 60]


def structures() -> dict[str, Change]:
    """The module tree, and what Detect says of itself."""

    def detect(key: str, value: Any) -> Callable[[Forged], None]:
        return lambda f: setattr(f.detect, key, value)

    def stride(values: torch.Tensor) -> Callable[[Forged], None]:
        def change(f: Forged) -> None:
            f.detect.stride = f.model.stride = f.tensor(values, "stride")

        return change

    def anchors(value: float) -> Callable[[Forged], None]:
        return lambda f: f.detect._buffers.__setitem__("anchors", f.tensor(torch.full((2, 3, 2), value), "anchors"))

    classes, strides, deep = "declares .* classes", "strides|do not fit", "nests its modules|more modules"
    return {
        **{f"{n} classes": (detect("nc", n), classes) for n in (0, -1, 10001, 10**600, True, "80", None, 2.0)},
        "10000 classes": (detect("nc", 10000), "has shape"),
        "classes of 2^60 texts": (detect("nc", nested(60)), classes),
        **{f"{n} anchors": (detect("na", n), classes) for n in (0, 10**9, "3")},
        **{f"strides {s}": (stride(torch.tensor(s)), strides) for s in ([-4.0, -8.0], [0.0, 0.0], [4.0], [7.0, 9.0],
           [float("nan"), 8.0], [float("inf"), 8.0], [1e30, 8.0], [8.0, 4.0], [4.0, 16.0], [4.0, 8.0, 16.0])},
        "strides of 2^20 numbers": (stride(torch.ones(1 << 20)), "more weights than"),
        "strides in two dimensions": (stride(torch.ones(2, 2)), "does not say the strides"),
        "strides as text": (detect("stride", "4, 8"), None),  # the model says them too
        **{f"anchors of {v}": (anchors(v), "anchors|NaN") for v in (0.0, -1.0, 1e30, float("nan"))},
        "a module in itself": (loop, deep),
        "100 modules of the same 100, 12 deep": (bush, deep),
        "100 modules deep": (chain, deep),
        "a last layer of another kind": (lambda f: relabel(f.layers), "not Detect|does not match"),
        "no modules": (lambda f: setattr(f.model, "_modules", 5), "no weights"),
        "modules with numbers for names": (lambda f: setattr(f.model, "_modules", {1: f.model._modules["model"]}),
                                           "no weights|not Detect"),
        "no activation": (no_activation, "mixes the activations"),
        "a tensor with an escape in its name": (escape, r"unexpected \(model.0.bad\?\[31m\)"),
    }  # fmt: skip


def loop(f: Forged) -> None:
    f.layers[0]._modules["again"] = f.model


def bush(f: Forged) -> None:
    leaf: Any = Obj("torch.nn.modules.linear.Identity", {"_modules": {}})
    for _ in range(11):
        leaf = Obj("torch.nn.modules.container.Sequential", {"_modules": {str(i): leaf for i in range(100)}})
    f.layers[0]._modules["bush"] = leaf


def chain(f: Forged) -> None:
    leaf: Any = {}
    for _ in range(100):  # deeper would only overflow the stack of the test's own pickler
        leaf = {"x": Obj("torch.nn.modules.container.Sequential", {"_modules": leaf})}
    f.layers[0]._modules.update(leaf)


def relabel(layers: list[Any]) -> None:
    layers[-1].__class__ = type("Record", (Record,), {"kind": "models.common.Conv"})


def no_activation(f: Forged) -> None:
    def strip(module: Any) -> None:
        for key, child in list(module._modules.items()):
            if isinstance(child, Record) and child.kind.startswith("torch.nn.modules.activation"):
                del module._modules[key]
            elif isinstance(child, Record):
                strip(child)

    strip(f.model)


def escape(f: Forged) -> None:
    f.layers[0].__dict__.setdefault("_parameters", {})["bad\x1b[31m"] = f.tensor(torch.zeros(1), "bad")


EVIL_NAMES = ("\x1b[31mred\x1b]0;owned\x07", "<script>alert(1)</script>\r\n\u202egnp.exe")


def labels() -> dict[str, Change]:
    """Class names. None of these is worth refusing a model for; none may reach a terminal as it is."""
    for_classes = {
        "escapes": list(EVIL_NAMES), "2^60 texts": nested(60), "lists of 2^60 texts": [nested(60)] * 2,
        "itself": [itself(), itself()], "numbers": [1, 10**600], "half a surrogate": ["\ud800", "b"], "too few": ["a"],
        "too many": ["a"] * 100_000, "a text": "ab", "a number": 3, "nothing": None, "long": ["a" * 1_000_000, "b"],
        "a mapping with other keys": {"a": "b", (1,): "c"}, "a mapping": {0: EVIL_NAMES[0], 1: EVIL_NAMES[1]},
    }  # fmt: skip
    made: dict[str, Change] = {}
    for what, value in for_classes.items():
        made[f"names: {what}"] = ((lambda v: lambda f: setattr(f.model, "names", v))(value), None)
    return made
