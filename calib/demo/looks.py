"""Other looks of the demo's scenes, for training on another domain: night and fog. Boxes stay where they are."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray
from scenes import SIDE, Image

Look = Callable[[Image, np.random.Generator], Image]


def night(image: Image, rng: np.random.Generator) -> Image:
    """Little light, bluish, from one lamp; shadows swallow contrast, and the sensor's noise is strong."""
    real = (image / np.float32(255)) ** rng.uniform(1.3, 1.9)
    light = rng.uniform(0.18, 0.35) + rng.uniform(0.2, 0.5) * _pool(rng)
    real = real * light[..., None] * np.array([0.7, 0.85, 1.0], np.float32)
    return _developed(real.astype(np.float32), rng.uniform(4, 9), rng)


def fog(image: Image, rng: np.random.Generator) -> Image:
    """Grey haze of uneven depth before everything, and the blur that scattered light makes."""
    cells = rng.normal(0, 0.08, (4, 4)).astype(np.float32)
    clear = rng.uniform(0.22, 0.45) + cv2.resize(cells, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    clear = np.clip(clear, 0.1, 0.7)[..., None]
    haze = np.float32(rng.uniform(0.65, 0.9)) * np.array([0.97, 0.99, 1.0], np.float32)
    soft = cv2.GaussianBlur(image, (0, 0), rng.uniform(0.8, 1.8)) / np.float32(255)
    return _developed(soft * clear + haze * (1 - clear), rng.uniform(1, 3), rng)


LOOKS: dict[str, Look] = {"day": lambda image, rng: image, "night": night, "fog": fog}


def _pool(rng: np.random.Generator) -> NDArray[np.float32]:
    """Light of one lamp, 0..1 (320, 320)."""
    yy, xx = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    y, x = rng.uniform(0, SIDE, 2)
    far = np.hypot(yy - np.float32(y), xx - np.float32(x)) / np.float32(rng.uniform(80, 200))
    return np.exp(-far * far).astype(np.float32)


def _developed(real: NDArray[np.float32], noise: float, rng: np.random.Generator) -> Image:
    """0..1 and the deviation of the noise in steps of 8 bits -> uint8."""
    grain = rng.normal(0, noise, real.shape).astype(np.float32)
    return np.clip(real * 255 + grain, 0, 255).astype(np.uint8)
