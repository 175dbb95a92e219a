"""Options and ways of printing that the commands share."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
import torch
from rich.box import ASCII2, HEAVY_HEAD
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from dsconvert.base import workers
from dsconvert.base.text import in_words, printable
from dsconvert.measure import calibration
from dsconvert.photos.dataset import SPLITS

RUNS = Path("runs/dsconvert")
STAGES = {
    "images": "reading images",
    "synthesize": "synthesising images",
    "importance": "measuring importance",
    "widths": "choosing ranges and widths",
    "fit": "fitting layers",
    "finetune": "fine-tuning",
    "train": "training",
    "evaluate": "evaluating",
    "load": "loading",
    "bench": "timing",
    "activations": "watching activations",
    "detect": "detecting",
    "video": "watching videos",
    "compare": "comparing",
}
PATH = click.Path(path_type=Path)
# parameters whose option is not their name with dashes
OPTIONS = {"images": "--calib", "force=True": "--force", "name": "--out"}

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
force = click.option("--force", is_flag=True, help="Replace existing files.")
strict = click.option("--strict", is_flag=True, help="Refuse labels and lists with unusable parts.")
quiet = click.option("--quiet", "-q", is_flag=True, help="Print only the result, warnings and errors.")


class ByteSize(click.ParamType):
    """A number of bytes as people write it: 900000, 900kB, 0.9MB (powers of ten)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([km]?)b?", str(value).strip().lower())
        if found is None:
            self.fail(f"{value!r} is not a size such as 0.9MB, 900kB or 900000.", param, ctx)
        return round(float(found[1]) * {"": 1, "k": 1e3, "m": 1e6}[found[2]])


class Numbers(click.ParamType):
    """One or more numbers, separated by commas."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        try:
            return tuple(float(part) for part in str(value).split(","))
        except ValueError:
            self.fail(f"{value!r} is not numbers such as 0.485,0.456,0.406.", param, ctx)


def split_of(default: str) -> Callable[[Any], Any]:
    """Return an option --split, also called --task as in YOLOv5's val.py."""
    return click.option("--split", "--task", "split", type=click.Choice(SPLITS),
                        help=f"Images of a data.yaml to use (default: {default}).")  # fmt: skip


def verbose(what: str) -> Callable[[Any], Any]:
    """Return an option --verbose that adds `what`."""
    return click.option("--verbose", "-v", is_flag=True, help=f"Also {what}.")


def cpus() -> int:
    """Return how many CPUs this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _threads(context: click.Context, parameter: click.Parameter, value: int | None) -> int:
    count = value or cpus()
    torch.set_num_threads(count)
    return count


def _device(context: click.Context, parameter: click.Parameter, value: str) -> str:
    if value.strip().lower() in ("", "none"):
        say("--device names no device, so the CPU is used; give --device 0 for the first GPU.")
    return workers.named_device(value)


device = click.option("--device", default="cpu", show_default=True, callback=_device,
                      help="cpu, or one GPU: 0, 1, cuda:0 or cuda.")  # fmt: skip
threads = click.option("--threads", type=click.IntRange(1, 1024), callback=_threads, help="CPU threads (default: all).")


def print_json(document: dict[str, Any]) -> None:
    """Print one JSON document to stdout."""
    click.echo(json.dumps(document, indent=1))


def option(name: str) -> str:
    """Return the option for a parameter's name in Python."""
    return OPTIONS.get(name) or f"--{name.replace('_', '-')}"


def in_options(text: str) -> str:
    """Return a text with options for the parameters that it names."""
    return in_words(text, option)


def tell(text: str) -> None:
    """Print a line of the result to stdout. Quoted names and paths cannot control the terminal."""
    click.echo(_shown(text, plain()))


def say(text: str) -> None:
    """Print a remark to stderr, on one line."""
    click.echo(_shown(text, plain(sys.stderr)), err=True)


def warn(text: str) -> None:
    """Print a warning to stderr, even with --quiet."""
    say(f"Warning: {in_options(text)}")


