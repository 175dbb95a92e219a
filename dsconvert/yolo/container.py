"""The two forms of PyTorch's files: where the pickle lies, and where the numbers.

Since version 1.6 `torch.save` writes a zip with one pickle and an entry for each run of numbers. Older versions wrote
five pickles: a magic number, a protocol number, facts about the machine, the object, and the keys of its numbers in
order. Each run of numbers follows, with its length before it. Pickles are only cut out here, never read.
"""

from __future__ import annotations

import io
import os
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from dsconvert.base.errors import InputError, printable
from dsconvert.base.filekinds import AGAIN, CHECKPOINT, EXPORTED, LEGACY_MAGIC, SOURCE, refuse_other

MAX_PICKLE_BYTES = 2 << 20  # pickle without tensors: 0.1 MB for a yolov5n, under 1 MB for a yolov5x6 with optimizer
MAX_DIRECTORY_BYTES = 8 << 20  # of the zip's directory, which has 60 kB for a yolov5n
# what zipfile raises, besides system errors, for entries that differ from the directory
_DAMAGE = (zipfile.BadZipFile, zlib.error, struct.error, OSError, ValueError, OverflowError, NotImplementedError,
           RuntimeError, EOFError)  # fmt: skip
_LEGACY_START = LEGACY_MAGIC + b"\x80\x02M\xe9\x03."  # the magic number, and protocol 1001


@dataclass(frozen=True)
class Storage:
    """A run of `numel` numbers stored under `key`; it is read when a tensor needs it."""

    key: str
    dtype: torch.dtype
    numel: int

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return self.numel * self.dtype.itemsize


class Zipped:
    """A zip as PyTorch writes it; `pickles` holds its one pickle."""

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.path = path
        self._archive, self._entries = _entries(stream, path)
        self.pickles: Sequence[bytes] = (_pickle(self._archive, self._entries, path),)

    def numbers(self, storage: Storage) -> bytes:
        """Return the bytes of a run. Raises InputError if there are fewer or more than it declares."""
        entry = self._entries.get(f"data/{storage.key}")
        if entry is None or entry.file_size != storage.nbytes:
            raise InputError(f"{self.path} is damaged: the numbers of a weight are missing or too few.")
        try:
            return self._archive.read(entry)
        except _DAMAGE:
            raise InputError(f"{self.path} is damaged: the checksum of a weight is wrong.") from None


class Legacy:
    """A file from before PyTorch 1.6; `pickles` are the facts about the machine, the object, and the keys of its
    numbers.

    `place` finds each run, once the keys are read. No checksum protects such a file.
    """

    def __init__(self, stream: BinaryIO, path: Path) -> None:
        self.path, self._stream = path, stream
        stream.seek(0)
        head = stream.read(len(_LEGACY_START) + MAX_PICKLE_BYTES)
        if not head.startswith(_LEGACY_START):
            raise InputError(f"{path} is damaged: it begins like a PyTorch checkpoint, but does not go on like one.")
        found, at = [], len(_LEGACY_START)
        for _ in range(3):
            end = _pickle_end(head, at, path)
            found.append(head[at:end])
            at = end
        self.pickles: Sequence[bytes] = found
        self._start, self._places = at, dict[str, tuple[int, int]]()

    def place(self, keys: object, storages: Mapping[str, Storage]) -> None:
        """Find each run, from the list of keys and what the object says about them."""
        size, at = os.fstat(self._stream.fileno()).st_size, self._start
        if not isinstance(keys, list) or len(keys) != len(storages) or {*map(type, keys)} - {str}:
            raise InputError(f"{self.path} is damaged: the list of its weights does not fit them.")
        for key in keys:
            storage = storages.get(key)
            self._stream.seek(at)
            length = self._stream.read(8)
            if storage is None or key in self._places:
                raise InputError(f"{self.path} is damaged: the list of its weights does not fit them.")
            if len(length) < 8 or at + 8 + storage.nbytes > size:
                raise InputError(f"{self.path} is damaged or truncated: it declares larger weights than it holds.")
            if struct.unpack("<q", length)[0] != storage.numel:
                raise InputError(f"{self.path} is damaged: the numbers of a weight are missing or too few.")
            self._places[key] = at + 8, storage.nbytes
            at += 8 + storage.nbytes

    def numbers(self, storage: Storage) -> bytes:
        """Return the bytes of a run. Raises InputError if there are fewer or more than it declares."""
        at, length = self._places.get(storage.key, (0, -1))
        self._stream.seek(at)
        data = self._stream.read(length) if length == storage.nbytes else b""
        if len(data) != storage.nbytes:
            raise InputError(f"{self.path} is damaged: the numbers of a weight are missing or too few.")
        return data


