"""Write what `detect` finds: drawn images and videos, label files, crops."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path, PurePath

from dsconvert.base.errors import InputError
from dsconvert.base.files import NameRefused, check_target, write_atomic
from dsconvert.photos.images import Image
from dsconvert.scoring.detect import (
    Found,
    class_name,
    draw,
    encoded,
    label_names,
    names_below,
    picture_name,
    yolo_lines,
)
from dsconvert.scoring.masks import PlacedMask
from dsconvert.scoring.sources import Sources
from dsconvert.scoring.video import film, live_stem

LABELS, CROPS = "labels", "crops"
CROP_GAIN, CROP_PAD = 1.02, 10  # YOLOv5's margin around a box, as a factor and in pixels
FOLDER_LENGTH = 60  # characters of a class's folder name
Masks = Sequence[PlacedMask] | None


@dataclass(frozen=True)
class SaveOptions:
    """Which files are written, and how boxes are drawn."""

    pictures: bool = True
    labels: bool = False
    label_scores: bool = False
    crops: bool = False
    thickness: int = 3
    shown_names: bool = True
    shown_scores: bool = True

    @property
    def anything(self) -> bool:
        """Whether any file is written."""
        return self.pictures or self.labels or self.crops


@dataclass(frozen=True)
class Job:
    """A source and the files that are written for it.

    name: of the source among the others.
    picture: the drawn image or video.
    label: the label file; for a video, the beginning of its frames' label files.
    crop: the first crop's name in its class's folder; for a video, the beginning of its frames' names.
    """

    source: Path | str
    name: str
    picture: Path | None
    label: Path | None
    crop: PurePath
    is_video: bool = False

    def frame_label(self, number: int) -> Path | None:
        """Return a frame's label file, named as by YOLOv5: `clip_1.txt` is the first frame's."""
        return self.label and self.label.with_name(f"{self.label.name}_{number}.txt")


def jobs_of(sources: Sources, folder: Path, options: SaveOptions) -> list[Job]:
    """Return a job for each source, images first; no two jobs write the same file."""
    files = [*sources.images, *sources.videos]
    names = names_below(files) if files else []
    images, videos = names[: len(sources.images)], names[len(sources.images) :]
    given: list[Path | str] = [*files]
    if sources.live is not None:
        given, videos = [sources.live], [PurePath(live_stem(sources.live) + ".mp4")]
    labels = label_names(images)
    pictures = [picture_name(n) for n in images] + _apart(videos, ".mp4", set())
    stems = [n.with_suffix("") for n in labels] + _apart(videos, "", {_without_number(n) for n in labels})
    return [
        Job(
            source, name.as_posix(),
            folder / picture if options.pictures else None,
            folder / LABELS / (stem if index >= len(images) else labels[index]) if options.labels else None,
            stem, index >= len(images),
        )
        for index, (source, name, picture, stem) in enumerate(
            zip(given, [*images, *videos], pictures, stems, strict=True)
        )
    ]  # fmt: skip


def _apart(names: Sequence[PurePath], suffix: str, taken: set[PurePath]) -> list[PurePath]:
    """Return `a/b` and the suffix for `a/b.avi`; if that is taken, the old suffix stays: `a/b.mov.mp4`."""
    made = []
    for name in names:
        wanted, number = name.with_name(name.stem + suffix), 0
        while wanted in taken:
            number += 1
            wanted = name.with_name(f"{name.name}{number if number > 1 else ''}{suffix}")
        taken.add(wanted)
        made.append(wanted)
    return made


def _without_number(label: PurePath) -> PurePath:
    """Return the video whose frame a label file with this name would belong to."""
    return label.with_name(re.sub(r"_\d+$", "", label.stem))


def check_jobs(jobs: Sequence[Job], document: Path | None, folder: Path, options: SaveOptions, force: bool) -> None:
    """Raise InputError, before any work is done, for files that exist or may not be written.

    A name that is too long is left to its own source.
    """
    films = {j.label for j in jobs if j.is_video and j.label}
    for label_folder in {label.parent for label in films} if not force else ():
        for there in sorted(label_folder.glob("*_*.txt")):
            if Path(_without_number(there)) in films:
                check_target(there, force)
    if options.crops and not force and any((folder / CROPS).glob("*/*")):
        raise InputError.naming(
            "{} already holds crops; give {force=True} to replace them, or another {name}.", folder / CROPS
        )
    for target in [t for j in jobs for t in (j.picture, None if j.is_video else j.label)] + [document]:
        try:
            if target is not None:
                check_target(target, force)
        except NameRefused:
            pass


class Saver:
    """Writes what is found, as `options` say."""

    def __init__(self, folder: Path, options: SaveOptions, names: Sequence[str], force: bool) -> None:
        self.folder, self.options, self.names, self.force = folder, options, names, force
        self.folders = _class_folders(names) if options.crops else {}
        self.crops: dict[PurePath, int] = {}

    def image(self, job: Job, image: Image, found: Found, masks: Masks) -> None:
        """Write all files of an image. Raises InputError as `write_atomic` does, about one file or about all."""
        for target in (job.picture, job.label):
            if target is not None:
                check_target(target, self.force)  # checks all targets before the first is written
        if job.picture:
            data = encoded(self._drawn(image, found, masks), job.picture.suffix)
            write_atomic(job.picture, data, self.force)
        self._others(job, job.label, image, found, masks)

    @contextmanager
    def video(self, job: Job, fps: float) -> Iterator[Callable[[int, Image, Found, Masks], None]]:
        """Yield a function that adds a frame with its number from 1; the video is in place at the end of the block."""
        with film(job.picture, self.force, fps) if job.picture else nullcontext() as add:

            def frame(number: int, image: Image, found: Found, masks: Masks) -> None:
                if add:
                    add(self._drawn(image, found, masks))
                self._others(job, job.frame_label(number), image, found, masks)

            yield frame

    def _drawn(self, image: Image, found: Found, masks: Masks) -> Image:
        o = self.options
        return draw(image, found, self.names, o.thickness, o.shown_names, o.shown_scores, masks)

    def _others(self, job: Job, label: Path | None, image: Image, found: Found, masks: Masks) -> None:
        if label:
            text = yolo_lines(found, image.shape[:2], self.options.label_scores, masks)
            write_atomic(label, text.encode(), self.force)
        if self.options.crops:
            for *corners, _, kind in found.tolist():
                folder = self.folders.setdefault(int(kind), class_name(int(kind), ()))
                write_atomic(self._crop_file(folder, job.crop), encoded(crop(image, corners), ".jpg"), self.force)

    def _crop_file(self, folder: str, stem: PurePath) -> Path:
        """Return `crops/dog/a.jpg`, then `a2.jpg`, `a3.jpg`, ..., counted as YOLOv5 does over the files of this run."""
        first = PurePath(folder, stem)
        number = self.crops.get(first, 0) + 1
        while (name := first if number == 1 else first.with_name(f"{first.name}{number}")) in self.crops:
            number += 1
        self.crops[first] = number
        self.crops.setdefault(name, 1)
        return self.folder / CROPS / name.with_name(f"{name.name}.jpg")


def crop(image: Image, corners: Sequence[float]) -> Image:
    """Return the part of an image with the box x1, y1, x2, y2 and a margin, as YOLOv5 cuts it."""
    h, w = image.shape[:2]
    spans = []
    for low, high, most in ((corners[0], corners[2], w), (corners[1], corners[3], h)):
        centre, half = (low + high) / 2, ((high - low) * CROP_GAIN + CROP_PAD) / 2
        spans.append(slice(int(max(0.0, centre - half)), int(min(most, centre + half))))
    part: Image = image[spans[1], spans[0]]
    return part


def _class_folders(names: Sequence[str]) -> dict[int, str]:
    """Return a folder name for each class: its name without characters that lead elsewhere or that some disks
    refuse.
    """
    made: dict[int, str] = {}
    taken: set[str] = set()
    for number in range(len(names)):
        text = re.sub(r"[^\w .()+-]", "_", names[number])[:FOLDER_LENGTH].strip(" .") or class_name(number, ())
        while text.casefold() in taken:  # some disks ignore case
            text = f"{text}_{number}"
        taken.add(text.casefold())
        made[number] = text
    return made
