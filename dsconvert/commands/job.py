"""What a run of `quantize` is asked for, and what it reports."""

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
    """What a run reads and writes, and what it prints."""

    source: Path  # the checkpoint or ONNX file
    calib: Path | None  # its calibration images
    cfg: Path | None  # the model yaml that chooses layers
    cache: Path | None  # folder that keeps calibrations, or temporary values
    out: Path | None  # folder to write to; for an ONNX file, perhaps the file itself
    resume: bool  # continue a stopped run
    force: bool  # replace existing files
    quiet: bool  # print no progress

    def check(self, place: Path, outputs: list[Path], targets: dict[Path, bool]) -> None:
        """Raise InputError, before any work, for a run that could not write its results.

        place: a folder that must be writable.
        outputs: files that must not be inputs.
        targets: file -> whether it may be replaced, if it exists.
        """
        check_writable(place)
        if self.cache is not None:
            check_writable(self.cache)
        refuse_to_lose(outputs, [self.source, self.calib, self.cfg])
        for target, replaced in targets.items():
            check_target(target, replaced)


@dataclass(frozen=True)
class Done:
    """A conversion, as it is reported."""

    path: Path  # the file written
    unreadable: int  # images that were left out
    reason: str  # why the first of them was left out
    said: list[str]  # warnings during the run
    advice: list[str]  # warnings still to print
    document: dict[str, Any]  # the document of --json, without seconds and warnings
    layers: Callable[[], None]  # prints a table of the layers
    result: Callable[[float], None]  # prints the result, given the seconds it took


def given(name: str) -> bool:
    """Return whether an option was typed or configured."""
    return click.get_current_context().get_parameter_source(name) not in (None, ParameterSource.DEFAULT)
