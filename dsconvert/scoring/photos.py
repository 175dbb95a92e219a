"""Models on image files, one image after the other: what `detect` and `compare` run, as commands and in Python."""

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
    """An image or a video that could not be used, and why, in one sentence."""

    path: Path | str
    reason: str


@dataclass(frozen=True)
class Compared:
    """Two models' agreement on the images that could be read; `agreement.images` is in the order of `read`. Of files
    whose outputs are no boxes, `outputs` says how far these are apart."""

    first: Candidate
    second: Candidate
    agreement: Agreement | None  # None where the outputs are no boxes: then they are compared themselves
    read: list[Path]
    skipped: list[Skipped]
    outputs: Sequence[OutputDifference] = ()

    @property
    def names_differ(self) -> bool:
        """True where both models name their classes, and not alike: numbers are compared then."""
        return bool(self.first.names and self.second.names and self.first.names != self.second.names)


def left_out(skipped: Sequence[Skipped], what: str = "images") -> str:
    """What to warn of, in one sentence; there must be some."""
    return f"{len(skipped)} {what} were left out; the first: {skipped[0].reason}"


def photo_paths(sources: Iterable[Path]) -> list[Path]:
    """Images of all sources (image, folder or text file of paths) in order; the same file twice is one."""
    return list({os.path.abspath(path): path for source in sources for path in image_paths(source)}.values())


def readable(
    paths: Sequence[Path], stage: str, skipped: list[Skipped], progress: Progress, some: bool = True
) -> Iterator[tuple[Path, Image]]:
    """The images that can be decoded, RGB (h, w, 3); the others are added to `skipped`. `progress` hears of every image
    when it is done with. With `some`, raises InputError at the end when there was none; `paths` holds at least one."""
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
    """What the model finds in every image that `readable` gives, as `find_masks` says it."""
    for path, image in readable(paths, "detect", skipped, progress):
        yield path, image, *find_masks(model.predict, image, model.imgsz, options)


def compare_files(
    first: Path, second: Path, source: Path, options: DetectOptions, imgsz: SizeLike | None, samples: int | None,
    progress: Progress, split: str | None = None, strict: bool = False, preset: Preset | None = None,
) -> Compared:  # fmt: skip
    """Two models on at most `samples` images of a folder, a text file of paths or a data.yaml (`split`, as
    `dataset.evaluation_images` has it).

    Files whose outputs are no boxes are compared output by output. Raises InputError for models of different classes or
    sizes, or where neither finds anything."""
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

    least = max((c.limits.confidence for c in (a, b) if c.limits), default=0.0)  # below it such a file says nothing
    try:
        return Compared(a, b, compare(a.predict, b.predict, images(), a.imgsz, options, least), read, skipped)
    except OtherOutput:
        if not are_raw(a, b):
            raise
    read.clear()
    skipped.clear()
    return Compared(a, b, None, read, skipped, compare_outputs(a, b, images()))
