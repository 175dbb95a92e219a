"""Change the code a little, many times, and see whether a test notices: a sample of cosmic-ray's mutants.

    pip install --target /tmp/cosmic cosmic-ray
    PYTHONPATH=/tmp/cosmic python benchmarks/mutants.py --copy /tmp/tree --out /tmp/mutants.json --count 200

All is done in a copy of the tree, one mutant after another, each in a process of its own that begins with torch loaded.
Places are drawn by a seed, and one mutant of each; those that change only annotations are passed over. What became of a
mutant stands in `--out`; those that survived are tried again with `--again`, on new tests.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FIT, CODES = "dsconvert/fit", "dsconvert/dsconv/codes"
# file -> the tests that are about it, the quick ones first
TESTS = {
    "dsconvert/scoring/coco.py": "coco precision_recall",
    "dsconvert/onnxfile/bounds.py": "mutants hostile_bounds",
    "dsconvert/export/check.py": "export_check export_bits",
    "dsconvert/yolo/archive.py": "checkpoint hostile_checkpoints filekinds",
    f"{FIT}/allocate.py": "allocate mutants",
    f"{FIT}/views.py": "views",
    f"{FIT}/draws.py": "gptq channels importance views",
    f"{FIT}/channels.py": "channels importance",
    f"{FIT}/clipping.py": "clipping ranges",
    f"{FIT}/ranges.py": "ranges importance",
    f"{FIT}/leftover.py": "leftover",
    f"{FIT}/lockstep.py": "lockstep mutants",
    f"{FIT}/gptq.py": "gptq leftover channels",
    f"{FIT}/moments.py": "gptq leftover channels",
    f"{FIT}/layer.py": "channels gptq grouped real_alpha",
    f"{CODES}/trellis.py": "trellis loops",
    f"{CODES}/trellis_search.py": "trellis loops",
    f"{FIT}/importance.py": "importance",
    f"{CODES}/free.py": "least_squares gptq loops",
    f"{CODES}/free_search.py": "least_squares gptq",
    f"{FIT}/sensitivity.py": "sensitivity allocate",
    f"{CODES}/real.py": "real_alpha",
    f"{FIT}/synthesize.py": "synthesize",
    f"{FIT}/seen.py": "gptq lockstep importance calibcache",
    f"{FIT}/kept.py": "kept",
    f"{FIT}/threads.py": "threads",
    f"{FIT}/loops.py": "loops trellis gptq clipping ranges",
}
# of these tests those that run commands on files without end, each for 20 seconds of the processor
NOT_THESE = "not endless and not every_command and not interrupt and not large_images and not unfolds"
CPU_SECONDS, WALL_SECONDS = 240, 900  # of one mutant's tests, which take 5 to 60: what loops for ever is ended


@dataclass
class Mutant:
    """One change: where it is, which operator of cosmic-ray made it, the changed lines, and what became of it."""

    file: str
    line: int
    operator: str
    diff: str
    outcome: str = ""
    seconds: float = 0.0


def meaning(code: str) -> str:
    """The code's tree without annotations, which are never evaluated here."""
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


Operators = dict[str, Any]  # cosmic-ray's, by name
Places = dict[tuple[int, int], list[tuple[str, int]]]  # line and column -> operators, and which of their mutants it is


def places_of(file: str, operators: Operators) -> Places:
    """Where a file can be changed, and by what."""
    from cosmic_ray.ast import ast_nodes, get_ast_from_path

    places: Places = {}
    nodes = list(ast_nodes(get_ast_from_path(ROOT / file)))
    for name, operator in operators.items():
        found = (place for node in nodes for place in operator.mutation_positions(node))
        for index, (start, _) in enumerate(found):
            places.setdefault(start, []).append((name, index))
    return places


def mutants_of(file: str, places: Places, operators: Operators, rng: random.Random) -> Iterator[tuple[Mutant, str]]:
    """Mutants of a file and their code, one for each place, in a drawn order."""
    from cosmic_ray.mutating import mutate_code

    code = (ROOT / file).read_text()
    order, before = sorted(places), meaning(code)
    rng.shuffle(order)
    for place in order:
        name, index = rng.choice(places[place])
        made = mutate_code(code, operators[name], index)
        try:
            if made is None or meaning(made) == before:
                continue
        except SyntaxError:
            continue
        diff = difflib.unified_diff(code.splitlines(), made.splitlines(), n=0, lineterm="")
        changed = [line for line in diff if line[:1] in "+-" and line[:3] not in ("+++", "---")]
        yield Mutant(file, place[0], name.removeprefix("core/"), "\n".join(changed)), made


