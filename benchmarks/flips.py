"""Turn every bit of a model file the other way, one after the other: each such file must be refused.

    python benchmarks/flips.py runs/demo/model.safetensors --every 1

Exit code 1 when one of them loads. A file of n bytes is read 8 n times, about a millisecond each for a small one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.model.file import load_model


def refused(path: Path, bits: Iterable[int]) -> int:
    """How many of the file's copies with one of these bits turned are refused. The file is as before afterwards."""
    good, count = path.read_bytes(), 0
    data = bytearray(good)
    try:
        for bit in bits:
            data[bit // 8] ^= 1 << bit % 8
            path.write_bytes(data)
            try:
                load_model(path)
            except InputError:
                count += 1
            data[bit // 8] ^= 1 << bit % 8
    finally:
        path.write_bytes(good)
    return count


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path, help="a copy of this file is turned, in its folder")
    parser.add_argument("--every", type=int, default=1, help="only every so many-th bit")
    given = parser.parse_args()
    copy = given.model.with_name(f"turned-{given.model.name}")
    copy.write_bytes(given.model.read_bytes())
    began = time.perf_counter()
    bits = range(0, 8 * copy.stat().st_size, given.every)
    try:
        count = refused(copy, bits)
    finally:
        copy.unlink()
    figures = {"flips": len(bits), "refused": count, "seconds": round(time.perf_counter() - began)}
    sys.stdout.write(json.dumps(figures) + "\n")
    return 0 if count == len(bits) else 1


if __name__ == "__main__":
    sys.exit(main())
