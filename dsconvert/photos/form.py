"""A photograph as a network wants it: placed in a rectangle, and made into numbers on the scale it was trained on."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.photos.entry import Entry
from dsconvert.photos.images import PAD_VALUE, Image, Letterbox, gain_to_fit, letterbox, scaled

FITS = ("letterbox", "corner", "stretch", "crop")
SCALES = (255, 1)


@dataclass(frozen=True)
class InputForm:
    """Numbers are (pixel / scale - mean) / std. The default is YOLOv5's form."""

    mean: tuple[float, ...] = (0.0,)  # one number, or three in the order in which the network takes channels
    std: tuple[float, ...] = (1.0,)  # likewise
    bgr: bool = False  # blue comes first
    scale: int = 255  # what pixels are divided by; 1: they stay 0..255
    fit: str = "letterbox"  # how an image fills the rectangle: one of FITS, see `place`
    pad: int = PAD_VALUE  # what is left of the rectangle is filled with, before the scale

    def __post_init__(self) -> None:
        sizes = {len(self.mean), len(self.std)}
        if not sizes <= {1, 3} or not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise InputError.naming(
                "{mean} and {std} are one or three numbers such as 0.485,0.456,0.406, {std} above 0."
            )
        if self.scale not in SCALES:
            raise InputError.naming(
                "{scale} is 255 (pixels are divided by it) or 1 (they are not), not {}.", self.scale
            )
        if self.fit not in FITS:
            raise InputError.naming("{fit} is one of {}, not {!r}.", ", ".join(FITS), self.fit)
        if not 0 <= self.pad <= 255:
            raise InputError.naming("{pad} is a pixel's value, 0 to 255, not {}.", self.pad)

    @property
    def entry(self) -> Entry:
        """What becomes of bytes in the network's own order of channels."""
        return Entry(float(self.scale), self.mean, self.std)

    @property
    def is_normalised(self) -> bool:
        """Whether a mean is taken away, or a deviation divided by."""
        return self.entry.is_normalised

    def apply(self, image: Image, height: int, width: int, channels: int = 3) -> NDArray[np.float32]:
        """An RGB image (h, w, 3) of any size -> the network's own input (channels, height, width); of one channel it
        is grey. Raises InputError for three means where there is one channel."""
        return self.numbers(self.place(image, height, width)[0], channels)

    def place(self, image: Image, height: int, width: int) -> tuple[Image, Letterbox]:
        """The image in an RGB rectangle, and where it is there. `letterbox`: as large as fits, in the middle; `corner`:
        the same at the top left; `stretch`: its sides fill those of the rectangle; `crop`: its middle fills all of the
        rectangle."""
        return _PLACES[self.fit](image, height, width, self.pad)

    def numbers(self, picture: Image, channels: int = 3) -> NDArray[np.float32]:
        """A placed RGB picture -> (channels, height, width), as the network takes it."""
        if channels < max(len(self.mean), len(self.std)):
            raise InputError.naming("The image has one channel, so {mean} and {std} are one number each.")
        return self.entry.real(torch.from_numpy(self.ordered(picture, channels))).numpy()

    def ordered(self, picture: Image, channels: int = 3) -> Image:
        """A placed RGB picture -> bytes (channels, height, width), in the order in which the network takes them."""
        if channels == 1:
            return cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY)[None].astype(np.uint8, copy=False)
        return np.ascontiguousarray((picture[..., ::-1] if self.bgr else picture).transpose(2, 0, 1))


PLAIN = InputForm()


def _letterbox(image: Image, height: int, width: int, pad: int) -> tuple[Image, Letterbox]:
    return letterbox(image, Size(height, width), pad)


def _corner(image: Image, height: int, width: int, pad: int) -> tuple[Image, Letterbox]:
    gain = gain_to_fit(image, Size(height, width))
    return _from_corner(scaled(image, gain), height, width, pad), Letterbox(gain, 0, 0)


def _from_corner(image: Image, height: int, width: int, pad: int) -> Image:
    """The image from the top left on: cut off where it is larger, padded where it is smaller."""
    part = image[:height, :width]
    made = np.full((height, width, 3), pad, np.uint8)
    made[: part.shape[0], : part.shape[1]] = part
    return made


def _stretch(image: Image, height: int, width: int, pad: int) -> tuple[Image, Letterbox]:
    down, across = height / image.shape[0], width / image.shape[1]
    made = image if down == across == 1 else cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return made.astype(np.uint8, copy=False), Letterbox(across, 0, 0, down / across)


def _crop(image: Image, height: int, width: int, pad: int) -> tuple[Image, Letterbox]:
    gain = max(height / image.shape[0], width / image.shape[1])
    image = scaled(image, gain)
    h, w = image.shape[:2]
    top, left = max(0, (h - height) // 2), max(0, (w - width) // 2)
    # rounding may leave a row short
    return _from_corner(image[top:, left:], height, width, pad), Letterbox(gain, -left, -top)


_PLACES = {"letterbox": _letterbox, "corner": _corner, "stretch": _stretch, "crop": _crop}
