"""Run `child.py` and judge what it reports."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

MOST_BYTES, MOST_SECONDS = 2 << 30, 30.0


def run_child(reader: str, warm: Path, files: Sequence[Path]) -> Iterator[dict[str, Any]]:
    """One result a file; fails when the process died. `warm` is a good file, read before the watch begins."""
    command = [sys.executable, str(Path(__file__).with_name("child.py")), reader, str(warm), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"died on {files[len(lines)]}: {done.stderr[-2000:]}"
    assert len(lines) == len(files)
    yield from map(json.loads, lines)


def unharmed(result: dict[str, Any], words: str | None) -> list[str]:
    """What is wrong with a result: no words means the file may load, words those of its refusal."""
    found = [f"did {event}" for event in result["events"]]
    if result["peak"] > MOST_BYTES:
        found.append(f"memory {result['peak'] / 1e9:.2f} GB")
    if result["seconds"] > MOST_SECONDS:
        found.append(f"{result['seconds']:.0f} s")
    error, text = result["error"], result["text"]
    if error is None:
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
