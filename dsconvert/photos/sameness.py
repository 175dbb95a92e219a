"""Detect calibration images without information: black ones of a covered camera, or one picture many times."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.text import Sentence
from dsconvert.photos.images import PAD_VALUE

Pixels = NDArray[Any]


def warning_of(images: Iterable[Pixels]) -> str:
    """Return a warning if all images (3, height, width), bytes, are the same, or each has only one colour; else
    nothing.

    Grey padding is ignored.
    """
    count, first, same, blank = 0, None, True, True
    for image in images:
        first = image if first is None else first
        same = same and np.array_equal(image, first)
        blank = blank and _is_blank(image)
        count += 1
        if not same and not blank:
            return ""
    if blank and count:
        what = "of one colour (black, or a covered camera?), so they tell nothing about the network"
        return Sentence(f"{_all(count)} {what}; {_REMEDY}.")
    if same and count > 1:
        return Sentence(f"{_all(count)} the same picture, so the weights fit only this picture; {_REMEDY}.")
    return ""


_REMEDY = "give {images} about 100 different photos of what the model will see"


def _all(count: int) -> str:
    return "The one calibration image is" if count == 1 else f"All {count} calibration images are"


def _is_blank(image: Pixels) -> bool:
    pixels = image.reshape(len(image), -1)
    rest = pixels[:, (pixels != PAD_VALUE).any(0)]
    return bool((rest == rest[:, :1]).all())
