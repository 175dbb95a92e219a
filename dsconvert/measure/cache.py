"""Keep calibrations on disk for the next run with the same checkpoint and images, whatever its bits or target size.

A file's name is a key of all that decides its content. So a cached file can be unused, but never out of date.
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
    """Return the calibration kept under a key, or make it and keep it.

    folder: the cache; None keeps nothing.
    key: hexadecimal, becomes the file's name.
    make: computes the calibration.
    check: raises ValueError or KeyError for a calibration that cannot be right. It is then made again, as is one that
        cannot be read.
    room: where the float network's outputs go later. They are large and quick to compute again, so they are not cached
        (see `calibration.float_outputs`).

    Raises InputError when the folder cannot be written to.
    """
    if folder is None:
        return make()
    path = folder / f"{key}.safetensors"
    found = _read(path, check, room)
    if found is None:
        found = make()
        write_atomic(path, calibration_bytes(found), force=True)
    return found


def calibration_bytes(calibration: Calibration) -> bytes:
    """Return a calibration as the bytes of a safetensors file."""
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
    """Return the calibration in a file, or None where the file is missing, damaged or fails the check."""
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
    """Return the positions read from a file as `Drawn`, still without the float network's outputs."""
    made = [Places(*p) for p in places]
    drawn = Drawn(room, len(made))
    drawn.places, drawn.even = made, even
    return drawn
