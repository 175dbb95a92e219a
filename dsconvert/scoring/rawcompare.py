"""Compare two files whose outputs are not boxes, output by output."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.photos.images import Image
from dsconvert.scoring.candidates import Candidate
from dsconvert.scoring.masks import prepared

MOST_NUMBERS = 1 << 25  # in all outputs for an image
CHUNK = 1 << 20  # numbers that are compared at once


@dataclass(frozen=True)
class OutputDifference:
    """One output, over all images."""

    shape: tuple[int, ...]  # in the first image
    relative_error: float | None  # root of sum (second - first)^2 / sum first^2; None if the first is all 0
    cosine: float | None  # cosine of the angle between both; None if one of them is all 0


@dataclass
class _Sums:
    """Sums of squares and products of one output over images."""

    shape: tuple[int, ...]
    first: float = 0.0
    second: float = 0.0
    both: float = 0.0
    apart: float = 0.0

    def add(self, a: NDArray[Any], b: NDArray[Any]) -> None:
        for start in range(0, a.size, CHUNK):
            one, other = (v.ravel()[start : start + CHUNK].astype(np.float64) for v in (a, b))
            self.first += float(one @ one)
            self.second += float(other @ other)
            self.both += float(one @ other)
            self.apart += float((one - other) @ (one - other))

    def difference(self) -> OutputDifference:
        lengths = (self.first * self.second) ** 0.5
        error = (self.apart / self.first) ** 0.5 if self.first else None
        return OutputDifference(self.shape, error, self.both / lengths if lengths else None)


def compare_outputs(first: Candidate, second: Candidate, images: Iterable[Image]) -> list[OutputDifference]:
    """Run both files on RGB images (h, w, 3).

    Raises InputError when their outputs differ in number or shape, or hold NaN or infinite numbers.
    """
    sums: list[_Sums] = []
    for image in images:
        a, b = (_run(c, image) for c in (first, second))
        if [o.shape for o in a] != [o.shape for o in b]:
            shapes = [" and ".join(str(list(o.shape)) for o in outputs)[:100] for outputs in (a, b)]
            raise InputError(
                f"{first.path} has the outputs {shapes[0]}, {second.path} has {shapes[1]}; they cannot be compared."
            )
        sums = sums or [_Sums(o.shape) for o in a]
        if len(sums) != len(a):
            raise InputError(f"{first.path} has another number of outputs for each image; they cannot be compared.")
        for total, one, other in zip(sums, a, b, strict=True):
            total.add(one, other)
    if not all(np.isfinite([s.first, s.second, s.apart]).all() for s in sums):
        raise InputError(f"{first.path} or {second.path} gives NaN or infinite numbers.")
    return [s.difference() for s in sums]


def are_raw(*candidates: Candidate) -> bool:
    """Return whether the unread outputs of all candidates are available."""
    return all(c.outputs is not None for c in candidates)


def _run(candidate: Candidate, image: Image) -> list[NDArray[Any]]:
    outputs: Callable[[NDArray[np.float32]], list[Any]] | None = candidate.outputs
    if outputs is None:
        raise InputError(f"{candidate.path} gives boxes and no other outputs, so its outputs cannot be compared.")
    found = outputs(prepared(candidate.predict, image, candidate.imgsz)[0])
    if not found or any(not isinstance(o, np.ndarray) or o.dtype.kind not in "fiub" for o in found):
        raise InputError(f"{candidate.path} has outputs that are not arrays of numbers, so they cannot be compared.")
    if (count := sum(o.size for o in found)) > MOST_NUMBERS:
        raise InputError(f"{candidate.path} has outputs of {count} numbers; at most {MOST_NUMBERS} can be compared.")
    return found
