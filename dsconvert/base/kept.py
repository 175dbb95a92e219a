"""Keep calibration values of every image: in memory as long as there is room, then in files without a name.

So memory does not grow with the number of images. A file disappears when it is closed, however the process ends (on
Windows: only if it ends normally).
"""

from __future__ import annotations

import ctypes
import errno
import math
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import IO

import torch
from torch import Tensor

from dsconvert.base.errors import InputError

MEMORY = 1 << 30  # bytes in memory at once, of all kinds of values


def give_back() -> None:
    """Let the C library return free memory to the system.

    glibc keeps the memory that threads free, which came to 10 MB an image, until it is asked. Other libraries need no
    call.
    """
    with suppress(AttributeError, OSError, TypeError):  # not glibc, no library of that name, or Windows
        ctypes.CDLL(None).malloc_trim(0)


class Room:
    """How many more bytes may be kept in memory, and the folder for files with the rest."""

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder, self.left = folder, memory

    def kept(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Kept:
        """Return room for `count` tensors of one shape and type; each must be put before it is read."""
        size = math.prod(shape) * dtype.itemsize
        if count * size <= self.left:
            return InMemory(self, torch.empty((count, *shape), dtype=dtype))
        return OnDisk(self, tuple(shape), dtype, size)

    def like(self, count: int, value: Tensor) -> Kept:
        """Return room for `count` tensors of the shape and type of this one."""
        return self.kept(count, value.shape, value.dtype)


class Kept:
    """Tensors of one shape and type by index. Threads may put and get at the same time."""

    def put(self, index: int, value: Tensor) -> None:
        """Keep a tensor from any device."""
        raise NotImplementedError

    def get(self, index: int) -> Tensor:
        """Return a kept tensor in main memory; it must not be changed."""
        raise NotImplementedError

    def free(self) -> None:
        """Drop all tensors."""
        raise NotImplementedError


class InMemory(Kept):
    """Keeps all tensors in one, (count, *shape)."""

    def __init__(self, room: Room, values: Tensor) -> None:
        self.room, self.values = room, values
        room.left -= values.nbytes

    def put(self, index: int, value: Tensor) -> None:
        self.values[index] = value

    def get(self, index: int) -> Tensor:
        return self.values[index]

    def free(self) -> None:
        self.room.left += self.values.nbytes
        self.values = torch.empty(0)


class OnDisk(Kept):
    """Keeps tensors one after another in a file."""

    def __init__(self, room: Room, shape: tuple[int, ...], dtype: torch.dtype, size: int) -> None:
        self.folder, self.shape, self.dtype, self.size = room.folder, shape, dtype, size
        self.lock = Lock()
        self.file = self._opened()

    def _opened(self) -> IO[bytes]:
        try:
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
            return tempfile.TemporaryFile(dir=self.folder, prefix="dsconvert-", buffering=0)
        except OSError as error:
            raise InputError(f"{self._where()} cannot hold calibration values: {error.strerror}.") from None

    def _where(self) -> str:
        return str(self.folder or tempfile.gettempdir())

    def put(self, index: int, value: Tensor) -> None:
        data = memoryview(value.detach().cpu().contiguous().numpy().tobytes())
        try:
            with self.lock:
                self.file.seek(index * self.size)
                while data:
                    data = data[self.file.write(data) :]
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise InputError.naming(
                "{} has no room for the values that calibration keeps; use fewer {samples}, a smaller {imgsz}, or "
                "{name} or {cache} on a larger disk.",
                self._where(),
            ) from None

    def get(self, index: int) -> Tensor:
        data = bytearray(self.size)
        rest = memoryview(data)
        with self.lock:
            self.file.seek(index * self.size)
            while rest:
                count = self.file.readinto(rest)  # type: ignore[attr-defined]
                if not count:
                    raise KeyError(f"image {index} was never kept")
                rest = rest[count:]
        return torch.frombuffer(data, dtype=self.dtype).reshape(self.shape)

    def free(self) -> None:
        self.file.close()
