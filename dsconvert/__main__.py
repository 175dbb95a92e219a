"""`python -m dsconvert`, and the `dsconvert` command."""

from __future__ import annotations

import os
import sys


def run() -> None:
    """Start the command line; an interrupt during the seconds that torch takes to load is one line, too."""
    # Before torch loads OpenMP, which reads it once. By default a thread that waits for others spins for a while: on a
    # busy machine it spins away the time in which they would have come.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        from dsconvert.base.streams import open_streams

        open_streams()
        from dsconvert.commands.cli import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
