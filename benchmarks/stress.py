"""Kill dsconvert at random moments, hundreds of times, and look at what it leaves behind.

    python benchmarks/stress.py --runs 200

Every run is a forked process (torch is loaded once) that works on the demo model by one of the commands. It is ended by
SIGKILL either after a random time of the processor, or at a random one of its calls that change files: opening,
syncing, linking, renaming, removing. Afterwards every file must be whole: the bytes an undisturbed run writes, or the
bytes that were there before. Every fourth quantize or finetune that was killed with layers fitted, or epochs done, is
resumed, killed and resumed again, up to three times, and must end in those bytes, too.
Runs at once into one folder, and without a folder, end the list. Exit code 1 when anything was lost.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a forked process cannot use the threads of the one it came from

import yaml
from safetensors import SafetensorError, safe_open

from dsconvert.commands.cli import main as command_line
from dsconvert.convert.resume import NAME as UNFINISHED
from dsconvert.tune.state import NAME as FINETUNING

DEMO = Path(__file__).resolve().parents[1] / "calib" / "demo"
KEPT = (UNFINISHED, FINETUNING)
EVENTS = ("open", "os.link", "os.rename", "os.remove", "os.mkdir", "os.chmod", "fsync")


@dataclass(frozen=True)
class Stage:
    """A command, the files there before and after it, the seconds of the processor that it takes, and how many of its
    calls change files."""

    name: str
    args: list[str]
    before: dict[str, bytes]
    after: dict[str, bytes]
    seconds: float
    calls: int


@dataclass
class Tally:
    """What happened."""

    runs: Counter[str] = field(default_factory=Counter)
    killed: int = 0
    finished: int = 0
    left_over: int = 0
    kept_layers: int = 0
    resumed: int = 0
    killed_again: int = 0
    problems: list[str] = field(default_factory=list)


def start(args: list[str], folder: Path, kill_at: int | None = None, count: Callable[[int], None] | None = None) -> int:
    """Fork a process that runs the command in the folder, and return its id. `kill_at`: it kills itself at that call
    that changes a file; `count` is given the number of such calls when it ends."""
    child = os.fork()
    if child:
        return child
    code = 3
    try:
        os.setsid()
        os.chdir(folder)
        null = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(null, stream)
        seen = _watch(kill_at)
        sys.argv = ["dsconvert", *args]
        try:
            command_line()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        if count:
            count(seen())
    finally:
        os._exit(code)


def _watch(kill_at: int | None) -> Callable[[], int]:
    """Count the calls of this process that change files, and die at one of them."""
    seen = 0

    def tick() -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event not in EVENTS:
            return
        if event == "open" and not (isinstance(args[2], int) and args[2] & (os.O_CREAT | os.O_WRONLY | os.O_RDWR)):
            return
        tick()

    real_fsync = os.fsync

    def fsync(handle: Any) -> None:
        tick()
        real_fsync(handle)
        tick()

    os.fsync = fsync  # type: ignore[assignment]
    sys.addaudithook(hook)
    return lambda: seen


def kill_after(child: int, seconds: float) -> int:
    """End a process by SIGKILL once it has taken so many seconds of the processor, however busy the machine is. Returns
    its exit code, which is another if it was done before."""
    while (taken := processor_seconds(child)) is not None and taken < seconds:
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    return finish(child)


def processor_seconds(child: int) -> float | None:
    """None of a process that has ended."""
    state, *numbers = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return None if state == "Z" else (int(numbers[10]) + int(numbers[11])) / os.sysconf("SC_CLK_TCK")


def finish(child: int) -> int:
    """Wait for a process; its exit code, negative for a signal."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def undisturbed(args: list[str], folder: Path) -> tuple[float, int]:
    """Run the command to its end: seconds of the processor, and calls. Raises RuntimeError when it fails."""
    read, write = os.pipe()
    child = start(args, folder, None, lambda n: void(os.write(write, str(n).encode())))
    os.close(write)
    calls = os.read(read, 100)
    os.close(read)
    _, status, used = os.wait4(child, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"dsconvert {' '.join(args)} ended with {code}")
    return used.ru_utime + used.ru_stime, int(calls or 0)


def void(_: object) -> None:
    """For calls whose result does not matter."""


