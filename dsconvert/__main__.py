"""`python -m dsconvert`, and the `dsconvert` command."""

from __future__ import annotations

import sys


def run() -> None:
    """Start the command line; an interrupt during the seconds that torch takes to load is one line, too."""
    try:
        from dsconvert.streams import open_streams

        open_streams()
        from dsconvert.cli import main

        main()
    except KeyboardInterrupt:
        sys.stderr.write("Error: Interrupted.\n")
        sys.exit(130)


if __name__ == "__main__":
    run()