def sample(count: int, seed: int, least: int) -> list[tuple[Mutant, str]]:
    """About so many mutants, of each file in proportion to its places, at least some."""
    from cosmic_ray.plugins import get_operator, operator_names

    classes = {name: get_operator(name) for name in operator_names()}
    operators = {name: made() for name, made in classes.items() if not made.arguments()}
    every = {file: places_of(file, operators) for file in TESTS}
    total = sum(map(len, every.values()))
    chosen: list[tuple[Mutant, str]] = []
    for file, places in every.items():
        drawn = mutants_of(file, places, operators, random.Random(f"{seed} {file}"))
        chosen += islice(drawn, max(least, round(count * len(places) / total)))
    return chosen


def outcome_of(tests: list[str], log: Path) -> tuple[str, float]:
    """What the tests say in a process of its own: survived, killed, timed out; and CPU seconds."""
    began, child = time.monotonic(), os.fork()
    if not child:
        try:
            os.setpgid(0, 0)
            resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
            to = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(to, 1)
            os.dup2(to, 2)
            import pytest

            options = ["-x", "-q", "-m", "not long", "-k", NOT_THESE, "-p", "no:cacheprovider", "--tb=line"]
            code = int(pytest.main([*options, *tests]))
            sys.stdout.flush()
            os._exit(code)
        finally:
            os._exit(70)
    late = False
    while True:
        done, status, used = os.wait4(child, os.WNOHANG)
        if done:
            break
        if time.monotonic() - began > WALL_SECONDS and not late:
            late = True
            os.killpg(child, signal.SIGKILL)  # our own child's group
        time.sleep(0.05)
    seconds = used.ru_utime + used.ru_stime
    if late or (os.WIFSIGNALED(status) and seconds > CPU_SECONDS - 5):
        return "timed out", seconds
    return ("survived" if os.WIFEXITED(status) and not os.WEXITSTATUS(status) else "killed"), seconds


def killer(log: Path) -> str:
    """The test that failed, as pytest names it."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
    return lines[0][:120] if lines else ""


def paths(names: str) -> list[str]:
    """`a b` -> the files of these tests."""
    found = [next((ROOT / "tests").rglob(f"test_{name}.py")) for name in names.split()]
    return [str(path.relative_to(ROOT)) for path in found]


def main() -> int:
    """Parse, copy, run, print. Exit code 1 when the tests fail without any mutant."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--copy", type=Path, required=True, help="a folder for the copy of the tree; made anew")
    parser.add_argument("--out", type=Path, required=True, help="JSON: every mutant and what became of it")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--least", type=int, default=4, help="of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[""], help="only files whose name has one of these in it")
    parser.add_argument("--again", action="store_true", help="try again those that survived")
    given = parser.parse_args()
    every = sample(given.count, given.seed, given.least)
    chosen = [(m, code) for m, code in every if any(part in m.file for part in given.only)]
    old = [Mutant(**m) for m in json.loads(given.out.read_text())] if given.out.exists() else []
    known = {(m.file, m.line, m.diff): m for m in old}
    shutil.rmtree(given.copy, ignore_errors=True)
    ignore = shutil.ignore_patterns(".git", ".venv", "site", "runs", ".mypy_cache", ".ruff_cache", "node_modules")
    shutil.copytree(ROOT, given.copy, symlinks=True, ignore=ignore)
    sys.path[:0] = [str(given.copy), str(given.copy / "benchmarks")]
    os.chdir(given.copy)
    log = given.out.resolve().with_suffix(".log")
    import hypothesis  # noqa: F401  # what is large and not ours, once for all mutants
    import numba  # noqa: F401
    import torch  # noqa: F401

    for file in dict.fromkeys(m.file for m, _ in chosen):
        target, good = given.copy / file, (given.copy / file).read_bytes()
        when, survived = target.stat().st_mtime, False
        for number, (mutant, code) in enumerate((m, c) for m, c in chosen if m.file == file):
            before = known.get((mutant.file, mutant.line, mutant.diff))
            if before and not (given.again and before.outcome == "survived"):
                survived |= before.outcome == "survived"
                continue
            target.write_text(code)
            os.utime(target, (when, when - 1000 - number))  # what Python and numba keep of a file goes by its time
            try:
                mutant.outcome, mutant.seconds = outcome_of(paths(TESTS[file]), log)
            finally:
                target.write_bytes(good)
                os.utime(target, (when, when))
            known[mutant.file, mutant.line, mutant.diff] = mutant
            given.out.write_text(json.dumps([asdict(m) for m in known.values()], indent=1))
            survived |= mutant.outcome == "survived"
            said = killer(log) if mutant.outcome == "killed" else "\n" + mutant.diff
            sys.stdout.write(f"  {mutant.outcome} {file}:{mutant.line} {mutant.seconds:.0f} s {said}\n")
            sys.stdout.flush()
        if not survived and (result := outcome_of(paths(TESTS[file]), log))[0] != "survived":
            sys.stdout.write(f"{file}: its tests fail without any mutant: {result}, {killer(log)}\n")
            return 1
    for file in TESTS:
        counts = Counter(m.outcome for m in known.values() if m.file == file)
        sys.stdout.write(f"{file} {sum(counts.values())} {dict(counts)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
