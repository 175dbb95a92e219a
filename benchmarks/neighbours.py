"""Busy neighbours: processes that do nothing but compute, while something else is measured.

They end when the measurement does, however it ends: by an error, by SIGTERM, or killed. Each looks for its parent every
few milliseconds, and none runs longer than it was told.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from fresh import sigterm_unwinds

# arguments: the parent's number, and the most seconds
SPIN = """
import os, sys, time
parent, ends, said, n = int(sys.argv[1]), time.monotonic() + float(sys.argv[2]), False, 0
while os.getppid() == parent and time.monotonic() < ends:
    for _ in range(50_000):
        n += 1
    if not said and time.process_time() > 0.1:
        print("spinning", flush=True)
        said = True
"""


@contextmanager
def neighbours(count: int, most_seconds: float) -> Iterator[list[int]]:
    """So many processes, on the CPUs of this one; within it all of them compute. Their numbers. Raises SystemExit when
    one did not last: then what was measured beside them is worth nothing."""
    with sigterm_unwinds():
        started: list[subprocess.Popen[str]] = []
        try:
            for _ in range(count):
                command = [sys.executable, "-I", "-S", "-c", SPIN, str(os.getpid()), str(most_seconds)]
                started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
            if not all(s.stdout and s.stdout.readline() for s in started):
                raise SystemExit("A busy neighbour ended before it began to compute.")
            yield [s.pid for s in started]
            if any(s.poll() is not None for s in started):
                raise SystemExit(f"A busy neighbour ended, after {most_seconds:g} s at the latest; give it more time.")
        finally:
            for s in started:
                s.kill()
            for s in started:
                s.wait()
                if s.stdout:
                    s.stdout.close()
