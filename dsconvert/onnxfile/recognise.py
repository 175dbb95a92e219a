"""Recognise the operations of an ONNX graph by what they do to numbers, whatever way an exporter writes them.

An activation is a chain of elementwise operators with one source. The chain is computed at many points, and the result
is compared with all known activations. Nodes that only move numbers are run on numbers that tell where they come from.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from dsconvert.graph.activations import ACTIVATIONS
from dsconvert.onnxfile.source import Array

# operators that compute each number from the number in the same place
ELEMENTWISE = frozenset(
    ("Add", "Sub", "Mul", "Div", "Neg", "Abs", "Min", "Max", "Clip", "Relu", "LeakyRelu", "PRelu", "Elu", "Sigmoid",
     "HardSigmoid", "HardSwish", "Tanh", "Erf", "Exp", "Log", "Pow", "Sqrt", "Softplus", "Swish", "Mish", "Gelu",
     "QuickGelu", "Identity", "Where", "Reciprocal", "Selu", "Celu", "ThresholdedRelu")
)  # fmt: skip
# operators that move or repeat numbers, and change none
MOVING = frozenset(
    ("Reshape", "Transpose", "Slice", "Split", "Gather", "Squeeze", "Unsqueeze", "Flatten", "DepthToSpace",
     "SpaceToDepth", "Concat", "Identity", "Resize", "Upsample", "Dropout",
     "Pad")
)  # fmt: skip
POINTS = np.concatenate([np.linspace(-8, 8, 1601), [-60.0, -30.0, -12.0, 12.0, 30.0, 60.0]]).astype(np.float32)
CLOSE = 2e-5  # of the largest number: two float32 implementations of one function
MOST_TOP = 100
EXACT = 1 << 24  # float32 holds every integer below this exactly


@dataclass(frozen=True)
class Moved:
    """What moving did to a map (c, h, w).

    kind: "select" keeps the pixels; "upsample" repeats each pixel `scale` times along both sides; "space_to_depth"
        moves the four pixels of each 2 x 2 square into channels.
    channels: the chosen channels, in order.
    """

    kind: str  # "select", "upsample" or "space_to_depth"
    channels: tuple[int, ...]
    scale: int = 1


def points() -> Array:
    """Return the points (1, 1, 1, k) at which activations are compared."""
    return POINTS.reshape(1, 1, 1, -1)


def activation_named(values: Array) -> tuple[str, int] | None:
    """Return the activation that has these values at `points`, or None.

    The result is its kind and 0; or "ReLU" and its upper limit (0: none); or "same" and 0 for unchanged values.
    """
    x, y = POINTS, values.reshape(-1).astype(np.float32)
    if y.shape != x.shape or not np.isfinite(y).all():
        return None
    if _close(y, x):
        return "same", 0
    top = round(float(y.max()))
    for limit in (0, top):
        if 0 <= limit <= MOST_TOP and _close(y, np.clip(x, 0, limit or None)):
            return "ReLU", limit
    for kind, function in ACTIVATIONS.items():
        if _close(y, function(torch.from_numpy(x)).numpy()):
            return kind, 0
    return None


def _close(found: Array, wanted: Array) -> bool:
    return bool(np.abs(found - wanted).max() <= CLOSE * max(1.0, float(np.abs(wanted).max())))


def places(shape: tuple[int, ...]) -> Array | None:
    """Return images (n, ...) of that shape in which each number is its own index, in every image alike.

    Returns None if float32 cannot hold all indices.
    """
    count = int(np.prod(shape[1:]))
    if count >= EXACT:
        return None
    return np.tile(np.arange(count, dtype=np.float32), shape[0]).reshape(shape)


def moved(found: Array, shape: tuple[int, ...]) -> Moved | None:
    """Return what was done to a map (n, c, h, w) of that shape, found from what became of its `places`; None if
    unknown.

    An output of two dimensions (n, c) counts as a map of one pixel.
    """
    if found.ndim == 2:
        found = found[:, :, None, None]
    if found.ndim != 4 or found.size == 0 or len(found) != shape[0] or (found != found[:1]).any():
        return None
    _, c, h, w = shape
    at = np.rint(found[0]).astype(np.int64)
    high, wide = at.shape[1:]
    channels, inside = np.divmod(at[:, 0, 0], h * w)
    if (channels >= c).any():
        return None
    rows, columns = np.divmod(inside, w)

    def is_from(y: Array, x: Array) -> bool:
        wanted = channels[:, None, None] * (h * w) + y * w + x
        return wanted.shape == at.shape and bool((wanted == at).all())

    y, x = np.arange(high)[None, :, None], np.arange(wide)[None, None, :]
    chosen = tuple(int(n) for n in channels)
    if (high, wide) == (h, w) and is_from(y, x):
        return Moved("select", chosen)
    scale = high // h
    if scale > 1 and (high, wide) == (scale * h, scale * w) and is_from(y // scale, x // scale):
        return Moved("upsample", chosen, scale)
    halves = (high * 2, wide * 2) == (h, w)
    phases = halves and bool((rows < 2).all() and (columns < 2).all())
    if phases and is_from(2 * y + rows[:, None, None], 2 * x + columns[:, None, None]):
        # the order of `ops.space_to_depth`: the row's phase runs fastest
        order = (columns * 2 + rows) * c + channels
        return Moved("space_to_depth", tuple(int(n) for n in order))
    return None
