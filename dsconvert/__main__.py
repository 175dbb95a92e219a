"""`python -m dsconvert`, and the `dsconvert` command."""

from __future__ import annotations

import os
import sys


def run() -> None:
    """Start the command line. An interrupt while torch is loading also gives one line."""
    # Set before torch loads OpenMP, which reads it once. By default a waiting thread spins for a while. On a busy
    # machine it thereby takes the time of the threads that it waits for.
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
