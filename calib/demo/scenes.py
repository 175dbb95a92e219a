"""Scenes of six kinds of drawn objects on varied backgrounds, with exact boxes.

Every scene follows from its seed alone.
"""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 320
NAMES = ("ball", "crate", "cone", "star", "ring", "kite")
SMALLEST, LARGEST = 24, 160  # object extent in pixels
LEAST_VISIBLE = 0.6  # a new object is left out where it would leave less than this share of another visible

Image = NDArray[np.uint8]
Floats = NDArray[np.float32]
Points = NDArray[np.float64]
Owner = NDArray[np.int64]
Painter = Callable[[int, np.random.Generator], tuple[Floats, Floats]]


def draw_scene(seed: int) -> tuple[Image, Floats]:
    """Seed -> RGB image (320, 320, 3) and labels (n, 5): class, centre x, centre y, width, height in 0..1."""
    image, labels, _ = compose(seed)
    return image, labels


def compose(seed: int) -> tuple[Image, Floats, Owner]:
    """`draw_scene` and the owner of every pixel: the row in the labels of the object seen there, or -1."""
    rng = np.random.default_rng(seed)
    canvas = _background(rng)
    owner = np.full((SIDE, SIDE), -1, np.int64)
    labels: list[tuple[float, ...]] = []
    areas: list[int] = []
    visible: list[int] = []
    wanted, tries = int(rng.integers(1, 7)), 0
    while len(labels) < wanted and tries < 2 * wanted:
        tries += 1
        kind = int(rng.integers(len(NAMES)))
        mask, colours = _cropped(*PAINTERS[kind](_extent(rng), rng))
        h, w = mask.shape
        y, x = int(rng.integers(0, SIDE - h + 1)), int(rng.integers(0, SIDE - w + 1))
        place = slice(y, y + h), slice(x, x + w)
        solid = mask > 0.5
        hidden = np.bincount(owner[place][solid] + 1, minlength=len(areas) + 1)[1:]
        left = [v - int(h) for v, h in zip(visible, hidden, strict=True)]
        if any(v < LEAST_VISIBLE * a for v, a in zip(left, areas, strict=True)):
            continue
        owner[place][solid] = len(areas)
        areas.append(int(solid.sum()))
        visible = [*left, areas[-1]]
        _shadow(canvas, mask, y, x, rng)
        spot = canvas[place]
        spot += mask[..., None] * (colours - spot)
        labels.append((kind, (x + w / 2) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE))
    return _photograph(canvas, rng), np.array(labels, np.float32).reshape(-1, 5), owner


def _extent(rng: np.random.Generator) -> int:
    return round(float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))))


def _cropped(mask: Floats, colours: Floats) -> tuple[Floats, Floats]:
    """Both cut to the solid part of the mask."""
    x, y, w, h = cv2.boundingRect((mask > 0.5).astype(np.uint8))
    return mask[y : y + h, x : x + w], colours[y : y + h, x : x + w]


