"""Height and width of the images that a network takes, as one value."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dsconvert.base.errors import InputError, shown

_TEXT = re.compile(r"\s*([0-9]{1,9})(?:(?:\s*[xX,]\s*|\s+)([0-9]{1,9}))?\s*")


@dataclass(frozen=True, order=True)
class Size:
    """Pixels of a rectangle. As a text it is `640` where it is a square, else height and width: `384x640`."""

    height: int
    width: int

    @staticmethod
    def of(given: SizeLike) -> Size:
        """A number stands for a square, a pair for height and width. Raises InputError for anything else."""
        if isinstance(given, Size):
            return given
        both = (given, given) if isinstance(given, int) else given
        if isinstance(both, (tuple, list)) and len(both) == 2 and all(type(n) is int and n > 0 for n in both):
            return Size(*both)
        raise InputError.naming(
            "{imgsz} {} is not a whole number of pixels from 1, nor height and width.", shown(given)
        )

    @staticmethod
    def perhaps(given: SizeLike | None) -> Size | None:
        """The same, or None where none is given."""
        return None if given is None else Size.of(given)

    @staticmethod
    def read(text: str) -> Size:
        """From `640`, `384x640`, `384,640` or `384 640`. Raises ValueError for other texts."""
        found = _TEXT.fullmatch(text)
        if found is None:
            raise ValueError(text)
        return Size(int(found[1]), int(found[2] or found[1]))

    @property
    def json(self) -> int | list[int]:
        """As files have it: one number of a square, else height and width."""
        return self.height if self.height == self.width else [self.height, self.width]

    @property
    def pair(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def image(self) -> tuple[int, int, int]:
        """The shape of an image of three channels."""
        return 3, self.height, self.width

    @property
    def pixels(self) -> int:
        """How many there are."""
        return self.height * self.width

    def over(self, stride: int) -> Size:
        """That of a map, one cell for so many pixels each way."""
        return Size(self.height // stride, self.width // stride)

    def within(self, most: int) -> Size:
        """The same, but neither side longer than that."""
        return Size(min(self.height, most), min(self.width, most))

    def filling(self, sides: Sequence[object]) -> Size:
        """Height and width `sides`, and this size's own where they are no numbers, but open."""
        height, width = (n if isinstance(n, int) else own for n, own in zip(sides, self.pair, strict=True))
        return Size(height, width)

    def fits(self, stride: int, most: int | None = None) -> bool:
        """Whether both sides are multiples of the stride, 0 is none, and at most so long."""
        return all(n >= stride and not n % stride and (most is None or n <= most) for n in self.pair)

    def __str__(self) -> str:
        return str(self.height) if self.height == self.width else f"{self.height}x{self.width}"


SizeLike = Size | int | Sequence[int]  # see `Size.of`
USUAL = Size(640, 640)  # where nothing tells
