"""Standard input, output and error output, whoever started the process without them (`>&-`, services, Windows)."""

from __future__ import annotations

import os
import sys


def open_streams() -> None:
    """Give the process those that it lacks, to nowhere: else the next file to be opened would take a stream's number,
    and get what libraries print."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
