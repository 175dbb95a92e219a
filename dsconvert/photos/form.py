"""Bring a photograph into a network's form: placed in a rectangle, and as numbers on the scale of its training."""

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
    """The form of a network's input: numbers are (pixel / scale - mean) / std. The default is YOLOv5's.

    Raises InputError for values that are not valid.
    """

    mean: tuple[float, ...] = (0.0,)  # one number, or three in the order of the network's channels
    std: tuple[float, ...] = (1.0,)  # as mean; above 0
    bgr: bool = False  # whether blue comes first
    scale: int = 255  # 255, or 1 to keep pixels in 0..255
    fit: str = "letterbox"  # how an image fills the rectangle: one of FITS, see `place`
    pad: int = PAD_VALUE  # pixel value of the rectangle's unused part

    def __post_init__(self) -> None:
        sizes = {len(self.mean), len(self.std)}
        if not sizes <= {1, 3} or not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise InputError.naming(
                "{mean} and {std} must be one or three numbers such as 0.485,0.456,0.406, {std} above 0."
            )
        if self.scale not in SCALES:
            raise InputError.naming(
                "{scale} must be 255 (pixels are divided by it) or 1 (they are not), not {}.", self.scale
            )
        if self.fit not in FITS:
            raise InputError.naming("{fit} must be one of {}, not {!r}.", ", ".join(FITS), self.fit)
        if not 0 <= self.pad <= 255:
            raise InputError.naming("{pad} must be a pixel's value, 0 to 255, not {}.", self.pad)

    @property
    def entry(self) -> Entry:
        """How bytes become numbers, in the network's own order of channels."""
        return Entry(float(self.scale), self.mean, self.std)

    @property
    def is_normalised(self) -> bool:
        """Whether there is a mean or a deviation."""
        return self.entry.is_normalised

    def apply(self, image: Image, height: int, width: int, channels: int = 3) -> NDArray[np.float32]:
        """Turn an RGB image (h, w, 3) of any size into the network's input (channels, height, width); one channel is
        grey.

        Raises InputError for three means and one channel.
        """
        return self.numbers(self.place(image, height, width)[0], channels)

    def place(self, image: Image, height: int, width: int) -> tuple[Image, Letterbox]:
        """Place an image in an RGB rectangle, and return where it lies there.

        `letterbox` makes it as large as fits, in the middle; `corner` does so at the top left. `stretch` gives it the
        rectangle's sides. `crop` fills the rectangle with the middle of the image.
        """
        return _PLACES[self.fit](image, height, width, self.pad)

    def numbers(self, picture: Image, channels: int = 3) -> NDArray[np.float32]:
        """Turn a placed RGB picture into numbers (channels, height, width), as the network takes it."""
        if channels < max(len(self.mean), len(self.std)):
            raise InputError.naming("The image has one channel, so {mean} and {std} must be one number each.")
        return self.entry.real(torch.from_numpy(self.ordered(picture, channels))).numpy()

    def ordered(self, picture: Image, channels: int = 3) -> Image:
        """Turn a placed RGB picture into bytes (channels, height, width), in the network's order of channels."""
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
    """Put an image into the top left of a rectangle; cut it off or pad it at the other sides."""
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
    # rounding may leave one row or column short
    return _from_corner(image[top:, left:], height, width, pad), Letterbox(gain, -left, -top)


_PLACES = {"letterbox": _letterbox, "corner": _corner, "stretch": _stretch, "crop": _crop}
