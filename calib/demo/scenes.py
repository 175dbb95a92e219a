"""Scenes of six kinds of drawn objects on varied backgrounds, with exact boxes; every scene follows from its seed."""

from __future__ import annotations

from collections.abc import Callable

import cv2
import numpy as np
from numpy.typing import NDArray

SIDE = 320
NAMES = ("ball", "crate", "cone", "star", "ring", "kite")
SMALLEST, LARGEST = 24, 150  # object extent in pixels
LEAST_VISIBLE = 0.6  # an object is not drawn where it would hide more than the rest of another

Image = NDArray[np.uint8]
Mask = NDArray[np.float32]
Painter = Callable[[int, np.random.Generator], tuple[Mask, NDArray[np.float32]]]


def draw_scene(seed: int) -> tuple[Image, NDArray[np.float32]]:
    """Seed -> RGB image (320, 320, 3) and labels (n, 5): class, centre x, centre y, width, height in 0..1."""
    rng = np.random.default_rng(seed)
    canvas = _background(rng)
    owner = np.full((SIDE, SIDE), -1, np.int16)
    labels: list[tuple[float, ...]] = []
    areas: list[int] = []
    for _ in range(int(rng.integers(1, 8))):
        kind = int(rng.integers(len(NAMES)))
        size = round(float(np.exp(rng.uniform(np.log(SMALLEST), np.log(LARGEST)))))
        mask, colours = PAINTERS[kind](size, rng)
        ys, xs = np.nonzero(mask > 0.5)
        mask = mask[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        colours = colours[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        h, w = mask.shape
        y, x = int(rng.integers(0, SIDE - h + 1)), int(rng.integers(0, SIDE - w + 1))
        solid = mask > 0.5
        if _hides_too_much(owner, areas, solid, y, x):
            continue
        owner[y : y + h, x : x + w][solid] = len(areas)
        areas.append(int(solid.sum()))
        _shadow(canvas, mask, y, x, rng)
        spot = canvas[y : y + h, x : x + w]
        spot += mask[..., None] * (colours - spot)
        labels.append((kind, (x + w / 2) / SIDE, (y + h / 2) / SIDE, w / SIDE, h / SIDE))
    return _photograph(canvas, rng), np.array(labels, np.float32).reshape(-1, 5)


def _hides_too_much(owner: NDArray[np.int16], areas: list[int], solid: NDArray[np.bool_], y: int, x: int) -> bool:
    after = owner.copy()
    after[y : y + solid.shape[0], x : x + solid.shape[1]][solid] = -1
    return any((after == i).sum() < LEAST_VISIBLE * area for i, area in enumerate(areas))


def _colour(rng: np.random.Generator) -> NDArray[np.float32]:
    hsv = np.array([[[rng.integers(180), rng.integers(90, 256), rng.integers(90, 256)]]], np.uint8)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0, 0].astype(np.float32)


def _background(rng: np.random.Generator) -> NDArray[np.float32]:
    """A gradient, under smooth blobs, stripes, or clutter lines that are no objects."""
    corners = np.stack([[_dull(rng) for _ in range(2)] for _ in range(2)])
    canvas = cv2.resize(corners, (SIDE, SIDE), interpolation=cv2.INTER_LINEAR).astype(np.float32)
    style = int(rng.integers(4))
    if style == 1:
        cells = int(rng.integers(3, 24))
        blobs = rng.normal(0, 28, (cells, cells, 3)).astype(np.float32)
        canvas += cv2.resize(blobs, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
    elif style == 2:
        yy, xx = np.mgrid[:SIDE, :SIDE].astype(np.float32)
        angle, period = rng.uniform(0, np.pi), rng.uniform(8, 60)
        wave = np.sin((xx * np.cos(angle) + yy * np.sin(angle)) * 2 * np.pi / period)
        canvas += (np.sign(wave) if rng.random() < 0.5 else wave)[..., None] * rng.uniform(8, 30)
    elif style == 3:
        for _ in range(int(rng.integers(5, 25))):
            start, end = rng.integers(0, SIDE, 2), rng.integers(0, SIDE, 2)
            width = int(rng.integers(1, 7))
            cv2.line(canvas, start.tolist(), end.tolist(), _dull(rng).tolist(), width, cv2.LINE_AA)
    return canvas.astype(np.float32)


def _dull(rng: np.random.Generator) -> NDArray[np.float32]:
    grey = rng.uniform(30, 210)
    return (grey + rng.uniform(-35, 35, 3)).astype(np.float32)


def _shadow(canvas: NDArray[np.float32], mask: Mask, y: int, x: int, rng: np.random.Generator) -> None:
    """Darken a patch a little below and beside the object."""
    dy, dx = int(rng.integers(0, 8)), int(rng.integers(-6, 7))
    top, left = y + dy, max(0, x + dx)
    h, w = min(mask.shape[0], SIDE - top), min(mask.shape[1], SIDE - left)
    if h > 0 and w > 0:
        canvas[top : top + h, left : left + w] *= 1 - 0.4 * mask[:h, :w, None]


def _photograph(canvas: NDArray[np.float32], rng: np.random.Generator) -> Image:
    """Exposure, blur and sensor noise."""
    canvas = (canvas - 128) * rng.uniform(0.7, 1.15) + 128 + rng.uniform(-25, 25)
    if rng.random() < 0.3:
        canvas = cv2.GaussianBlur(canvas, (0, 0), rng.uniform(0.4, 1.3)).astype(np.float32)
    small = rng.normal(0, rng.uniform(1, 8), (SIDE, SIDE, 1)).astype(np.float32)
    return np.clip(canvas + small, 0, 255).astype(np.uint8)


# --- the objects: each painter returns an anti-aliased mask and the colours under it -----------------------------


def _plain(size: int, rng: np.random.Generator) -> NDArray[np.float32]:
    """A square of one colour, lit from one side."""
    light = np.linspace(rng.uniform(0.55, 0.9), rng.uniform(0.95, 1.2), size, dtype=np.float32)
    shade = light[None, :, None] if rng.random() < 0.5 else light[:, None, None]
    return np.broadcast_to(_colour(rng) * shade, (size, size, 3)).copy()


def _polygon(size: int, points: NDArray[np.float64]) -> Mask:
    """Unit-square points -> mask, drawn with sub-pixel precision."""
    mask = np.zeros((size, size), np.uint8)
    fixed = np.rint((points * (size - 1)) * 16).astype(np.int32)
    cv2.fillPoly(mask, [fixed], 255, cv2.LINE_AA, 4)
    return (mask / np.float32(255)).astype(np.float32)


def _turned(points: NDArray[np.float64], degrees: float) -> NDArray[np.float64]:
    """Rotate about the centre, then scale back into the unit square."""
    a = np.deg2rad(degrees)
    turned = (points - 0.5) @ np.array([[np.cos(a), np.sin(a)], [-np.sin(a), np.cos(a)]])
    turned -= turned.min(0)
    return turned / turned.max()


def _strokes(
    colours: NDArray[np.float32], size: int, lines: list[tuple[NDArray[np.float64], NDArray[np.float64]]], dark: float
) -> None:
    ink = (colours.mean((0, 1)) * dark).tolist()
    for start, end in lines:
        a, b = (tuple(np.rint(p * (size - 1)).astype(int).tolist()) for p in (start, end))
        cv2.line(colours, a, b, ink, max(1, size // 14), cv2.LINE_AA)


def _disc(size: int, radius: float) -> Mask:
    yy, xx = np.mgrid[:size, :size]
    centre = (size - 1) / 2
    return np.clip(radius - np.hypot(yy - centre, xx - centre) + 0.5, 0, 1).astype(np.float32)


def _ball(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    yy, xx = np.mgrid[:size, :size] / size - rng.uniform(0.3, 0.45)
    glow = np.clip(1.35 - 1.4 * np.hypot(yy, xx), 0.3, 1.5).astype(np.float32)
    return _disc(size, size / 2), np.clip(_colour(rng) * glow[..., None], 0, 255)


def _ring(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    mask = _disc(size, size / 2) - _disc(size, size * rng.uniform(0.24, 0.34))
    return mask, _plain(size, rng)


def _crate(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    aspect = rng.uniform(0.7, 1.0)
    corners = np.array([[0, 0], [1, 0], [1, aspect], [0, aspect]])
    corners = _turned(corners, rng.uniform(-15, 15))
    colours = _plain(size, rng)
    sides = [(corners[i], corners[(i + 1) % 4]) for i in range(4)]
    _strokes(colours, size, [*sides, (corners[0], corners[2]), (corners[1], corners[3])], 0.45)
    return _polygon(size, corners), colours


def _cone(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    width = rng.uniform(0.55, 0.85)
    points = np.array([[0.5 - 0.06, 0], [0.5 + 0.06, 0], [0.5 + width / 2, 1], [0.5 - width / 2, 1]])
    colours = _plain(size, rng)
    for band in (0.38, 0.68):
        rows = slice(int(band * size), int((band + 0.14) * size) + 1)
        colours[rows] = 0.25 * colours[rows] + 0.75 * 240
    return _polygon(size, _turned(points, rng.uniform(-10, 10))), colours


def _star(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    angles = np.arange(10) * np.pi / 5
    radii = np.where(np.arange(10) % 2 == 0, 1.0, rng.uniform(0.38, 0.5))
    points = np.stack([np.sin(angles) * radii, -np.cos(angles) * radii], 1) / 2 + 0.5
    return _polygon(size, _turned(points, rng.uniform(-36, 36))), _plain(size, rng)


def _kite(size: int, rng: np.random.Generator) -> tuple[Mask, NDArray[np.float32]]:
    waist, half = rng.uniform(0.28, 0.42), rng.uniform(0.3, 0.42)
    points = np.array([[0.5, 0], [0.5 + half, waist], [0.5, 1], [0.5 - half, waist]])
    points = _turned(points, rng.uniform(-20, 20))
    colours = _plain(size, rng)
    _strokes(colours, size, [(points[0], points[2]), (points[1], points[3])], 0.5)
    return _polygon(size, points), colours


PAINTERS: tuple[Painter, ...] = (_ball, _crate, _cone, _star, _ring, _kite)
