"""Measure what loading and running a model costs a fresh process: time to load, and peak memory.

Every measurement is a process of its own, `python -m dsconvert.scoring.footprint`: peak memory never falls, so a second
model would be hidden by the first. VmHWM is read, because a child inherits the maximum of getrusage.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from dsconvert.base import children
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.onnxfile.bounds import enforced

RUNS = 3  # inferences before the peak is read; the first allocates buffers


@dataclass(frozen=True)
class Footprint:
    """What a model costs a process.

    load_ms: milliseconds to load it.
    peak_bytes: resident memory at the peak; None where the system does not tell.
    base_bytes: resident memory before loading (Python and the engine).
    """

    load_ms: float
    peak_bytes: int | None
    base_bytes: int | None


def measure_footprint(
    path: Path, engine: str, threads: int, imgsz: SizeLike | None, size: int | None = None
) -> Footprint:
    """Load and run the model in a fresh process. Raises InputError when that process cannot use it.

    size: bytes of the file with its external data.
    """
    numbers = [str(n or 0) for n in (threads, Size.perhaps(imgsz), size)]
    command = children.command("dsconvert.scoring.footprint", path, engine, *numbers)
    done = subprocess.run(command, env=children.environment(), capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise InputError(f"{path} could not be measured in {engine}: {last.removesuffix('.')}.")
    return Footprint(**json.loads(done.stdout.splitlines()[-1]))


def _here(path: Path, engine: str, threads: int, imgsz: Size | None, size: int | None) -> Footprint:
    """Measure in this process."""
    from dsconvert.onnxfile.engines import engine_version, open_model

    engine_version(engine)  # imports the engine
    base = _peak_bytes()
    began = time.perf_counter()
    run = open_model(path, engine, threads, imgsz, size)
    load_ms = (time.perf_counter() - began) * 1e3
    for _ in range(RUNS):
        run()
    return Footprint(load_ms, _peak_bytes(), base)


def _peak_bytes() -> int | None:
    try:
        found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:  # Windows and macOS do not have it
        return None
    return None if found is None else int(found[1]) * 1024


if __name__ == "__main__":
    path, engine, threads, imgsz, size = sys.argv[1:]
    asked = Size.read(imgsz) if imgsz != "0" else None
    try:
        with enforced():
            result = _here(Path(path), engine, int(threads), asked, int(size) or None)
    except InputError as error:
        sys.stderr.write(f"{error}\n")
        sys.stderr.flush()
        os._exit(1)  # a call that took too long may still be running
    sys.stdout.write(json.dumps(vars(result)) + "\n")
