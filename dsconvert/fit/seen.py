"""What a layer sees during calibration, image by image, at positions drawn from each."""

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
    """One image at one convolution."""

    input: Tensor  # (chi, h, w): what the layer gets in the quantized network, integers on a grid or, without one, real
    float_output: Tensor  # (cho, p): what it makes in the float network at p output positions, any precision
    picks: Tensor  # (p,): their places among the h' w' of a channel
    weights: Tensor  # (p,) float32: how much each of them matters
    grid: QParams | None = None

    @property
    def zero(self) -> int:
        """What stands for 0 in the input."""
        return self.grid.zero_point if self.grid else 0

    def real(self, values: Tensor) -> Tensor:
        """Real values, float32, of any of the input's."""
        values = values.to(torch.float32, copy=True)
        return values.sub_(self.grid.zero_point).mul_(self.grid.scale) if self.grid else values


def seen_evenly(inputs: Tensor, outputs: Tensor, seed: int, first: int = 0) -> Iterator[Seen]:
    """Images of a batch, (n, chi, h, w) and (n, cho, h', w'), every position counting the same. `first`: the place of
    the first of them in the calibration set."""
    even = torch.ones(outputs[0, 0].numel())
    for index, (q, y) in enumerate(zip(inputs, outputs, strict=True), first):
        picks, weights = draws.positions(even.double(), draws.of_image(seed, index))
        yield Seen(q, y.flatten(1)[:, picks.to(y.device)], picks, weights.float())


class Places(NamedTuple):
    """Positions drawn from an image: see `Seen`."""

    picks: Tensor
    weights: Tensor


class Drawn:
    """The positions drawn from every image of this process for one convolution, and the float network's outputs there.

    Kept for `count` images; `even` once it is known that nothing depends on the layer: all positions then count the
    same. Positions are kept in memory, 2 kB an image, outputs where there is room."""

    def __init__(self, room: Room, count: int) -> None:
        self.room, self.count, self.even = room, count, False
        self.places: list[Places] = []
        self.kept: Kept | None = None

    def put(self, places: Places) -> None:
        """What was drawn from the next image."""
        self.places.append(Places(places.picks.to(torch.int32), places.weights.float()))

    def put_outputs(self, index: int, outputs: Tensor) -> None:
        """The float network's outputs (cho, p) there, in the image at `index` among this process's."""
        outputs = outputs.clamp(-HALF_MAX, HALF_MAX).half()
        if self.kept is None:
            self.kept = self.room.like(self.count, outputs)
        self.kept.put(index, outputs)

    def get(self, index: int) -> Places:
        """Picks, int64, and weights of an image."""
        picks, weights = self.places[index]
        return Places(picks.long(), torch.ones_like(weights) if self.even else weights)

    def outputs(self, index: int) -> Tensor:
        """Outputs (cho, p) of an image, half."""
        assert self.kept is not None
        return self.kept.get(index)

    def total(self) -> float:
        """The sum of all weights."""
        return sum(float(weights.sum()) for _, weights in self.places)


def check_drawn(drawn: Drawn, images: int, count: int, most: int) -> None:
    """Raises ValueError unless positions from a file can be drawn of so many in each image, at most `most`."""
    if len(drawn.places) != images:
        raise ValueError("images of positions")
    for picks, weights in drawn.places:
        if picks.shape != (min(count, most),) or weights.shape != picks.shape:
            raise ValueError("shapes of positions")
        if picks.dtype != torch.int32 or int(picks.min()) < 0 or int(picks.max()) >= count:
            raise ValueError("places of positions")
        if weights.dtype != torch.float32 or not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0:
            raise ValueError("weights of positions")