def plain(stream: TextIO | None = None) -> bool:
    """Return True if only ASCII is wanted: NO_COLOR is set (no-color.org), or the stream's encoding is not Unicode."""
    encoding = (stream or sys.stdout).encoding or "ascii"
    return bool(os.environ.get("NO_COLOR")) or not encoding.lower().startswith("utf")


class _Console(Console):
    """A console that leaves a closed pipe to the command line; rich would end with exit code 1."""

    def on_broken_pipe(self) -> None:
        """Raise BrokenPipeError, as all other writing does."""
        raise BrokenPipeError


def console(stderr: bool = False) -> Console:
    """Return where tables are printed, wide if it is no terminal.

    Text is shown as it is: rich would read [tags] in names.
    """
    as_is: dict[str, Any] = {"markup": False, "emoji": False, "highlight": False, "stderr": stderr}
    if plain(sys.stderr if stderr else None):
        as_is["color_system"] = None
    made = _Console(**as_is)
    return made if made.is_terminal else _Console(width=120, **as_is)


def table(*columns: str) -> Table:
    """Return an empty table, drawn in ASCII if only that is wanted."""
    return Table(*(cell(c) for c in columns), box=ASCII2 if plain() else HEAVY_HEAD)


def cell(text: object) -> str:
    """Return text for a table, such as a class's, a layer's or a file's name, safe to show."""
    return _shown(text, plain())


def _shown(text: object, ascii_only: bool) -> str:
    return printable(str(text).replace("±", "+-") if ascii_only else text, ascii_only=ascii_only)


def typed_command() -> str:
    """Return what was typed, for the model file, without --resume."""
    return shlex.join(["dsconvert", *(word for word in sys.argv[1:] if word != "--resume")])


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """Collect Ctrl-C signals.

    Raising KeyboardInterrupt is not enough, as a library that is being imported may swallow it.
    """
    struck: list[int] = []

    def note(number: int, frame: object) -> None:
        struck.append(number)
        raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield struck
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield struck
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def bars(quiet: bool = False, lines: bool = False) -> Iterator[calibration.Progress]:
    """Yield a function that shows progress: a bar for each stage on stderr, with rate and time left, if it is a
    terminal.

    lines: print a line for each finished stage, also to files and pipes.
    quiet: print nothing.
    """
    stderr = console(stderr=True)
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
    )  # fmt: skip
    with (
        _interrupts() as struck,
        Progress(*columns, console=stderr, disable=quiet or not stderr.is_terminal) as shown,
    ):
        tasks: dict[str, Any] = {}
        open_stage: list[tuple[str, int]] = []  # at most one stage: its name and progress
        began = time.perf_counter()

        def close(stage: str, done: int) -> None:
            nonlocal began
            open_stage.clear()
            seconds, began = time.perf_counter() - began, time.perf_counter()
            if lines and not quiet:
                shown.update(tasks[stage], visible=False, refresh=True)
                rate = f": {done} in {seconds:.1f} s, {done / max(seconds, 1e-9):.3g}/s" if done > 1 else ""
                stderr.print(f"{STAGES.get(stage, stage)}{rate or f': {seconds:.1f} s'}", soft_wrap=True)

        def report(stage: str, done: int, total: int) -> None:
            if struck:
                raise KeyboardInterrupt
            if open_stage and open_stage[0][0] != stage:
                close(*open_stage[0])  # the stage ended before its total
            if stage not in tasks:
                tasks[stage] = shown.add_task(STAGES.get(stage, stage), total=total)
            shown.update(tasks[stage], completed=done, total=total, visible=True)
            open_stage[:] = [(stage, done)]
            if done >= total:
                close(stage, done)

        yield report


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        """Return the rate, empty until it is known."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g}/s")


def short(path: Path) -> str:
    """Return the last parts of a path, enough to tell models apart."""
    return "/".join(path.parts[-2:])
