"""Bring photographs into the layout and type of an ONNX file's input."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.onnxfile.source import ImageInput
from dsconvert.photos.form import InputForm
from dsconvert.photos.images import Image, none_readable, read_image


def pictures(paths: Sequence[Path], wanted: ImageInput, form: InputForm) -> tuple[list[Image], list[str]]:
    """Read RGB images (height, width, 3), placed as the form says, and the reasons why others were left out.

    Raises InputError when none can be read.
    """
    images, skipped = [], []
    for path in paths:
        try:
            images.append(form.place(read_image(path), wanted.height, wanted.width)[0])
        except InputError as error:
            skipped.append(str(error))
    if not images:
        raise none_readable(skipped, "calibration images")
    return images, skipped


def batches(images: Sequence[Image], wanted: ImageInput, form: InputForm) -> Iterator[NDArray[Any]]:
    """Yield batches as the file takes them, made one at a time. Copies of the last image fill up the last batch."""
    n = wanted.batch
    for i in range(0, len(images), n):
        some = images[i : i + n]
        yield as_input([*some, *[some[-1]] * (n - len(some))], wanted, form)


def probe_of(images: Sequence[Image], wanted: ImageInput, form: InputForm) -> NDArray[Any]:
    """Make one batch of images that all differ, however few are given: moved copies fill it up."""
    n = len(images)
    return as_input([np.roll(images[i % n], i // n, 1) for i in range(wanted.batch)], wanted, form)


def as_input(images: Sequence[Image], wanted: ImageInput, form: InputForm) -> NDArray[Any]:
    """Turn placed RGB images (height, width, 3) into one batch of the input's layout and type.

    A file that takes bytes scales them itself.
    """
    if wanted.type is np.uint8:
        refuse_scaled_bytes(form)
        batch: NDArray[Any] = np.stack([form.ordered(image, wanted.channels) for image in images])
    else:
        batch = np.stack([form.numbers(image, wanted.channels) for image in images]).astype(wanted.type, copy=False)
    return laid_out(batch, wanted)


def laid_out(batch: NDArray[Any], wanted: ImageInput) -> NDArray[Any]:
    """Turn images (n, channels, height, width) into the layout of the input."""
    return np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if wanted.channels_last else batch


def refuse_scaled_bytes(form: InputForm) -> None:
    """Raise InputError for a mean or deviation, which an input of bytes cannot have."""
    if form.is_normalised:
        raise InputError.naming("The file takes bytes, so {mean} and {std} cannot be applied; leave them out.")