def state(folder: Path) -> dict[str, bytes]:
    """Every file below the folder by its path there."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def place(folder: Path, files: dict[str, bytes]) -> None:
    """Make the folder hold these files and no others."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def stages(checkpoint: Path, data: Path, imgsz: int, folder: Path) -> list[Stage]:
    """Each command, first undisturbed: what it writes is what a killed one may write."""
    common = ["quantize", str(checkpoint), "--calib", str(data), "--imgsz", str(imgsz), "--samples", "4",
              "--threads", "1", "--out", "q"]  # fmt: skip
    export = ["export", "q/model.safetensors", "--onnx"]
    made: list[Stage] = []

    def add(name: str, args: list[str], before: dict[str, bytes]) -> dict[str, bytes]:
        place(folder, before)
        seconds, calls = undisturbed(args, folder)
        made.append(Stage(name, args, before, state(folder), seconds, calls))
        return made[-1].after

    four = add("quantize", [*common, "--bits", "4"], {})
    add("quantize --force", [*common, "--bits", "2", "--force"], four)
    exported = add("export", export, four)
    old = {**exported, "q/model-packed.onnx": b"an earlier result"}
    add("export --force", [*export, "--force"], old)
    add("export int8 nms", [*export, "--layout", "int8", "--nms", "--uint8-input"], exported)
    add("export fused", [*export, "--layout", "fused"], exported)
    photos = few_images(data, folder.parent / "few")
    add("detect", ["detect", "q/model-packed.onnx", str(photos.parent / "images" / "val"), "--save-txt", "--save-json",
                   "--out", "d"], exported)  # fmt: skip
    add("report", ["report", "q/model.safetensors", "--data", str(photos), "--no-latency"], four)
    add("finetune", ["finetune", "q/model.safetensors", "--data", str(photos), "--epochs", "3", "--batch", "2",
                     "--threads", "1", "--out", "f"], four)  # fmt: skip
    add("eval", ["eval", "q/model.safetensors", "--data", str(data), "--samples", "2", "--threads", "1"], four)
    return made


def few_images(data: Path, folder: Path) -> Path:
    """Of a data.yaml's val images the first, with their labels, four to train on and two to look at; the data.yaml that
    says so."""
    said = yaml.safe_load(data.read_text())
    images = data.parent / said["path"] / said["val"]
    labels = images.parents[1] / "labels" / images.name
    found = sorted(images.iterdir())
    for kind, chosen in (("train", found[:4]), ("val", found[-2:])):
        for part in ("images", "labels"):
            (folder / part / kind).mkdir(parents=True)
        for image in chosen:
            shutil.copy(image, folder / "images" / kind)
            shutil.copy(labels / f"{image.stem}.txt", folder / "labels" / kind)
    made = {"path": ".", "train": "images/train", "val": "images/val", "names": said["names"]}
    (folder / "data.yaml").write_text(yaml.safe_dump(made))
    return folder / "data.yaml"


def kill_one(stage: Stage, folder: Path, rng: random.Random, tally: Tally) -> None:
    """One run, ended at a random time or call; what it left is judged."""
    place(folder, stage.before)
    by_call = stage.calls > 0 and rng.random() < 0.5
    if by_call:
        code = finish(start(stage.args, folder, rng.randint(1, stage.calls)))
    else:
        code = kill_after(start(stage.args, folder), rng.uniform(0, stage.seconds))
    tally.runs[stage.name] += 1
    tally.killed += code == -signal.SIGKILL
    tally.finished += code == 0
    if code not in (0, -signal.SIGKILL):
        tally.problems.append(f"{stage.name}: ended with {code}")
    left = judge(stage, folder, tally)
    if unfinished(stage, left) and tally.kept_layers % 4 == 1:
        resume(stage, folder, rng, tally)


def unfinished(stage: Stage, left: dict[str, bytes]) -> bool:
    """True when layers or epochs were kept and the model is not written yet."""
    kept = {Path(name).parent for name in left if name.endswith(KEPT)}
    models = [str(folder / "model.safetensors") for folder in kept]
    return bool(kept) and all(left.get(model) == stage.before.get(model) for model in models)


