"""Provide standard input, output and error if the process was started without them (`>&-`, services, Windows)."""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Open missing standard streams to nowhere.

    Otherwise the next file to be opened would get a stream's number, and receive what libraries print.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (open until the process ends)
