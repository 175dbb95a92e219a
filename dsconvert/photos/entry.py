"""How the bytes of an image become the numbers that a network reads, and the grid that holds these numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from dsconvert.graph.grids import QParams


@dataclass(frozen=True)
class Entry:
    """Computes (byte / divisor - mean) / std for each channel."""

    divisor: float = 255.0  # 255 or 1, or what an ONNX file divides bytes by
    mean: tuple[float, ...] = (0.0,)  # one number, or one for each channel of the network's input
    std: tuple[float, ...] = (1.0,)  # as mean; above 0

    @property
    def is_normalised(self) -> bool:
        """Whether there is a mean or a deviation."""
        return any(self.mean) or any(value != 1 for value in self.std)

    def real(self, image: Tensor) -> Tensor:
        """Turn bytes (channels, h, w) into float32 (channels, h, w)."""
        made = image.float() / self.divisor
        if self.is_normalised:
            mean, std = (torch.tensor(numbers, device=made.device)[:, None, None] for numbers in (self.mean, self.std))
            made = (made - mean) / std
        return made

    @property
    def grid(self) -> QParams:
        """The grid of all numbers that bytes can become.

        Without mean and std it is exact, as each step is one byte.
        """
        count = max(len(self.mean), len(self.std))
        mean, std = (list(numbers) * (count // len(numbers)) for numbers in (self.mean, self.std))
        ends = [(byte / self.divisor - m) / s for m, s in zip(mean, std, strict=True) for byte in (0, 255)]
        return QParams.of_range(min(ends), max(ends))


UNIT = Entry()  # 0..1, as YOLOv5 reads images