def judge(stage: Stage, folder: Path, tally: Tally) -> dict[str, bytes]:
    """Every file must be one of the whole ones, and none that was there may be gone. Returns what there is."""
    left = state(folder)
    for name, data in left.items():
        if is_temporary(name):
            tally.left_over += 1
        elif name.endswith(KEPT) and name not in stage.before:
            tally.kept_layers += 1
            if not readable(folder / name):
                tally.problems.append(f"{stage.name}: {name} is not whole")
        elif data not in (stage.before.get(name), stage.after.get(name)):
            tally.problems.append(f"{stage.name}: {name} is {len(data)} bytes of something else")
    tally.problems += [f"{stage.name}: {name} is gone" for name in stage.before if name not in left]
    return left


def is_temporary(name: str) -> bool:
    """Whether it is a file that was never a result: what SIGKILL ends cannot remove its own."""
    return name.endswith(".part") or any(part.startswith(".dsconvert-") for part in Path(name).parts)


def readable(path: Path) -> bool:
    """True for a safetensors file that can be read to its end."""
    try:
        with safe_open(path, framework="numpy") as stored:
            return all(stored.get_tensor(name) is not None for name in stored.keys())  # noqa: SIM118 (not a dict)
    except SafetensorError:
        return False


def resume(stage: Stage, folder: Path, rng: random.Random, tally: Tally) -> None:
    """Go on with what was killed, and kill it again: it must end as if nothing had happened."""
    for _ in range(3):
        code = kill_after(start([*stage.args, "--resume"], folder), rng.uniform(0, stage.seconds))
        if code != -signal.SIGKILL:
            break
        tally.killed_again += 1
        if not unfinished(stage, judge(stage, folder, tally)):
            return
    else:
        code = finish(start([*stage.args, "--resume"], folder))
    tally.resumed += 1
    left = {name: data for name, data in state(folder).items() if not is_temporary(name)}
    if code or left != stage.after:
        tally.problems.append(f"{stage.name}: resumed, it ended with {code} and other files: {sorted(left)}")


def at_once(stage: Stage, folder: Path, tally: Tally) -> None:
    """Two runs into one folder: one succeeds, the other says so, and every file is whole. Then two without a folder:
    both succeed, each in its own."""
    place(folder, {})
    codes = sorted(finish(c) for c in [start(stage.args, folder) for _ in range(2)])
    tally.runs["two into one folder"] += 1
    if codes != [0, 2]:
        tally.problems.append(f"two into one folder: ended with {codes}")
    judge(stage, folder, tally)
    place(folder, {})
    free = [a for a in stage.args if a not in ("--out", "q")]
    codes = [finish(c) for c in [start(free, folder) for _ in range(2)]]
    tally.runs["two without a folder"] += 1
    models = [data for name, data in state(folder).items() if name.endswith("model.safetensors")]
    if codes != [0, 0] or len(models) != 2 or models[0] != models[1]:
        tally.problems.append(f"two without a folder: ended with {codes} and {len(models)} models")


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="stress") as name:
        yield Path(name)


def stress(checkpoint: Path, data: Path, imgsz: int, runs: int, seed: int) -> Tally:
    """All of it: `runs` kills spread over the stages, and the runs at once."""
    tally, rng = Tally(), random.Random(seed)
    with scratch() as folder:
        work = folder / "work"
        all_stages = stages(checkpoint.resolve(), data.resolve(), imgsz, work)
        for index in range(runs):
            kill_one(all_stages[index % len(all_stages)], work, rng, tally)
        at_once(all_stages[0], work, tally)
    return tally


def main() -> int:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--checkpoint", type=Path, default=DEMO / "demo.pt")
    parser.add_argument("--data", type=Path, default=DEMO / "data.yaml")
    parser.add_argument("--imgsz", type=int, default=128)
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    began = time.perf_counter()
    tally = stress(given.checkpoint, given.data, given.imgsz, given.runs, given.seed)
    figures = {
        "runs": dict(tally.runs), "killed": tally.killed, "finished_before": tally.finished,
        "temporary_files_left": tally.left_over, "killed_with_layers_kept": tally.kept_layers,
        "resumed_to_the_same_bytes": tally.resumed, "killed_again_while_resuming": tally.killed_again,
        "problems": tally.problems, "seconds": round(time.perf_counter() - began),
    }  # fmt: skip
    sys.stdout.write(json.dumps(figures, indent=1) + "\n")
    return 1 if tally.problems else 0


if __name__ == "__main__":
    sys.exit(main())
