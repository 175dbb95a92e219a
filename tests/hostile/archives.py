"""Archives that lie, files of other kinds, models of other kinds."""

from __future__ import annotations

import bz2
import io
import lzma
import pickle
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from case import DAMAGED, STRANGE, Case
from forge import Obj, archive, dump


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
    for what, fields in {
        "a longer name": {"name": 60_000}, "a name of no length": {"name": 0}, "an extra field": {"extra": 60_000},
        "names in UTF-8": {"flags": 0x800, "first": 0xFF}, "no header": {"magic": 0},
    }.items():  # fmt: skip
        for entry in (b"archive/data.pkl", b"archive/data/0"):
            yield Case(f"local header of {entry.decode()}: {what}", local(whole_of(good), entry, **fields), DAMAGED)
    both = patched(archive(structure, {"0": bytes(64), "1": bytes(64)}), b"archive/data/1", offset=0)
    yield Case("two entries in one place", both, "no model|" + DAMAGED)
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


def whole_of(good: Path) -> bytes:
    """The checkpoint, its folder called `archive`."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(buffer, "w") as target:
        for info in source.infolist():
            target.writestr("archive/" + info.filename.partition("/")[2], source.read(info))
    return buffer.getvalue()


def local(data: bytes, entry: bytes, **fields: int) -> bytes:
    """The archive with some fields changed in the header before an entry's bytes, and the first letter of its name."""
    out = bytearray(data)
    start = data.index(entry) - 30
    places = {"magic": (0, "<I"), "flags": (6, "<H"), "name": (26, "<H"), "extra": (28, "<H"), "first": (30, "<B")}
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
        "models.yolo.ClassificationModel": "classification",
        "models.common.Classify": "classification",
        "ultralytics.nn.tasks.DetectionModel": "YOLOv8 or later", "ultralytics.nn.tasks.SegmentationModel": "YOLOv8",
        "models.yolo.IAuxDetect": "YOLOv7", "models.common.CBAM": "attention",
        "models.experimental.Ensemble": "ensemble", "models.common.DetectMultiBackend": "wrapped for inference",
        "torchvision.models.resnet.ResNet": "torchvision.models.resnet.ResNet",
        "models.common.CoordAtt": "CoordAtt, a layer",
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
    yield Case("before PyTorch 1.6", old.getvalue(), "plain state dict")


def saved(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()