def _colour(rng: np.random.Generator) -> Floats:
    hsv = np.array([[[rng.integers(180), rng.integers(90, 256), rng.integers(90, 256)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _dull(rng: np.random.Generator) -> Floats:
    grey = rng.uniform(30, 210)
    return (grey + rng.uniform(-35, 35, 3)).astype(np.float32)


def _stretched(values: Floats, interpolation: int) -> Floats:
    return cv2.resize(values, (SIDE, SIDE), interpolation=interpolation).astype(np.float32, copy=False)


def _background(rng: np.random.Generator) -> Floats:
    """A gradient, under smooth blobs, stripes, clutter lines that are no objects, or a woven grain."""
    corners = np.stack([np.stack([_dull(rng), _dull(rng)]) for _ in range(2)])
    canvas = _stretched(corners, cv2.INTER_LINEAR)
    style = int(rng.integers(5))
    if style == 1:
        cells = int(rng.integers(3, 24))
        canvas += _stretched(_noise(rng, cells, cells, 3) * 28, cv2.INTER_LINEAR)
    elif style == 2:
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
        steps = np.arange(SIDE, dtype=np.float32) * np.float32(2 * np.pi / period)
        wave = np.sin(steps[None] * np.float32(np.cos(angle)) + steps[:, None] * np.float32(np.sin(angle)))
        wave = np.sign(wave) if rng.random() < 0.5 else wave
        canvas += wave[..., None] * np.float32(rng.uniform(8, 30))
    elif style == 3:
        for _ in range(int(rng.integers(5, 25))):
            ends = rng.integers(0, SIDE, 4).tolist()
            width = int(rng.integers(1, 7))
            cv2.line(canvas, ends[:2], ends[2:], _dull(rng).tolist(), width, cv2.LINE_AA)
    elif style == 4:
        rows, columns = int(rng.integers(8, 160)), int(rng.integers(8, 160))
        grain = _noise(rng, rows, columns, 1) * np.float32(rng.uniform(6, 18))
        canvas += _stretched(grain, cv2.INTER_LINEAR)[..., None]
    return canvas


def _noise(rng: np.random.Generator, rows: int, columns: int, channels: int) -> Floats:
    return rng.standard_normal((rows, columns, channels), dtype=np.float32)


def _shadow(canvas: Floats, mask: Floats, y: int, x: int, rng: np.random.Generator) -> None:
    """Darken a patch a little below and beside the object."""
    top, left = y + int(rng.integers(0, 8)), max(0, x + int(rng.integers(-6, 7)))
    h, w = min(mask.shape[0], SIDE - top), min(mask.shape[1], SIDE - left)
    if h > 0 and w > 0:
        canvas[top : top + h, left : left + w] *= 1 - np.float32(0.4) * mask[:h, :w, None]


def _photograph(canvas: Floats, rng: np.random.Generator) -> Image:
    """Exposure, blur and sensor noise."""
    gain, offset = rng.uniform(0.7, 1.15), rng.uniform(-25, 25)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (5, 5), rng.uniform(0.4, 1.3)).astype(np.float32, copy=False)
    canvas *= np.float32(gain)
    canvas += _noise(rng, SIDE, SIDE, 1) * np.float32(rng.uniform(1, 8)) + np.float32(
        128 * (1 - gain) + offset
    )
    return cv2.convertScaleAbs(np.maximum(canvas, 0, out=canvas)).astype(np.uint8, copy=False)


# --- the objects: each painter returns an anti-aliased mask and the colours under it ------------------------


def _plain(size: int, rng: np.random.Generator) -> Floats:
    """A square of one colour, lit from one side."""
    light = np.linspace(rng.uniform(0.55, 0.9), rng.uniform(0.95, 1.2), size, dtype=np.float32)
    shade = light[None, :, None] if rng.random() < 0.5 else light[:, None, None]
    return np.clip(np.broadcast_to(_colour(rng) * shade, (size, size, 3)), 0, 255).astype(
        np.float32, copy=False
    )


def _polygon(size: int, points: Points) -> Floats:
    """Unit-square points -> mask, drawn with sub-pixel precision."""
    mask = np.zeros((size, size), np.uint8)
    fixed = np.rint((points * (size - 1)) * 16).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, 4)
    return mask.astype(np.float32) / np.float32(255)


def _turned(points: Points, degrees: float) -> Points:
    """Rotate about the centre, then scale back into the unit square."""
    a = np.deg2rad(degrees)
    turned = (points - 0.5) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    turned -= turned.min(0)
    return turned / turned.max()


def _strokes(colours: Floats, lines: list[tuple[Points, Points]], dark: float) -> None:
    size = len(colours)
    ink = (colours.mean((0, 1)) * dark).tolist()
    for start, end in lines:
        a, b = (np.rint(p * (size - 1)).astype(int).tolist() for p in (start, end))
        cv2.line(colours, a, b, ink, max(1, size // 14), cv2.LINE_AA)


def _distance(size: int, y: float, x: float) -> Floats:
    """Distance of every pixel from a point, all in pixels."""
    steps = np.arange(size, dtype=np.float32)
    return np.sqrt(np.square(steps - np.float32(y))[:, None] + np.square(steps - np.float32(x))[None])


def _disc(size: int, radius: float) -> Floats:
    centre = (size - 1) / 2
    return np.clip(np.float32(radius + 0.5) - _distance(size, centre, centre), 0, 1)


def _ball(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    y, x = rng.uniform(0.2, 0.45, 2) * size
    glow = np.clip(np.float32(1.35) - _distance(size, y, x) * np.float32(1.4 / size), 0.3, 1.5)
    return _disc(size, size / 2), np.clip(_colour(rng) * glow[..., None], 0, 255)


def _ring(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    mask = _disc(size, size / 2) - _disc(size, size * rng.uniform(0.24, 0.34))
    return mask, _plain(size, rng)


def _crate(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    aspect = rng.uniform(0.7, 1.0)
    corners = _turned(np.array([[0, 0], [1, 0], [1, aspect], [0, aspect]]), rng.uniform(-15, 15))
    colours = _plain(size, rng)
    sides = [(corners[i], corners[(i + 1) % 4]) for i in range(4)]
    _strokes(colours, [*sides, (corners[0], corners[2]), (corners[1], corners[3])], 0.45)
    return _polygon(size, corners), colours


def _cone(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    half = rng.uniform(0.55, 0.85) / 2
    points = np.array([[0.44, 0], [0.56, 0], [0.5 + half, 1], [0.5 - half, 1]])
    colours = _plain(size, rng)
    for band in (0.38, 0.68):
        rows = slice(int(band * size), int((band + 0.14) * size) + 1)
        colours[rows] = 0.25 * colours[rows] + 0.75 * 240
    return _polygon(size, _turned(points, rng.uniform(-10, 10))), colours


def _star(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    points = np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], 1) / 2 + 0.5
    return _polygon(size, _turned(points, rng.uniform(-36, 36))), _plain(size, rng)


def _kite(size: int, rng: np.random.Generator) -> tuple[Floats, Floats]:
    waist, half = rng.uniform(0.28, 0.42), rng.uniform(0.3, 0.42)
    points = np.array([[0.5, 0], [0.5 + half, waist], [0.5, 1], [0.5 - half, waist]])
    points = _turned(points, rng.uniform(-20, 20))
    colours = _plain(size, rng)
    _strokes(colours, [(points[0], points[2]), (points[1], points[3])], 0.5)
    return _polygon(size, points), colours


PAINTERS: tuple[Painter, ...] = (_ball, _crate, _cone, _star, _ring, _kite)
