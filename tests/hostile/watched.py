"""Run `child.py` and judge what it reports; run the command line in this process."""

from __future__ import annotations

import contextlib
import io
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from case import Case
from conftest import HANGS

MOST_BYTES, MOST_SECONDS = 2 << 30, 30.0  # seconds of the processor: the machine may be busy

Result = dict[str, Any]


def write_cases(cases: Iterable[Case], folder: Path, suffix: str) -> dict[Path, Case]:
    """The cases as files."""
    folder.mkdir(exist_ok=True)
    written = {folder / f"{index}{suffix}": case for index, case in enumerate(cases)}
    for path, case in written.items():
        path.write_bytes(case.data)
    return written


def run_child(warm: Sequence[tuple[str, Path]], files: Sequence[tuple[str, Path]]) -> list[Result]:
    """One result a (reader, file); fails when the process died. `warm` are read before the watch begins."""
    command = [sys.executable, str(Path(__file__).with_name("child.py"))]
    given = json.dumps([[(r, str(p)) for r, p in part] for part in (warm, files)])
    done = subprocess.run(command, input=given, capture_output=True, text=True, timeout=HANGS)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died on {files[len(lines)]}: {done.stderr[-2000:]}"
    assert len(lines) == len(files)
    return [json.loads(line) for line in lines]


def unharmed(result: Result, words: str | None) -> list[str]:
    """What is wrong with a result: no words means the file may load, words those of its refusal."""
    found = [f"did {event}" for event in result["events"]]
    if result["peak"] > MOST_BYTES:
        found.append(f"memory {result['peak'] / 1e9:.2f} GB")
    if result["seconds"] > MOST_SECONDS:
        found.append(f"{result['seconds']:.0f} s")
    error, text = result["error"], result["text"]
    if error is None:
        names = [n for n in text if isinstance(n, str)] if isinstance(text, list) else []
        found += [f"name {n!r}" for n in names if not n.isprintable() or len(n) > 200]
        return found + ([f"loaded: {str(text)[:80]}"] if words is not None else [])
    if error != "InputError":
        found.append(f"raised {error}: {text[:300]}")
    elif words is None:
        found.append(f"refused: {text}")
    if not text.endswith(".") or not text.isprintable() or ". " in text:
        found.append(f"not one sentence: {text[:300]}")
    if words is not None and not re.search(words, text):
        found.append(f"not in other words: {text[:300]}")
    return found


def problems(cases: dict[Path, Case], results: Iterable[Result]) -> str:
    """Everything wrong with the results of the cases, one line each."""
    by_file = {str(path): case for path, case in cases.items()}
    known = [r for r in results if r["file"] in by_file]
    assert len(known) == len(cases)
    return "\n".join(f"{by_file[r['file']].name}: {p}" for r in known for p in unharmed(r, by_file[r["file"]].words))


def dsconvert(folder: Path, *args: str) -> tuple[int, str, str]:
    """The command line in this process, which has torch loaded already: exit code, stdout, stderr."""
    from dsconvert.commands.cli import main

    out, err = io.StringIO(), io.StringIO()
    argv, sys.argv = sys.argv, ["dsconvert", *args]
    code = 0
    with contextlib.chdir(folder), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            sys.argv = argv
    return code, out.getvalue(), err.getvalue()
