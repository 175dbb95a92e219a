"""What something costs in a process of its own: seconds, and memory at its peak.

No process outlives this one: an interrupt or SIGTERM ends what was started, too.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# What the dsconvert command sets where it starts, for scripts that call its functions: who waits lets others run.
AS_THE_COMMAND = {"OMP_WAIT_POLICY": "PASSIVE"}
# A process of a few MB, as the peak that is reported of a child begins with what its parent had.
WRAPPER = """
import json, resource, subprocess, sys, time
began = time.perf_counter()
code = subprocess.call(sys.argv[1:], stdout=subprocess.DEVNULL)
seconds, peak = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(json.dumps({"code": code, "seconds": seconds, "peak_bytes": peak * 1024}))
"""


@contextmanager
def sigterm_unwinds() -> Iterator[None]:
    """Within it, SIGTERM raises SystemExit, so that every `finally` runs. Only the main thread hears signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def output_of(command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> str:
    """What the command prints. Raises SystemExit with its last line when it fails."""
    with sigterm_unwinds():
        # a process group to end as a whole; no session, as Linux would give one half of the machine by itself, however
        # many neighbours are busy
        running = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, process_group=0,
            env={**os.environ, **(env or {})},
        )  # fmt: skip
        try:
            out, errors = running.communicate()
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)  # it, and what it started
            running.wait()
            raise
    if running.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {running.returncode}: {_last(errors)}")
    return out


def _last(errors: str) -> str:
    return (errors.strip().splitlines() or ["it said nothing"])[-1]


def seconds_of(command: Sequence[str], env: Mapping[str, str] | None = None, cwd: Path | None = None) -> float:
    """Seconds from start to end."""
    began = time.perf_counter()
    output_of(command, env, cwd)
    return time.perf_counter() - began


def peak_of(command: Sequence[str]) -> tuple[float, int]:
    """Seconds from start to end, and the most bytes that were resident at once."""
    found = last_json([sys.executable, "-I", "-S", "-c", WRAPPER, *command])
    if found["code"]:
        raise SystemExit(f"{' '.join(command)} ended with {found['code']}; run it by itself to see why.")
    return float(found["seconds"]), int(found["peak_bytes"])


def last_json(command: Sequence[str], env: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The last line that the command prints, as JSON."""
    found: dict[str, Any] = json.loads(output_of(command, env).splitlines()[-1])
    return found
