"""Views of few photographs: what the same objects look like mirrored, from afar and close by.

A fit on few images trusts what they happen to show. Its ranges and moments get as many images as it wants from views
of them, as in training: mirrored, four photographs at half their size side by side, and a part at up to twice its size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.fit import draws

WANTED = 64  # images; fewer photographs are made up for by views of them
EACH = 7  # views of a photograph at most
CLOSEST = 0.5  # of a photograph's sides, the smallest part that fills an image


def wanted(photographs: int) -> int:
    """How many images, views among them, there are to be of so many photographs."""
    return max(photographs, min(WANTED, photographs * (1 + EACH)))


def view(photograph: Callable[[int], Tensor], count: int, index: int, seed: int) -> Tensor:
    """The view at `index` (0, 1, ...) of `count` photographs (3, h, w) uint8, by number: of the same form."""
    generator = draws.of_image(seed, index)
    own, kind = index % count, index // count % 3
    if kind == 0:
        return photograph(own).flip(2)
    if kind == 1:
        return _afar(photograph, count, own, generator)
    return _close(photograph(own), generator)


def _afar(photograph: Callable[[int], Tensor], count: int, own: int, generator: torch.Generator) -> Tensor:
    """One photograph and three others that are drawn, each at half its size, some of them mirrored."""
    others = torch.randint(count, (3,), generator=generator).tolist()
    rows, columns = ((n // 2, n - n // 2) for n in photograph(own).shape[1:])  # of an odd side two lengths
    sizes = list(product(rows, columns))
    parts = [
        _mirrored(_resized(photograph(number), size), generator)
        for number, size in zip((own, *others), sizes, strict=True)
    ]
    return torch.cat((torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)), 1)


def _close(image: Tensor, generator: torch.Generator) -> Tensor:
    """A part of a photograph, of a drawn size at a drawn place, as large as the photograph; perhaps mirrored."""
    whole = image.shape[1], image.shape[2]
    share = CLOSEST + (1 - CLOSEST) * float(torch.rand(1, generator=generator))
    high, wide = (max(1, int(n * share)) for n in whole)
    top, left = (int(torch.randint(n, (), generator=generator)) for n in (whole[0] - high + 1, whole[1] - wide + 1))
    part = image[:, top : top + high, left : left + wide]
    return _mirrored(_resized(part, whole), generator)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    scaled = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)


def _mirrored(image: Tensor, generator: torch.Generator) -> Tensor:
    """Half of the time mirrored."""
    return image.flip(2) if torch.rand(1, generator=generator) < 0.5 else image
