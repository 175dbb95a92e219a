"""Photographs in an ONNX file's own layout and type."""

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
    """RGB (height, width, 3), placed as the form says, and why files were left out. Raises InputError when none can be
    read."""
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
    """As the file takes them, made one at a time; the last one is filled up with its last image."""
    n = wanted.batch
    for i in range(0, len(images), n):
        some = images[i : i + n]
        yield as_input([*some, *[some[-1]] * (n - len(some))], wanted, form)


def as_input(images: Sequence[Image], wanted: ImageInput, form: InputForm) -> NDArray[Any]:
    """Placed RGB pictures (height, width, 3) -> one batch in the input's own layout and type. A file that takes bytes
    has its scale within."""
    if wanted.type is np.uint8:
        refuse_scaled_bytes(form)
        batch: NDArray[Any] = np.stack([form.ordered(image, wanted.channels) for image in images])
    else:
        batch = np.stack([form.numbers(image, wanted.channels) for image in images]).astype(wanted.type, copy=False)
    return np.ascontiguousarray(batch.transpose(0, 2, 3, 1)) if wanted.channels_last else batch


def refuse_scaled_bytes(form: InputForm) -> None:
    """Raises InputError for a mean and deviation that a file of bytes cannot be given."""
    if form.is_normalised:
        raise InputError.naming("The file takes bytes, so {mean} and {std} do not belong to it.")
