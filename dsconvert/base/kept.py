"""What calibration keeps of every image: in memory as far as there is room, the rest in files without a name.

Memory does not grow with the number of images. A file is gone when it is closed, however the process ends (on Windows:
when it ends by itself).
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

MEMORY = 1 << 30  # bytes that are kept in memory at once, over all kinds of values


def give_back() -> None:
    """Let the C library return to the system what is free. glibc keeps what its threads free where anything lies behind
    it, which came to 10 MB an image, and is asked; others need not be."""
    with suppress(AttributeError, OSError, TypeError):  # not glibc, no libc of that name, Windows
        ctypes.CDLL(None).malloc_trim(0)


class Room:
    """How many bytes may still be kept in memory, and the folder of the files for what is beyond."""

    def __init__(self, folder: Path | None = None, memory: int = MEMORY) -> None:
        self.folder, self.left = folder, memory

    def kept(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> Kept:
        """Room for `count` tensors of one shape and type; each must be put before it is got."""
        size = math.prod(shape) * dtype.itemsize
        if count * size <= self.left:
            return InMemory(self, torch.empty((count, *shape), dtype=dtype))
        return OnDisk(self, tuple(shape), dtype, size)

    def like(self, count: int, value: Tensor) -> Kept:
        """Room for `count` tensors of the shape and type of this one."""
        return self.kept(count, value.shape, value.dtype)


class Kept:
    """Tensors of one shape and type by number. Threads may put and get at the same time."""

    def put(self, index: int, value: Tensor) -> None:
        """Keep a tensor, from any device."""
        raise NotImplementedError

    def get(self, index: int) -> Tensor:
        """A kept tensor, in main memory; it must not be changed."""
        raise NotImplementedError

    def free(self) -> None:
        """Forget all of them."""
        raise NotImplementedError


class InMemory(Kept):
    """All in one tensor (count, *shape)."""

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
    """One after another in a file."""

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
                "{} has no room for what calibration keeps of so many images; fewer {samples}, a smaller {imgsz}, or "
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
