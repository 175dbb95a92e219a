"""Calibrations kept for the next run with the same checkpoint and images, whatever its bits or size.

A file's name is the key of everything that decides its content, so a cache is never stale, only unused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from dsconvert.base.files import write_atomic
from dsconvert.base.kept import Room
from dsconvert.base.sealed import DAMAGE, sealed, unsealed
from dsconvert.dsconv.codes import format_of
from dsconvert.fit.seen import Drawn, Places
from dsconvert.graph.grids import QParams
from dsconvert.measure.calibration import Calibration

META = "dsconvert.measure.calibration"


def remembered(
    folder: Path | None, key: str, make: Callable[[], Calibration], check: Callable[[Calibration], None], room: Room
) -> Calibration:
    """What is kept under the key (hexadecimal), else what is made, which is kept then. No folder: nothing is kept.

    What is kept lacks the float network's outputs (see `calibration.float_outputs`): they are large and soon made
    again, in the `room`. A file that cannot be read, or whose content `check` raises ValueError or KeyError for, is
    made again as a whole. Raises InputError when the folder cannot be written."""
    if folder is None:
        return make()
    path = folder / f"{key}.safetensors"
    found = _read(path, check, room)
    if found is None:
        found = make()
        write_atomic(path, calibration_bytes(found), force=True)
    return found


def calibration_bytes(calibration: Calibration) -> bytes:
    """A calibration as a safetensors file."""
    about = {
        "own": {name: [grid.scale, grid.zero_point] for name, grid in calibration.own.items()},
        "damage": {
            name: [[*format.spelled(), damage] for format, damage in by_format.items()]
            for name, by_format in calibration.damage.items()
        },
        "even": [name for name, drawn in calibration.drawn.items() if drawn.even],
    }
    kinds = {
        "picks": {name: torch.stack([p.picks for p in drawn.places]) for name, drawn in calibration.drawn.items()},
        "weights": {name: torch.stack([p.weights for p in drawn.places]) for name, drawn in calibration.drawn.items()},
        "channels": calibration.channels,
    }
    tensors = {f"{kind}/{name}": t for kind, named in kinds.items() for name, t in named.items()}
    return sealed(tensors, META, about)


def _read(path: Path, check: Callable[[Calibration], None], room: Room) -> Calibration | None:
    try:
        with safe_open(path, framework="pt") as stored:
            about, stored_tensors = unsealed(stored, META)
            tensors: dict[str, dict[str, Tensor]] = {"picks": {}, "weights": {}, "channels": {}}
            for key, value in stored_tensors.items():
                kind, name = key.split("/", 1)
                tensors[kind][name] = value
            if not isinstance(about["even"], list):
                raise ValueError("even layers")
            found = Calibration(
                {name: QParams(float(scale), int(zero)) for name, (scale, zero) in about["own"].items()},
                {
                    name: _drawn(zip(picks, tensors["weights"][name], strict=True), name in about["even"], room)
                    for name, picks in tensors["picks"].items()
                },
                tensors["channels"],
                {
                    name: {format_of(int(bits), int(block), code): float(damage) for bits, block, code, damage in rows}
                    for name, rows in about["damage"].items()
                },
            )
        check(found)
    except DAMAGE:
        return None
    return found


def _drawn(places: Iterable[tuple[Tensor, Tensor]], even: bool, room: Room) -> Drawn:
    """Positions of images as `Drawn` has them, still without outputs."""
    made = [Places(*p) for p in places]
    drawn = Drawn(room, len(made))
    drawn.places, drawn.even = made, even
    return drawn
