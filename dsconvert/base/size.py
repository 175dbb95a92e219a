"""Height and width of the images that a network takes, as one value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsconvert.base.errors import InputError, shown

_TEXT = re.compile(r"\s*([0-9]{1,9})(?:(?:\s*[xX,]\s*|\s+)([0-9]{1,9}))?\s*")


@dataclass(frozen=True, order=True)
class Size:
    """Height and width in pixels. As text it is `640` for a square, and `384x640` otherwise."""

    height: int
    width: int

    @staticmethod
    def of(given: SizeLike) -> Size:
        """Return the size for a number (a square) or a pair (height, width). Raises InputError for anything else."""
        if isinstance(given, Size):
            return given
        both = (given, given) if isinstance(given, int) else given
        if isinstance(both, (tuple, list)) and len(both) == 2 and all(type(n) is int and n > 0 for n in both):
            return Size(*both)
        raise InputError.naming("{imgsz} {} is neither a number of pixels nor a height and width.", shown(given))

    @staticmethod
    def perhaps(given: SizeLike | None) -> Size | None:
        """Return the size as `of` does, or None for None."""
        return None if given is None else Size.of(given)

    @staticmethod
    def read(text: str) -> Size:
        """Read `640`, `384x640`, `384,640` or `384 640`. Raises ValueError for other text."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(text)
        return Size(int(found[1]), int(found[2] or found[1]))

    @property
    def json(self) -> int | list[int]:
        """The size as files store it: one number for a square, else height and width."""
        return self.height if self.height == self.width else [self.height, self.width]

    @property
    def pair(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def image(self) -> tuple[int, int, int]:
        """Shape of an image with three channels."""
        return 3, self.height, self.width

    @property
    def pixels(self) -> int:
        """Number of pixels."""
        return self.height * self.width

    def over(self, stride: int) -> Size:
        """Return the size of a map with one cell for `stride` pixels each way."""
        return Size(self.height // stride, self.width // stride)

    def within(self, most: int) -> Size:
        """Return the size with no side longer than `most`."""
        return Size(min(self.height, most), min(self.width, most))

    def filling(self, sides: Sequence[object]) -> Size:
        """Return height and width from `sides`, with this size's own where they are open."""
        height, width = (n if isinstance(n, int) else own for n, own in zip(sides, self.pair, strict=True))
        return Size(height, width)

    def fits(self, stride: int, most: int | None = None) -> bool:
        """Return whether both sides are positive multiples of the stride, and at most `most`."""
        return all(n >= stride and not n % stride and (most is None or n <= most) for n in self.pair)

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


SizeLike = Size | int | Sequence[int]  # see `Size.of`
USUAL = Size(640, 640)  # the default
