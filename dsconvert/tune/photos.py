"""Labelled training images, and the batches that an epoch makes of them.

What a batch holds follows from the seed, the epoch and its number alone, whichever process makes it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.photos.images import Image, gain_to_fit, none_readable, read_image, scaled, to_tensor
from dsconvert.photos.labels import LabelRules, Labels, in_pixels, read_labelled
from dsconvert.tune.augment import Augment, Photo, augmented

ROOM = 2 << 30  # bytes of scaled images that the processes of one machine keep; beyond, files are read every time


@dataclass(frozen=True)
class Photos:
    """Images scaled to fit `size`, in memory or read when they are asked for; labels (n, 5) as `read_labels` has them;
    and why other files could not be read."""

    paths: tuple[Path, ...]
    kept: tuple[Image, ...] | None
    labels: tuple[Labels, ...]
    size: Size
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def photo(self, index: int) -> Photo:
        """An image as large as fits, and its boxes in pixels."""
        image = fitted(self.paths[index], self.size) if self.kept is None else self.kept[index]
        return image, in_pixels(self.labels[index], *image.shape[:2])

    def batch(self, picks: Sequence[tuple[int, int]], how: Augment, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images by (place in the epoch, index) -> batch (n, 3, h, w), 0..1, and targets (t, 6) as the loss
        takes them."""
        images, targets = [], []
        across = np.array([self.size.width, self.size.height])
        for number, (place, index) in enumerate(picks):
            rng = np.random.default_rng([*seed, place])
            chosen = [index]
            if rng.random() < how.mosaic:
                chosen += rng.integers(0, len(self), 3).tolist()
            image, boxes = augmented([self.photo(i) for i in chosen], self.size, how, rng)
            images.append(image)
            low, high = boxes[:, 1:3] / across, boxes[:, 3:] / across
            first = np.full((len(boxes), 1), float(number))
            targets.append(np.concatenate((first, boxes[:, :1], (low + high) / 2, high - low), 1))
        return to_tensor(images), torch.from_numpy(np.concatenate(targets)).float()


def open_photos(
    paths: Sequence[Path],
    rules: LabelRules,
    size: Size,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Photos:
    """Read every image and its labels once; those with labels that cannot be used are left out, see `read_labelled`.
    Raises InputError when there is no image that can be read, or no object in any."""
    labelled = read_labelled(paths, rules)
    found, kept, labels, skipped = [], [], [], []
    room = ROOM // workers.here()
    for done, (path, label) in enumerate(zip(labelled.paths, labelled.labels, strict=True), 1):
        try:
            image = fitted(path, size)
        except InputError as error:
            skipped.append(str(error))
        else:
            found.append(path)
            labels.append(label.boxes)
            room -= image.nbytes
            if room >= 0:
                kept.append(image)
            else:
                kept.clear()
        progress(done, len(labelled.paths))
    if not found:
        raise none_readable(skipped, "training images")
    if not sum(map(len, labels)):
        raise InputError("The training images have no labels: there is nothing to learn from.")
    return Photos(tuple(found), tuple(kept) if room >= 0 else None, tuple(labels), size, tuple(skipped))


def fitted(path: Path, size: Size) -> Image:
    """The image at `path` as large as fits, as `letterbox` scales it. Raises InputError as `read_image` does."""
    image = read_image(path)
    return scaled(image, gain_to_fit(image, size))


def order(count: int, batch: int, seed: Sequence[int]) -> list[list[tuple[int, int]]]:
    """An epoch's batches: (place in the epoch, image) in random order. What fills no whole batch waits for another
    epoch, unless there is no whole one."""
    mixed = np.random.default_rng(list(seed)).permutation(count).tolist()
    placed = list(enumerate(mixed))
    whole = max(1, count // batch)
    return [placed[i * batch : (i + 1) * batch] for i in range(whole)]
