"""Read the pixels of image files, and letterbox an image to a size."""

from __future__ import annotations

import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.photos.cutshort import ends_early, kind_of, whole_picture
from dsconvert.photos.photobounds import too_much

PAD_VALUE = 114  # YOLOv5's grey
MAX_IMAGE_BYTES = 1 << 30

Image = NDArray[np.uint8]


@dataclass(frozen=True)
class Letterbox:
    """How an image was placed in a rectangle: pixel * gain + pad."""

    gain: float  # of columns, and of rows unless these are stretched
    pad_x: float  # of the left edge; negative where columns are cut off
    pad_y: float  # of the upper edge, likewise
    stretch: float = 1.0  # gain of rows divided by the gain of columns

    @property
    def gain_y(self) -> float:
        """The gain of rows."""
        return self.gain * self.stretch


def none_readable(reasons: Sequence[str], what: str = "images") -> InputError:
    """Return the error for the case that no image could be read, with the first reason."""
    return InputError(f"None of the {len(reasons)} {what} could be read; the first: {reasons[0]}")


def read_image(path: Path) -> Image:
    """Return RGB uint8 (h, w, 3), turned as its EXIF data say; for an animation, its first picture.

    Raises InputError when it cannot be decoded, a part of it is missing, or it is larger than OpenCV may read (see
    `dsconvert.__init__`).
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # reading a pipe or a device may never end
            raise InputError(f"{path} cannot be read: it is not an ordinary file.")
        if status.st_size > MAX_IMAGE_BYTES:
            raise InputError(f"{path} is larger than any image dsconvert reads.")
        # files of the system have no size, and reading some of them blocks
        data = np.fromfile(path, np.uint8).tobytes() if status.st_size else b""
    except OSError:
        raise InputError(f"{path} cannot be read.") from None
    if reason := too_much(data):
        raise InputError(f"{path} {reason}, so it was not decoded.")
    early = ends_early(data)
    try:
        image = whole_picture(data, _decode) if early else _decode(data)
    except (cv2.error, MemoryError):
        raise InputError(f"{path} is not an image that can be decoded, or too large.") from None
    if image is None and early:
        raise InputError(f"{path} is not an image that can be decoded: a {kind_of(data)} file that ends too early.")
    if image is None:
        raise InputError(f"{path} is not an image that can be decoded.")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB, image).astype(np.uint8, copy=False)


def _decode(data: bytes) -> Image | None:
    """Return BGR, or None if this is not an image. Raises cv2.error."""
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR) if data else None
    return None if image is None else image.astype(np.uint8, copy=False)


def letterbox(image: Image, size: SizeLike, pad: int = PAD_VALUE) -> tuple[Image, Letterbox]:
    """Scale an image to fit a size, keeping its aspect ratio (bilinear), and centre it on grey of that value."""
    size = Size.of(size)
    gain = gain_to_fit(image, size)
    placed, left, top = on_grey(scaled(image, gain), size.height, size.width, pad)
    return placed, Letterbox(gain, left, top)


def gain_to_fit(image: Image, size: Size) -> float:
    """Return the factor that makes the image as large as fits."""
    return min(size.height / image.shape[0], size.width / image.shape[1])


def scaled(image: Image, gain: float) -> Image:
    """Return the image scaled by `gain` (bilinear), with at least one pixel each way."""
    h, w = image.shape[:2]
    size = max(1, round(w * gain)), max(1, round(h * gain))
    if size == (w, h):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_LINEAR).astype(np.uint8, copy=False)


def on_grey(image: Image, height: int, width: int, value: int = PAD_VALUE) -> tuple[Image, int, int]:
    """Place an image in the middle of a grey one of that size, which it must not exceed; also return its left and
    top.
    """
    h, w = image.shape[:2]
    left, top = round((width - w) / 2 - 0.1), round((height - h) / 2 - 0.1)
    made = np.full((height, width, 3), value, np.uint8)
    made[top : top + h, left : left + w] = image
    return made, left, top


def to_tensor(images: Sequence[Image]) -> Tensor:
    """Turn images of one size (h, w, 3), uint8, into a batch (n, 3, h, w), float32, 0..1."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255


Item = TypeVar("Item")


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Return at most `count` of the items, evenly spaced over all of them."""
    if count >= len(items):
        return list(items)
    return [items[i * len(items) // count] for i in range(count)]
