"""What the commands share: options, and the ways of printing."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from dsconvert import pipeline

RUNS = Path("runs/dsconvert")
STAGES = {
    "images": "reading images",
    "synthesize": "synthesising images",
    "importance": "measuring importance",
    "fit": "fitting layers",
    "evaluate": "evaluating",
    "load": "loading",
    "bench": "timing",
    "activations": "watching activations",
}
PATH = click.Path(path_type=Path)

as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document to stdout.")
force = click.option("--force", is_flag=True, help="Replace files that are there.")


def _threads(context: click.Context, parameter: click.Parameter, value: int | None) -> int:
    count = value or len(os.sched_getaffinity(0))
    torch.set_num_threads(count)
    return count


threads = click.option("--threads", type=click.IntRange(1, 1024), callback=_threads, help="CPU threads (default: all).")


def print_json(document: dict[str, Any]) -> None:
    """One JSON document on stdout."""
    click.echo(json.dumps(document, indent=1))


def say(text: str) -> None:
    """A remark on stderr."""
    click.echo(text, err=True)


def console() -> Console:
    """Where tables go: stdout, wide when it is no terminal."""
    made = Console()
    if not made.is_terminal:
        made = Console(width=120)
    return made


@contextmanager
def bars() -> Iterator[pipeline.Progress]:
    """A bar per stage on stderr; silent when stderr is no terminal."""
    stderr = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, disable=not stderr.is_terminal) as shown:
        tasks: dict[str, Any] = {}

        def report(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = shown.add_task(STAGES[stage], total=total)
            shown.update(tasks[stage], completed=done, total=total)

        yield report


def short(path: Path) -> str:
    """The last parts of a path, enough to tell models apart."""
    return "/".join(path.parts[-2:])
