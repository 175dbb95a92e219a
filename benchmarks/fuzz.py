"""Feed dsconvert's readers with damaged files for a bounded time, and count what happens.

    python benchmarks/fuzz.py --seconds 600

Every case is a good file with some bytes flipped, overwritten, cut, repeated, inserted or exchanged with another
file's, by a random generator seeded with the case's number: `--target T --case N` repeats one. Cases are read in forked
processes whose memory is limited, so that a crash of native code is seen, too. A case is bad when it ends in anything
but success or one printable InputError, or takes over 30 s; exit code 1 then.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use the threads of the one it came from

import torch

from dsconvert.errors import InputError
from dsconvert.evaluate.candidates import load_candidate
from dsconvert.export.onnx import export_quantized
from dsconvert.modelfile import load_model
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.images import read_data_yaml, read_image, read_labels

DEMO = Path(__file__).resolve().parents[1] / "calib" / "demo"
BATCH, MOST_SECONDS, MEMORY = 200, 30.0, 2 << 30
INTERESTING = (b"\x00", b"\xff", b"\x7f", b"\x80", b"\xff" * 4, b"\xff" * 8, b"\x7f" + b"\xff" * 7, b"-1", b"1e999",
               b"nan", b"[" * 50, b"\x1b[31m", b"../../", b"&a *a", b"<<: ", b"!!python/name:os.system ")  # fmt: skip


@dataclass(frozen=True)
class Target:
    """A reader, the suffix of its files, good files to damage, and how a container is put together again so that the
    damage reaches what is inside (None: files are damaged as they are)."""

    read: Callable[[Path], Any]
    suffix: str
    seeds: list[bytes]
    inside: Callable[[bytes, random.Random], bytes] | None = None


@dataclass
class Found:
    """Cases of one target by what became of them, and the bad ones."""

    ends: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)
    slowest: float = 0.0
    peak: int = 0
    next: int = 0


def damage(data: bytes, others: list[bytes], rng: random.Random) -> bytes:
    """One to six random changes."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        place, length = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64, 1024))
        kind = rng.randrange(7)
        if kind == 0 and out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[place : place + length] = rng.randbytes(length)
        elif kind == 2:
            del out[place : place + length]
        elif kind == 3:
            out[place:place] = rng.choice(INTERESTING) * rng.choice((1, 1, 1, 100))
        elif kind == 4:
            word = rng.choice(INTERESTING)
            out[place : place + len(word)] = word
        elif kind == 5:
            out[place:place] = out[place : place + length] * rng.choice((1, 2, 50))
        else:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            out[place : place + length] = other[start : start + length]
    return bytes(out[: rng.randrange(len(out) + 1)]) if rng.random() < 0.05 else bytes(out)


def inside_archive(data: bytes, rng: random.Random) -> bytes:
    """A checkpoint whose pickle alone is damaged, and all of whose checksums are right again."""
    with tempfile.TemporaryFile() as buffer:
        buffer.write(data)
        with zipfile.ZipFile(buffer) as source:
            entries = {i.filename: source.read(i) for i in source.infolist()}
    pickle = next(n for n in entries if n.endswith("data.pkl"))
    entries[pickle] = damage(entries[pickle], [entries[pickle]], rng)
    with tempfile.TemporaryFile() as buffer:
        with zipfile.ZipFile(buffer, "w") as target:
            for name, content in entries.items():
                target.writestr(name, content)
        buffer.seek(0)
        return buffer.read()


def inside_safetensors(data: bytes, rng: random.Random) -> bytes:
    """A model file whose JSON alone is damaged, and whose length is right again."""
    (length,) = struct.unpack("<Q", data[:8])
    table = json.loads(data[8 : 8 + length])
    text = table["__metadata__"]["dsconvert"]
    changed = damage(text.encode(), [text.encode()], rng).decode("utf-8", "replace")
    if rng.random() < 0.7:  # also numbers alone: then it is JSON still
        numbers = [m.span() for m in re.finditer(r"-?\d+(\.\d+)?", text)]
        start, end = rng.choice(numbers)
        new = rng.choice(
            ("0", "-1", "1", "2", "3.5", "1e30", "NaN", "null", "true", "[]", "99999999999999999999", '"a"')
        )
        changed = text[:start] + new + text[end:]
    table["__metadata__"]["dsconvert"] = changed
    header = json.dumps(table).encode()
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def targets(folder: Path) -> dict[str, Target]:
    """Readers by name, with good files made of the demo: its checkpoint, and a model quantized from it quickly."""
    from dsconvert import pipeline

    checkpoint = DEMO / "demo.pt"
    options = pipeline.QuantizeOptions(calib=DEMO / "images" / "calib", imgsz=64, samples=1, bits=4)
    made = pipeline.save_quantized(pipeline.quantize(load_checkpoint(checkpoint), options), folder / "q", False)
    model = load_model(made)
    graphs = [export_quantized(model, layout, 64).SerializeToString() for layout in ("packed", "int8")]
    labels = [p.read_bytes() for p in sorted((DEMO / "labels").rglob("*.txt"))[:8]]
    photos = [p.read_bytes() for p in sorted((DEMO / "images").rglob("*.jpg"))[:4]]
    yamls = [(DEMO / "data.yaml").read_bytes(), b"a: &a [1, *a]\nnames: {0: x, 1: y}\nnc: 2\ntrain: [a, b]\n"]
    archive, stored = checkpoint.read_bytes(), made.read_bytes()
    return {
        "checkpoint": Target(load_checkpoint, ".pt", [archive]),
        "checkpoint pickle": Target(load_checkpoint, ".pt", [archive], inside_archive),
        "model": Target(load_model, ".safetensors", [stored]),
        "model header": Target(load_model, ".safetensors", [stored], inside_safetensors),
        "data.yaml": Target(read_data_yaml, ".yaml", yamls),
        "labels": Target(lambda p: read_labels(p, 6), ".txt", labels),
        "images": Target(read_image, ".jpg", photos),
        "onnx": Target(lambda p: load_candidate(p, None), ".onnx", graphs),
    }


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


def run_batch(name: str, target: Target, first: int, folder: Path, found: Found) -> None:
    """Read BATCH cases in a forked process. When it dies, the case it died of is bad, and the next batch follows it."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        os.close(read)
        silence = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silence, 1)
        os.dup2(silence, 2)
        resource.setrlimit(resource.RLIMIT_AS, (_size() + MEMORY,) * 2)
        path = folder / f"case{target.suffix}"
        with os.fdopen(write, "w") as out:
            for number in range(first, first + BATCH):
                path.write_bytes(case_bytes(name, target, number))
                out.write(json.dumps([number, None, 0, 0]) + "\n")  # begun
                out.flush()
                began = time.perf_counter()
                end = judge(target, path)
                out.write(json.dumps([number, end, time.perf_counter() - began, _peak()]) + "\n")
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
        spent = dict.fromkeys(chosen, 0.0)
        while min(spent.values()) < given.seconds / len(chosen):
            n = min(spent, key=lambda key: spent[key])  # equal time for all
            began = time.perf_counter()
            run_batch(n, chosen[n], results[n].next, folder, results[n])
            spent[n] += time.perf_counter() - began
    figures = {
        n: {**r.ends, "slowest_s": round(r.slowest, 2), "peak_mb": round(r.peak / 1e6), "bad_cases": r.bad}
        for n, r in results.items()
    }
    sys.stdout.write(json.dumps({"cases": sum(r.ends.total() for r in results.values()), **figures}, indent=1) + "\n")
    return 1 if any(r.bad for r in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
