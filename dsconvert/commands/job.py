"""What a run of `quantize` is asked for, and what it has to tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from dsconvert.base.files import check_target, check_writable
from dsconvert.commands.folders import refuse_to_lose


@dataclass(frozen=True)
class Job:
    """What a run reads and writes, and how loudly."""

    source: Path  # the checkpoint or ONNX file
    calib: Path | None  # its calibration images
    cfg: Path | None  # the model yaml that chooses layers
    cache: Path | None  # folder where calibrations are kept, or values wait
    out: Path | None  # folder to write; of an ONNX file, perhaps the file itself
    resume: bool  # go on where a run was stopped
    force: bool  # replace what is there
    quiet: bool  # no progress

    def check(self, place: Path, outputs: list[Path], targets: dict[Path, bool]) -> None:
        """Raises InputError, before any work, for folders that cannot be written, for `outputs` that are inputs, and
        for `targets` that are there, unless they may be replaced."""
        check_writable(place)
        if self.cache is not None:
            check_writable(self.cache)
        refuse_to_lose(outputs, [self.source, self.calib, self.cfg])
        for target, replaced in targets.items():
            check_target(target, replaced)


@dataclass(frozen=True)
class Done:
    """A conversion, as it is told of."""

    path: Path  # the file written
    unreadable: int  # images that were left out
    reason: str  # why the first of them was
    said: list[str]  # what was warned of while it ran
    advice: list[str]  # what is still to be warned of
    document: dict[str, Any]  # of --json, but for seconds and warnings
    layers: Callable[[], None]  # prints a table of them
    result: Callable[[float], None]  # prints what came of it in so many seconds


def given(name: str) -> bool:
    """Whether an option was typed or configured."""
    return click.get_current_context().get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
