"""Labelled training images, and the batches that an epoch is made of.

A batch depends only on the seed, the epoch and its number, not on the process that makes it.
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

# bytes of scaled images that the processes of one machine keep in memory; with more, files are read every time
ROOM = 2 << 30


@dataclass(frozen=True)
class Photos:
    """Training images, scaled to fit `size`, and their labels.

    paths: the files.
    kept: the scaled images, or None if they are read from the files each time.
    labels: (n, 5) for each image, as `read_labels` returns them.
    skipped: why other files could not be read.
    """

    paths: tuple[Path, ...]
    kept: tuple[Image, ...] | None
    labels: tuple[Labels, ...]
    size: Size
    skipped: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def photo(self, index: int) -> Photo:
        """Return an image, scaled to fit, and its boxes in pixels."""
        image = fitted(self.paths[index], self.size) if self.kept is None else self.kept[index]
        return image, in_pixels(self.labels[index], *image.shape[:2])

    def batch(self, picks: Sequence[tuple[int, int]], how: Augment, seed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return a batch (n, 3, h, w), 0..1, and its targets (t, 6) as the loss takes them.

        picks: (place in the epoch, index) of each image.
        how: the augmentation.
        seed: of this epoch.
        """
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
    """Read every image and its labels once. Images with unusable labels are left out (see `read_labelled`).

    Raises InputError when no image can be read, or no image has an object.
    """
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
    """Read an image and scale it to fit, as `letterbox` does. Raises InputError as `read_image` does."""
    image = read_image(path)
    return scaled(image, gain_to_fit(image, size))


def order(count: int, batch: int, seed: Sequence[int]) -> list[list[tuple[int, int]]]:
    """Return an epoch's batches, each a list of (place in the epoch, image), in random order.

    Images beyond the last whole batch are left out of this epoch, unless there is no whole batch.
    """
    mixed = np.random.default_rng(list(seed)).permutation(count).tolist()
    placed = list(enumerate(mixed))
    whole = max(1, count // batch)
    return [placed[i * batch : (i + 1) * batch] for i in range(whole)]
