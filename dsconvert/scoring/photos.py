"""Run models on image files, one image after another, for `detect` and `compare` as commands and in Python."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.base.size import SizeLike
from dsconvert.onnxfile.presets import Preset
from dsconvert.photos.dataset import evaluation_images, image_paths
from dsconvert.photos.images import Image, none_readable, read_image, spread
from dsconvert.scoring.candidates import Candidate, OtherOutput, load_candidates
from dsconvert.scoring.compare import Agreement, compare
from dsconvert.scoring.detect import DetectOptions, Found, find_masks
from dsconvert.scoring.masks import PlacedMask
from dsconvert.scoring.rawcompare import OutputDifference, are_raw, compare_outputs

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Skipped:
    """An image or video that could not be used, and the reason in one sentence."""

    path: Path | str
    reason: str


@dataclass(frozen=True)
class Compared:
    """Two models' agreement on the images that could be read.

    agreement: None if the outputs are not boxes; its images are in the order of `read`.
    outputs: for outputs that are not boxes, how far they differ.
    """

    first: Candidate
    second: Candidate
    agreement: Agreement | None
    read: list[Path]
    skipped: list[Skipped]
    outputs: Sequence[OutputDifference] = ()

    @property
    def names_differ(self) -> bool:
        """Whether both models name their classes, but differently; classes are then compared by number."""
        return bool(self.first.names and self.second.names and self.first.names != self.second.names)


def left_out(skipped: Sequence[Skipped], what: str = "images") -> str:
    """Return a warning about the images that were left out; there must be some."""
    return f"{len(skipped)} {what} were left out; the first: {skipped[0].reason}"


def photo_paths(sources: Iterable[Path]) -> list[Path]:
    """Return the images of all sources (image, folder or text file of paths) in order, without repeating a file."""
    return list({os.path.abspath(path): path for source in sources for path in image_paths(source)}.values())


def readable(
    paths: Sequence[Path], stage: str, skipped: list[Skipped], progress: Progress, some: bool = True
) -> Iterator[tuple[Path, Image]]:
    """Yield the images that can be decoded, RGB (h, w, 3), and add the others to `skipped`.

    progress: called for every image after it was used.
    some: whether to raise InputError at the end if there was no image.
    """
    for number, path in enumerate(paths, 1):
        try:
            image = read_image(path)
        except InputError as error:
            skipped.append(Skipped(path, str(error)))
        else:
            yield path, image
        progress(stage, number, len(paths))
    if some and len(skipped) == len(paths):
        raise none_readable([s.reason for s in skipped])


def detect_files(
    model: Candidate, paths: Sequence[Path], options: DetectOptions, skipped: list[Skipped], progress: Progress
) -> Iterator[tuple[Path, Image, Found, tuple[PlacedMask, ...] | None]]:
    """Yield what the model finds in every readable image, as `find_masks` returns it."""
    for path, image in readable(paths, "detect", skipped, progress):
        yield path, image, *find_masks(model.predict, image, model.imgsz, options)


def compare_files(
    first: Path, second: Path, source: Path, options: DetectOptions, imgsz: SizeLike | None, samples: int | None,
    progress: Progress, split: str | None = None, strict: bool = False, preset: Preset | None = None,
) -> Compared:  # fmt: skip
    """Compare two models on at most `samples` images of a folder, a text file of paths or a data.yaml.

    split: as for `dataset.evaluation_images`.

    Files whose outputs are not boxes are compared output by output. Raises InputError for models of different classes
    or sizes, or if neither finds anything.
    """
    paths = evaluation_images(source, split, strict)
    paths = paths if samples is None else spread(paths, samples)
    a, b = load_candidates([first, second], imgsz, preset)
    if a.nc and b.nc and a.nc != b.nc:
        raise InputError(f"{first} has {a.nc} classes, {second} has {b.nc}; they cannot be compared.")
    read: list[Path] = []
    skipped: list[Skipped] = []

    def images() -> Iterator[Image]:
        for path, image in readable(paths, "compare", skipped, progress):
            read.append(path)
            yield image

    # a file that suppresses boxes gives no lower scores than this
    least = max((c.limits.confidence for c in (a, b) if c.limits), default=0.0)
    try:
        return Compared(a, b, compare(a.predict, b.predict, images(), a.imgsz, options, least), read, skipped)
    except OtherOutput:
        if not are_raw(a, b):
            raise
    read.clear()
    skipped.clear()
    return Compared(a, b, None, read, skipped, compare_outputs(a, b, images()))
