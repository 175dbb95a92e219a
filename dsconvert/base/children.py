"""Processes that dsconvert starts to run a module of its own."""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: object) -> list[str]:
    """The line that runs a module of this dsconvert."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Its environment: modules are found where this process finds them (`sys.path`), and never in the folder that it
    happens to be started in, where a stranger's files may lie."""
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
