"""Run command lines in a process of its own and measure each: `python rows.py` reads a JSON list of lists of words from
stdin and prints one JSON line for each: exit code, what was said, CPU seconds, and bytes at the peak, those of the
processes that it started included. The processor's limit ends what would never end."""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import sys
from pathlib import Path
from typing import Any

MOST_CPU = 300  # seconds; the tests demand far less


def seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def peak() -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return max(int(found[1]), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) * 1024


def run(words: list[str]) -> dict[str, Any]:
    from dsconvert.commands.cli import main

    out, err = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    return {"code": code, "out": out.getvalue()[-2000:], "err": err.getvalue()[-2000:]}


def measured(words: list[str]) -> dict[str, Any]:
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    began = seconds()
    resource.setrlimit(resource.RLIMIT_CPU, (int(began) + MOST_CPU, resource.RLIM_INFINITY))
    found = run(words)
    return {**found, "seconds": seconds() - began, "peak": peak()}


if __name__ == "__main__":
    answers = sys.stdout
    for words in json.load(sys.stdin):
        answers.write(json.dumps(measured(words)) + "\n")
        answers.flush()
