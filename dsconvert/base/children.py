"""Start processes that run a module of dsconvert."""

from __future__ import annotations

import os
import sys


def command(module: str, *arguments: object) -> list[str]:
    """Return the command line that runs a module of this dsconvert."""
    return [sys.executable, "-m", module, *map(str, arguments)]


def environment() -> dict[str, str]:
    """Return the environment for such a process.

    It finds modules where this process does (`sys.path`), and never in the working folder, where a stranger's files may
    lie.
    """
    return {**os.environ, "PYTHONSAFEPATH": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
