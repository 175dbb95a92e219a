"""Load and run a stranger's ONNX file once in a process of its own, so that a crash of the engine ends only that
process.

The process is `python -m dsconvert.onnxfile.trial`. It imports no torch and takes about half a second. It reports only
crashes and exceeded bounds. Any other fault appears when the caller loads the file again and refuses it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np

from dsconvert.base import children
from dsconvert.base.errors import InputError
from dsconvert.base.size import USUAL, Size
from dsconvert.onnxfile import bounds
from dsconvert.onnxfile.bounds import Beyond, Bounds, are_enforced, enforced
from dsconvert.onnxfile.engines import TYPES, as_input, check_pixels, load_file, open_model

REFUSED = 3  # the process's exit code for a file beyond its bounds
GRACE = 60.0  # seconds beyond the bound for the process's start and end
_TRIED: set[tuple[object, ...]] = set()


def try_out(path: Path, engine: str, threads: int, imgsz: Size | None, size: int) -> None:
    """Load and run the file once in a process of its own; files that were tried before are skipped.

    size: bytes of the file with its external data.

    Raises InputError where the engine crashes, or the file goes beyond its bounds. Nothing is done unless bounds are
    enforced: a program that uses dsconvert may not be allowed to start processes.
    """
    if not are_enforced():
        return
    status = path.stat()
    key = (
        path.resolve(),
        status.st_mtime_ns,
        status.st_size,
        status.st_ino,
        engine,
        threads,
        imgsz,
        bounds.BASE_SECONDS,
    )
    if key in _TRIED:
        return
    line = children.command("dsconvert.onnxfile.trial", path, engine, threads, imgsz or 0, size, bounds.BASE_SECONDS)
    most = Bounds(str(path), size).most_seconds(0) + GRACE
    try:
        done = subprocess.run(line, env=children.environment(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.PIPE, timeout=most)  # fmt: skip
    except subprocess.TimeoutExpired:  # the engine blocks all threads, so the bound inside the process had no effect
        raise InputError(
            f"{path} takes over {most:.0f} s to load and run once, more than a network of its size should, so it was "
            "stopped."
        ) from None
    if done.returncode == REFUSED:
        raise InputError(done.stderr.decode(errors="replace").strip())
    if done.returncode == -signal.SIGINT:
        raise KeyboardInterrupt
    if done.returncode < 0 or done.returncode > 255:  # ended by a signal, or by Windows' equivalent
        raise InputError(f"{path} makes {_NAMES[engine]} crash, so it was not loaded; export it again.")
    _TRIED.add(key)


_NAMES = {"onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}


def _here(path: Path, engine: str, threads: int, imgsz: Size | None, size: int) -> None:
    if engine == "openvino":
        open_model(path, engine, threads, imgsz, size)()
        return
    running = load_file(path, threads, size)
    entries = running.inner.get_inputs()
    if len(entries) != 1 or len(entries[0].shape) != 4 or entries[0].type not in TYPES:
        return
    given, (height, width) = entries[0].shape, (imgsz or USUAL).pair
    last = given[3] in (1, 3) and given[1] not in (1, 3)
    usual = (1, height, width, 3) if last else (1, 3, height, width)
    shape = [n if isinstance(n, int) else other for n, other in zip(given, usual, strict=True)]
    if min(shape) < 1:
        return
    check_pixels(path, (shape[0], 3, *(shape[1:3] if last else shape[2:])), imgsz)
    image = as_input(np.random.default_rng(0).random(shape, np.float32), TYPES[entries[0].type])
    running.run(None, {entries[0].name: image})


def _main(path: str, engine: str, threads: str, imgsz: str, size: str, seconds: str) -> int:
    if bounds.resource is not None:  # a crash here is expected and needs no core file
        bounds.resource.setrlimit(bounds.resource.RLIMIT_CORE, (0, 0))
    bounds.BASE_SECONDS = float(seconds)
    with enforced(), suppress(Exception):
        try:
            _here(Path(path), engine, int(threads), Size.read(imgsz) if imgsz != "0" else None, int(size))
        except Beyond as error:
            sys.stderr.write(f"{error}\n")
            sys.stderr.flush()
            return REFUSED
    return 0


if __name__ == "__main__":
    os._exit(_main(*sys.argv[1:]))  # a call that took too long may still be running
