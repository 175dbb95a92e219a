"""Take a checkpoint apart and put it together again with anything in it: protocol 2 pickles, opcode by opcode."""

from __future__ import annotations

import io
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dsconvert.yolo.archive import PARAMETER, TENSOR, Record, Storage, open_archive

STORAGE_NAMES = {
    torch.float32: "FloatStorage", torch.float16: "HalfStorage", torch.float64: "DoubleStorage",
    torch.int64: "LongStorage", torch.bfloat16: "BFloat16Storage",
}  # fmt: skip


class Raw(bytes):
    """Opcodes to be written as they are."""


class Obj:
    """An object of the class `kind` (module.name), its state or, when `args` are given, a call of it."""

    def __init__(self, kind: str, state: Mapping[str, Any] | None = None, args: tuple[Any, ...] | None = None) -> None:
        self.kind, self.state, self.args = kind, state or {}, args


def text(value: str) -> bytes:
    data = value.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(data)) + data


def name(full: str) -> bytes:
    """The opcode that finds a global."""
    module, _, last = full.rpartition(".")
    return f"c{module}\n{last}\n".encode()


def dump(value: Any) -> bytes:
    """A whole pickle of dictionaries, lists, tuples, plain values, Records, Storages, Obj and Raw; what is shared or
    recursive stays so."""
    out: list[bytes] = [b"\x80\x02"]
    memo: dict[int, int] = {}
    alive: list[Any] = []  # an id names an object only while that object lives

    def remember(item: Any) -> None:
        alive.append(item)
        memo[id(item)] = len(memo)
        out.append(b"r" + struct.pack("<I", memo[id(item)]))

    def write(item: Any) -> None:
        if isinstance(item, Raw):
            out.append(item)
        elif item is None or isinstance(item, bool):
            out.append({None: b"N", True: b"\x88", False: b"\x89"}[item])
        elif isinstance(item, int):
            data = item.to_bytes(item.bit_length() // 8 + 1, "little", signed=True)
            out.append(struct.pack("<ci", b"J", item) if len(data) <= 4 else b"\x8a" + bytes([len(data)]) + data)
        elif isinstance(item, float):
            out.append(b"G" + struct.pack(">d", item))
        elif isinstance(item, str):
            out.append(text(item))
        elif isinstance(item, Storage):
            parts = ("storage", Raw(name(f"torch.{STORAGE_NAMES[item.dtype]}")), item.key, "cpu", item.numel)
            write(parts)
            out.append(b"Q")
        elif id(item) in memo:
            out.append(b"j" + struct.pack("<I", memo[id(item)]))
        elif isinstance(item, tuple):
            out.append(b"(")
            for part in item:
                write(part)
            out.append(b"t")
        elif isinstance(item, list):
            out.append(b"]")
            remember(item)
            out.append(b"(")
            for part in item:
                write(part)
            out.append(b"e")
        elif isinstance(item, (Record, Obj)):
            made(item)
        elif isinstance(item, dict):
            out.append(b"}")
            remember(item)
            pairs(item)
        else:
            raise TypeError(type(item))

    def pairs(item: dict[Any, Any]) -> None:
        out.append(b"(")
        for key, part in item.items():
            write(key)
            write(part)
        out.append(b"u")

    def made(item: Record | Obj) -> None:
        out.append(name(item.kind))
        if isinstance(item, dict):  # an OrderedDict
            out.append(b")R")
            remember(item)
            pairs(item)
            return
        if item.args:
            write(item.args)
            out.append(b"R")
            remember(item)
            return
        out.append(b")\x81")
        remember(item)
        write(item.state if isinstance(item, Obj) else {k: v for k, v in vars(item).items() if k != "args"})
        out.append(b"b")

    write(value)
    return b"".join(out) + b"."


def archive(pickle: bytes, blobs: Mapping[str, bytes], extra: Mapping[str, bytes] | None = None) -> bytes:
    """The zip PyTorch would write."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as target:
        target.writestr("archive/data.pkl", pickle)
        target.writestr("archive/byteorder", "little")
        for key, data in blobs.items():
            target.writestr(f"archive/data/{key}", data)
        target.writestr("archive/version", "3\n")
        for key, data in (extra or {}).items():
            target.writestr(key, data)
    return buffer.getvalue()


class Forged:
    """A checkpoint taken apart: change `top`, `blobs` or what the shortcuts name, and ask for its bytes."""

    def __init__(self, path: Path) -> None:
        with open_archive(path) as opened:
            self.top: Any = opened.top
        with zipfile.ZipFile(path) as source:
            names = [n for n in source.namelist() if "/data/" in n]
            self.blobs = {n.rpartition("/data/")[2]: source.read(n) for n in names}

    @property
    def model(self) -> Any:
        return self.top["model"]

    @property
    def layers(self) -> list[Any]:
        return list(self.model._modules["model"]._modules.values())

    @property
    def detect(self) -> Any:
        return self.layers[-1]

    def tensor(self, values: torch.Tensor, key: str) -> Obj:
        """A new stored tensor."""
        self.blobs[key] = values.contiguous().numpy().tobytes()
        storage = Storage(key, values.dtype, values.numel())
        return tensor(storage, 0, tuple(values.shape), tuple(values.contiguous().stride()))

    def parameter(self, values: torch.Tensor, key: str) -> Obj:
        return Obj(PARAMETER, args=(self.tensor(values, key), False, Obj("collections.OrderedDict", args=())))

    def bytes(self) -> bytes:
        return archive(dump(self.top), self.blobs)


def tensor(storage: Any, offset: Any, size: Any, stride: Any) -> Obj:
    """A call of torch's tensor maker with anything."""
    return Obj(TENSOR, args=(storage, offset, size, stride, False, Obj("collections.OrderedDict", args=())))
