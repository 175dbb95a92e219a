"""Feed dsconvert's readers with damaged files for a bounded time, and count what happens.

    python benchmarks/fuzz.py --seconds 600

Every case is a good file with some bytes flipped, overwritten, cut, repeated, inserted or exchanged with another
file's, by a random generator seeded with the case's number: `--target T --case N` repeats one. Cases are read in forked
processes whose memory is limited, so that a crash of native code is seen, too. A case is bad when it ends in anything
but success or one printable InputError, or takes over 30 s of the processor; exit code 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use the threads of the one it came from

import torch
from fuzz_damage import damage
from fuzz_targets import Target, targets

from dsconvert.base.errors import InputError

BATCH, BATCH_SECONDS, MOST_SECONDS, MEMORY = 200, 20.0, 30.0, 2 << 30


@dataclass
class Found:
    """Cases of one target by what became of them, and the bad ones."""

    ends: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0
    next: int = 0


def case_bytes(name: str, target: Target, number: int) -> bytes:
    """The bytes of one case: the same whenever asked for."""
    rng = random.Random(f"{name} {number}")
    seed = rng.choice(target.seeds)
    return target.inside(seed, rng) if target.inside else damage(seed, target.seeds, rng)


def judge(target: Target, path: Path) -> str:
    """ "loaded", "refused", or what is bad about the case."""
    try:
        target.read(path)
    except InputError as error:
        text = str(error)
        return "refused" if text.isprintable() and text.endswith(".") else f"said {text[:200]!r}"
    except Exception as error:
        return f"raised {type(error).__name__}: {str(error)[:200]}"
    return "loaded"


def run_batch(name: str, target: Target, first: int, folder: Path, found: Found, most: int = BATCH) -> None:
    """Read up to `most` cases in a forked process, within BATCH_SECONDS. When it dies, the case it died of is bad, and
    the next batch follows it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY,) * 2)
        path = folder / f"case{target.suffix}"
        start = time.perf_counter()
        with os.fdopen(write, "w") as out:
            for number in range(first, first + most):
                if time.perf_counter() - start > BATCH_SECONDS:
                    break
                path.write_bytes(case_bytes(name, target, number))
                out.write(json.dumps([number, None, 0, 0]) + "\n")  # begun
                out.flush()
                began = time.process_time()
                end = judge(target, path)
                out.write(json.dumps([number, end, time.process_time() - began, _peak()]) + "\n")
                out.flush()
        os._exit(0)
    os.close(write)
    last: tuple[int, str | None] = (first, None)
    with os.fdopen(read) as lines:
        for line in lines:
            number, end, seconds, peak = json.loads(line)
            last = (number, end)
            if end is None:
                continue
            found.ends[end if end in ("loaded", "refused") else "bad"] += 1
            found.slowest, found.peak = max(found.slowest, seconds), max(found.peak, peak)
            if end not in ("loaded", "refused") or seconds > MOST_SECONDS:
                found.bad.append(f"{name} {number}: {end}, {seconds:.1f} s")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    found.next = last[0] + 1
    if code:
        found.ends["bad"] += 1
        found.bad.append(f"{name} {last[0]}: the process ended with {code}")


def _size() -> int:
    return _status("VmSize")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    found = re.search(rf"{key}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=300.0, help="for all targets together")
    parser.add_argument("--cases", type=int, help="in place of --seconds: so many of each target, always the same ones")
    parser.add_argument("--target", help="this one only")
    parser.add_argument("--case", type=int, help="with --target: show what this case ends in")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name)
        chosen = {n: t for n, t in targets(folder).items() if given.target in (None, n)}
        if given.case is not None:
            target = chosen[given.target]
            path = folder / f"case{target.suffix}"
            path.write_bytes(case_bytes(given.target, target, given.case))
            target.read(path)
            return 0
        results = {n: Found() for n in chosen}
        spent, told = dict.fromkeys(chosen, 0.0), dict.fromkeys(chosen, 0)
        left = set(chosen)
        while left:
            n = min(left, key=lambda key: spent[key])  # equal time for all
            began = time.perf_counter()
            first = results[n].next
            run_batch(n, chosen[n], first, folder, results[n], min(BATCH, (given.cases or first + BATCH) - first))
            spent[n] += time.perf_counter() - began
            if results[n].next >= given.cases if given.cases else spent[n] >= given.seconds / len(chosen):
                left.remove(n)
            for line in results[n].bad[told[n] :]:
                print(line, file=sys.stderr, flush=True)
            told[n] = len(results[n].bad)
    figures = {
        n: {**r.ends, "slowest_s": round(r.slowest, 2), "peak_mb": round(r.peak / 1e6), "bad_cases": r.bad}
        for n, r in results.items()
    }
    sys.stdout.write(json.dumps({"cases": sum(r.ends.total() for r in results.values()), **figures}, indent=1) + "\n")
    return 1 if any(r.bad for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
