"""Photographs as a file of any origin wants them: detectors letterboxed in 0..1, classifiers cropped and normalised."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.onnxfile.source import ImageInput
from dsconvert.photos.images import PAD_VALUE, Image, none_readable, on_grey, read_image, scaled


@dataclass(frozen=True)
class Normalisation:
    """(pixels / 255 - mean) / std, channel by channel. Without one, pixels are only divided by 255."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        sizes = {len(self.mean), len(self.std)}
        if not sizes <= {1, 3} or not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise InputError.naming(
                "{mean} and {std} are one or three numbers such as 0.485,0.456,0.406, {std} above 0."
            )


def pictures(paths: Sequence[Path], wanted: ImageInput, crop: bool) -> tuple[list[Image], list[str]]:
    """RGB (height, width, 3), and why files were left out. crop: the middle of an image is taken, as classifiers
    do, else all of it with grey around. Raises InputError when none can be read."""
    place = _cropped if crop else _boxed
    images, skipped = [], []
    for path in paths:
        try:
            images.append(place(read_image(path), wanted.height, wanted.width))
        except InputError as error:
            skipped.append(str(error))
    if not images:
        raise none_readable(skipped, "calibration images")
    return images, skipped


def batches(images: Sequence[Image], wanted: ImageInput, normal: Normalisation | None) -> Iterator[NDArray[Any]]:
    """As the file takes them, made one at a time; the last one is filled up with its last image."""
    n = wanted.batch
    for i in range(0, len(images), n):
        some = images[i : i + n]
        yield as_input([*some, *[some[-1]] * (n - len(some))], wanted, normal)


def as_input(images: Sequence[Image], wanted: ImageInput, normal: Normalisation | None) -> NDArray[Any]:
    """RGB bytes (height, width, 3) -> one batch in the input's own layout and type."""
    if wanted.channels == 1:
        images = [cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None].astype(np.uint8) for image in images]
    batch: NDArray[Any] = np.stack(images)
    if wanted.type is not np.uint8:
        batch = batch.astype(np.float32) / np.float32(255)
        if normal:
            if wanted.channels < max(len(normal.mean), len(normal.std)):
                raise InputError.naming("The image has one channel, so {mean} and {std} are one number each.")
            batch = (batch - np.array(normal.mean, np.float32)) / np.array(normal.std, np.float32)
        batch = batch.astype(wanted.type)
    elif normal:
        raise InputError.naming("The file takes bytes, so {mean} and {std} do not belong to it.")
    return batch if wanted.channels_last else np.ascontiguousarray(batch.transpose(0, 3, 1, 2))


def _boxed(image: Image, height: int, width: int) -> Image:
    """Scaled to fit, grey around it: yolo.images.letterbox for any rectangle."""
    image = scaled(image, min(height / image.shape[0], width / image.shape[1]))[:height, :width]
    return on_grey(image, height, width)[0]


def _cropped(image: Image, height: int, width: int) -> Image:
    """Scaled to cover, and the middle of that."""
    image = scaled(image, max(height / image.shape[0], width / image.shape[1]))
    h, w = image.shape[:2]
    made = np.full((height, width, 3), PAD_VALUE, np.uint8)  # rounding may leave a row short
    top, left = max(0, (h - height) // 2), max(0, (w - width) // 2)
    part = image[top : top + height, left : left + width]
    made[: part.shape[0], : part.shape[1]] = part
    return made