def open_container(stream: BinaryIO, path: Path) -> Zipped | Legacy:
    """Open the file in its form. Raises InputError, saying what it is, for any other file."""
    start = stream.read(len(LEGACY_MAGIC))
    if start == LEGACY_MAGIC:
        return Legacy(stream, path)
    if not start.startswith(b"PK"):
        refuse_other(path, CHECKPOINT)
    return Zipped(stream, path)


def _pickle_end(data: bytes, start: int, path: Path) -> int:
    """Return where the pickle that begins at `start` ends."""
    stream = io.BytesIO(data)
    stream.seek(start)
    try:
        for _ in pickletools.genops(stream):
            pass
    except Exception:  # pickletools raises many kinds
        if len(data) >= MAX_PICKLE_BYTES:
            raise InputError(f"{path} has a larger table of contents than any YOLOv5 checkpoint.") from None
        raise InputError(f"{path} is damaged or truncated: its pickle cannot be parsed.") from None
    return stream.tell()


def _entries(stream: BinaryIO, path: Path) -> tuple[zipfile.ZipFile, dict[str, zipfile.ZipInfo]]:
    """Return the zip and its entries, by name without the leading folder, which the pickle's name shows."""
    not_one = InputError(f"{path} is not a PyTorch checkpoint, or it is truncated; {AGAIN}, or give a whole one.")
    try:
        if _directory_bytes(stream) > MAX_DIRECTORY_BYTES:
            raise InputError(f"{path} is a zip archive but not a PyTorch checkpoint.")
        archive = zipfile.ZipFile(stream)
    except _DAMAGE as error:
        raise error if isinstance(error, InputError) else not_one from None
    infos = archive.infolist()
    names = [i.filename for i in infos]
    pickles = [i.filename for i in infos if i.filename.endswith("data.pkl")]
    if any(i.filename.endswith("constants.pkl") for i in infos):
        raise InputError(
            f"{path} is a TorchScript export; dsconvert needs the training checkpoint (.pt) that it was made from, or "
            "an ONNX file of the network."
        )
    if len(pickles) != 1 or len({*names}) != len(names):
        raise InputError(f"{path} is a zip archive but not a PyTorch checkpoint{_inside(names)}.")
    if any(i.compress_type != zipfile.ZIP_STORED or i.compress_size != i.file_size for i in infos):
        raise InputError(f"{path} is a compressed archive, which PyTorch never writes; unpack it, or save it again.")
    root = pickles[0].removesuffix("data.pkl")
    return archive, {i.filename.removeprefix(root): i for i in infos if i.filename.startswith(root)}


def _inside(names: Sequence[str]) -> str:
    """Return what a zip that is not a checkpoint holds, and what to do."""
    for ending, what in _ZIPS.items():
        if any(name.endswith(ending) for name in names):
            return f": it is {what}"
    models = [name for name in names if name.lower().endswith((".pt", ".pth", ".onnx", ".safetensors"))]
    if models:
        return f": it holds {printable(models[0], 100)}; unpack it and give that"
    if not names:
        return f": it is empty; {AGAIN}"
    return f": it holds {printable(names[0], 100)}; give the checkpoint (.pt) of the network"


# end of an entry's name -> what the zip is, and what to do
_ZIPS = {
    ".npy": "NumPy arrays (npz); give the checkpoint (.pt) of the network",
    "model.weights.h5": f"a Keras model; {EXPORTED}",
    ".mlmodel": f"a Core ML model; {SOURCE}",
    "models/model.json": f"a program of torch.export; {SOURCE}",
    "extern_modules": f"a torch.package archive; {SOURCE}",
}


def _directory_bytes(stream: BinaryIO) -> int:
    """Return the size of the zip's directory, which Python's zipfile would read whole.

    Raises ValueError without one.
    """
    size = stream.seek(0, os.SEEK_END)
    stream.seek(max(0, size - 42))
    tail = stream.read()
    if len(tail) < 22 or tail[-22:-18] != b"PK\x05\x06":  # PyTorch writes no comment behind it
        raise ValueError("no end of central directory")
    found = int(struct.unpack("<L", tail[-10:-6])[0])
    if len(tail) == 42 and tail[:4] == b"PK\x06\x07":
        stream.seek(struct.unpack("<Q", tail[8:16])[0])
        found = int(struct.unpack("<Q", stream.read(56)[40:48])[0])
    return found


def _pickle(archive: zipfile.ZipFile, entries: dict[str, zipfile.ZipInfo], path: Path) -> bytes:
    if entries["data.pkl"].file_size > MAX_PICKLE_BYTES:
        raise InputError(f"{path} has a larger table of contents than any YOLOv5 checkpoint.")
    try:
        order = archive.read(entries["byteorder"]) if "byteorder" in entries else b"little"
        content = archive.read(entries["data.pkl"])
    except _DAMAGE:
        raise InputError(f"{path} is damaged: its table of contents cannot be read.") from None
    if order.strip() != b"little":
        raise InputError(f"{path} was written on a big-endian machine; save it again on an ordinary one.")
    return content
