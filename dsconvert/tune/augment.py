"""Augment training images and their boxes: mosaic, scale and translation, mirror, colours.

Boxes are (n, 5): class, x1, y1, x2, y2 in pixels. All random choices come from the given generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from dsconvert.base.size import Size
from dsconvert.photos.images import PAD_VALUE, Image, on_grey

Boxes = NDArray[np.float64]
Photo = tuple[Image, Boxes]
GREY = (PAD_VALUE,) * 3
# A box is dropped when too little of it stays visible: its shorter side in pixels, its share of the area, its aspect.
LEAST_SIDE, LEAST_SHARE, MOST_ASPECT = 2.0, 0.1, 20.0


@dataclass(frozen=True)
class Augment:
    """How strongly images are augmented.

    mosaic: share of images that become a mosaic of four.
    mirror: share of images that are mirrored.
    scale: largest change of size, as a share.
    place: largest translation, as a share of the sides.
    hue, saturation, brightness: largest distance of each factor from 1.
    """

    mosaic: float = 1.0
    mirror: float = 0.5
    scale: float = 0.5
    place: float = 0.1
    hue: float = 0.015
    saturation: float = 0.7
    brightness: float = 0.4


NOTHING = Augment(0, 0, 0, 0, 0, 0, 0)


def augmented(photos: Sequence[Photo], size: Size, how: Augment, rng: np.random.Generator) -> Photo:
    """Augment one photo, or four for a mosaic, to a photo of that size.

    photos: none larger than `size` in height or width.
    """
    image, boxes = mosaic(photos, size, rng) if len(photos) == 4 else centred(photos[0], size)
    image, boxes = moved((image, boxes), size, how, rng)
    if rng.random() < how.mirror:
        image, boxes = mirrored((image, boxes))
    return recoloured(image, how, rng), boxes


def centred(photo: Photo, size: Size) -> Photo:
    """Put a photo into the middle of a grey rectangle, as `letterbox` does."""
    image, boxes = photo
    placed, left, top = on_grey(image, size.height, size.width)
    return placed, _shifted(boxes, left, top)


def mosaic(photos: Sequence[Photo], size: Size, rng: np.random.Generator) -> Photo:
    """Put four photos around a random point of a rectangle of twice the height and width, cut off at its edges."""
    height, width = size.pair
    canvas = np.full((2 * height, 2 * width, 3), PAD_VALUE, np.uint8)
    x, y = (int(rng.uniform(n / 2, 3 * n / 2)) for n in (width, height))
    found = []
    for number, (image, boxes) in enumerate(photos):
        h, w = image.shape[:2]
        left, top = x - w if number % 2 == 0 else x, y - h if number < 2 else y
        x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + w, 2 * width), min(top + h, 2 * height)
        canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
        found.append(_shifted(boxes, left, top))
    return canvas, np.concatenate(found)


def moved(photo: Photo, size: Size, how: Augment, rng: np.random.Generator) -> Photo:
    """Scale and translate a photo at random about its middle, into a photo of that size; drop boxes mostly cut away."""
    image, boxes = photo
    h, w = image.shape[:2]
    gain = rng.uniform(1 - how.scale, 1 + how.scale)
    x, y = (size.width, size.height) * (0.5 + rng.uniform(-how.place, how.place, 2))
    left, top = x - gain * w / 2, y - gain * h / 2
    if gain != 1 or left or top or (h, w) != size.pair:
        # pixel centres lie at halves, while the matrix maps indices
        half = (gain - 1) / 2
        matrix = np.array([[gain, 0, left + half], [0, gain, top + half]])
        image = cv2.warpAffine(image, matrix, (size.width, size.height), borderValue=GREY).astype(np.uint8, copy=False)
    whole = boxes.copy()
    whole[:, 1:] = whole[:, 1:] * gain + (left, top, left, top)
    return image, _visible(whole, size)


def mirrored(photo: Photo) -> Photo:
    """Mirror a photo left to right."""
    image, boxes = photo
    turned = boxes.copy()
    turned[:, [1, 3]] = image.shape[1] - boxes[:, [3, 1]]
    return np.ascontiguousarray(image[:, ::-1]), turned


def recoloured(image: Image, how: Augment, rng: np.random.Generator) -> Image:
    """Multiply hue, saturation and brightness of the whole image by random factors."""
    gains = 1 + rng.uniform(-1, 1, 3) * (how.hue, how.saturation, how.brightness)
    if (gains == 1).all():
        return image
    steps = np.arange(256)
    hue = ((steps * gains[0]) % 180).astype(np.uint8)  # OpenCV's hue has 180 steps
    others = [np.clip(steps * g, 0, 255).astype(np.uint8) for g in gains[1:]]
    planes = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    changed = cv2.merge([cv2.LUT(p, table) for p, table in zip(planes, (hue, *others), strict=True)])
    return cv2.cvtColor(changed, cv2.COLOR_HSV2RGB).astype(np.uint8, copy=False)


def _shifted(boxes: Boxes, left: int, top: int) -> Boxes:
    """Translate boxes."""
    moved = boxes.copy()
    moved[:, 1:] += (left, top, left, top)
    return moved


def _visible(boxes: Boxes, size: Size) -> Boxes:
    """Clip boxes to the image, and drop boxes with too little left."""
    cut = boxes.copy()
    cut[:, 1:] = cut[:, 1:].clip(0, (size.width, size.height) * 2)
    before, after = boxes[:, 3:] - boxes[:, 1:3], cut[:, 3:] - cut[:, 1:3]
    shares = after.prod(1) / np.maximum(before.prod(1), 1e-9)
    aspect = after.max(1, initial=0) / np.maximum(after.min(1, initial=np.inf), 1e-9)
    return cut[(after > LEAST_SIDE).all(1) & (shares > LEAST_SHARE) & (aspect < MOST_ASPECT)]
