"""Make views of few photographs: mirrored, seen from farther away, and cut out from nearby.

A fit on few images adapts to what they happen to show. Views give its ranges and moments more images, as augmentation
does in training. A view is a mirrored photograph, or four photographs at half size side by side, or a part of a
photograph at up to twice its size.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.fit import draws

WANTED = 64  # images that a fit gets at least, with views of the photographs among them
EACH = 7  # most views of one photograph
CLOSEST = 0.5  # smallest share of a photograph's sides that fills a view


def wanted(photographs: int) -> int:
    """Return how many images there are in all, with the views added to so many photographs."""
    return max(photographs, min(WANTED, photographs * (1 + EACH)))


def view(photograph: Callable[[int], Tensor], count: int, index: int, seed: int) -> Tensor:
    """Return the view `index` (0, 1, ...) of `count` photographs.

    photograph: returns a photograph (3, h, w), uint8, by its index; the view has the same shape.
    """
    generator = draws.of_image(seed, index)
    own, kind = index % count, index // count % 3
    if kind == 0:
        return photograph(own).flip(2)
    if kind == 1:
        return _afar(photograph, count, own, generator)
    return _close(photograph(own), generator)


def _afar(photograph: Callable[[int], Tensor], count: int, own: int, generator: torch.Generator) -> Tensor:
    """Put a photograph and three drawn ones side by side, each at half its size, some of them mirrored."""
    others = torch.randint(count, (3,), generator=generator).tolist()
    rows, columns = ((n // 2, n - n // 2) for n in photograph(own).shape[1:])  # an odd side splits into two lengths
    sizes = list(product(rows, columns))
    parts = [
        _mirrored(_resized(photograph(number), size), generator)
        for number, size in zip((own, *others), sizes, strict=True)
    ]
    return torch.cat((torch.cat(parts[:2], 2), torch.cat(parts[2:], 2)), 1)


def _close(image: Tensor, generator: torch.Generator) -> Tensor:
    """Enlarge a part of a photograph, of random size and place, to the photograph's size; perhaps mirror it."""
    whole = image.shape[1], image.shape[2]
    share = CLOSEST + (1 - CLOSEST) * float(torch.rand(1, generator=generator))
    high, wide = (max(1, int(n * share)) for n in whole)
    top, left = (int(torch.randint(n, (), generator=generator)) for n in (whole[0] - high + 1, whole[1] - wide + 1))
    part = image[:, top : top + high, left : left + wide]
    return _mirrored(_resized(part, whole), generator)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize an image (3, h, w) with antialiasing, and round it to uint8."""
    scaled = F.interpolate(image[None].float(), size, mode="bilinear", align_corners=False, antialias=True)
    return scaled[0].round().clamp(0, 255).to(torch.uint8)


def _mirrored(image: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror an image with a chance of one half."""
    return image.flip(2) if torch.rand(1, generator=generator) < 0.5 else image
