"""What one layer sees of the calibration images, at positions drawn from each image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dsconvert.base.kept import Kept, Room
from dsconvert.fit import draws
from dsconvert.graph.grids import QParams

HALF_MAX = torch.finfo(torch.half).max


@dataclass(frozen=True)
class Seen:
    """One image as one convolution sees it."""

    input: Tensor  # (chi, h, w): the layer's input in the quantized network, integers on `grid`, or real without a grid
    float_output: Tensor  # (cho, p): the float network's output at p positions, any precision
    picks: Tensor  # (p,): indices of these positions among the h' w' of a channel
    weights: Tensor  # (p,) float32: the importance of each position
    grid: QParams | None = None

    @property
    def zero(self) -> int:
        """The input's value that stands for 0."""
        return self.grid.zero_point if self.grid else 0

    def real(self, values: Tensor) -> Tensor:
        """Convert values of the input's kind to real numbers, float32."""
        values = values.to(torch.float32, copy=True)
        return values.sub_(self.grid.zero_point).mul_(self.grid.scale) if self.grid else values


def seen_evenly(inputs: Tensor, outputs: Tensor, seed: int, first: int = 0) -> Iterator[Seen]:
    """Yield the images of a batch with every position equally important.

    inputs: (n, chi, h, w).
    outputs: (n, cho, h', w'), the float network's.
    first: index of the batch's first image in the calibration set.
    """
    even = torch.ones(outputs[0, 0].numel())
    for index, (q, y) in enumerate(zip(inputs, outputs, strict=True), first):
        picks, weights = draws.positions(even.double(), draws.of_image(seed, index))
        yield Seen(q, y.flatten(1)[:, picks.to(y.device)], picks, weights.float())


class Places(NamedTuple):
    """Positions drawn from an image and their weights: see `Seen`."""

    picks: Tensor
    weights: Tensor


class Drawn:
    """The positions drawn from each image for one convolution, and the float network's outputs there.

    room: keeps the outputs, in memory or on disk. The positions take 2 kB an image and stay in memory.
    count: number of this process's images.

    `even` is set once it is known that nothing depends on the layer. All positions then count the same.
    """

    def __init__(self, room: Room, count: int) -> None:
        self.room, self.count, self.even = room, count, False
        self.places: list[Places] = []
        self.kept: Kept | None = None

    def put(self, places: Places) -> None:
        """Add the positions drawn from the next image."""
        self.places.append(Places(places.picks.to(torch.int32), places.weights.float()))

    def put_outputs(self, index: int, outputs: Tensor) -> None:
        """Keep the float network's outputs (cho, p) at an image's positions, as half floats.

        index: of the image among this process's.
        """
        outputs = outputs.clamp(-HALF_MAX, HALF_MAX).half()
        if self.kept is None:
            self.kept = self.room.like(self.count, outputs)
        self.kept.put(index, outputs)

    def get(self, index: int) -> Places:
        """Return an image's positions (int64) and weights."""
        picks, weights = self.places[index]
        return Places(picks.long(), torch.ones_like(weights) if self.even else weights)

    def outputs(self, index: int) -> Tensor:
        """Return an image's outputs (cho, p), half floats."""
        assert self.kept is not None
        return self.kept.get(index)

    def total(self) -> float:
        """Return the sum of all weights."""
        return sum(float(weights.sum()) for _, weights in self.places)


def check_drawn(drawn: Drawn, images: int, count: int, most: int) -> None:
    """Raise ValueError unless positions read from a file are valid.

    images: how many images there must be.
    count: positions of the layer's output, from which they were drawn.
    most: most positions drawn from an image.
    """
    if len(drawn.places) != images:
        raise ValueError("images of positions")
    for picks, weights in drawn.places:
        if picks.shape != (min(count, most),) or weights.shape != picks.shape:
            raise ValueError("shapes of positions")
        if picks.dtype != torch.int32 or int(picks.min()) < 0 or int(picks.max()) >= count:
            raise ValueError("places of positions")
        if weights.dtype != torch.float32 or not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0:
            raise ValueError("weights of positions")
