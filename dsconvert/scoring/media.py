"""Run a model on images, videos and live sources, one after another, and record the results, for `detect`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dsconvert.base.errors import InputError, Unusable
from dsconvert.photos.images import Image
from dsconvert.scoring.candidates import Candidate
from dsconvert.scoring.detect import DetectOptions, Found, coco_document, counts, find_masks
from dsconvert.scoring.photos import Progress, Skipped, readable
from dsconvert.scoring.saving import Job, Masks, Saver
from dsconvert.scoring.video import MISSING, opened


@dataclass(frozen=True)
class Looked:
    """A source that is finished: objects by class and, for a video, the number of frames looked at."""

    job: Job
    by_class: dict[int, int]
    frames: int | None = None

    @property
    def objects(self) -> int:
        """Number of objects found."""
        return sum(self.by_class.values())


@dataclass
class Gathered:
    """What goes into a COCO document: names of pictures, their shapes, objects, and outlines of masks.

    Objects are kept as bytes. A small array kept for every image would lie between the freed large arrays, and 40 kB
    for each image could not be used again; Python allocates bytes elsewhere.
    """

    names: list[str] = field(default_factory=list)
    shapes: list[tuple[int, int]] = field(default_factory=list)
    packed: list[bytes] = field(default_factory=list)
    outlines: list[list[list[float]]] = field(default_factory=list)

    def add(self, name: str, image: Image, found: Found, masks: Masks) -> None:
        """Add a picture."""
        self.names.append(name)
        self.shapes.append(image.shape[:2])
        self.packed.append(found.tobytes())
        if masks is not None:
            self.outlines.append([mask.polygon().flatten().tolist() for mask in masks])

    def document(self, names: Sequence[str]) -> dict[str, Any]:
        """Return the COCO document; `names` are the class names."""
        found = [np.frombuffer(p, np.float32).reshape(-1, 6) for p in self.packed]
        return coco_document(self.names, self.shapes, found, names, self.outlines)


@dataclass
class Run:
    """A model at work.

    saver: writes the findings.
    gathered: collects them for a COCO document; None: no document.
    looked: sources that are finished.
    skipped: sources that were left out.
    remarks: what was only partly readable.
    """

    model: Candidate
    options: DetectOptions
    saver: Saver
    progress: Progress
    gathered: Gathered | None = None
    looked: list[Looked] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def through(self, jobs: Sequence[Job], stride: int) -> None:
        """Look at all sources. Raises InputError when none could be used."""
        self.images([job for job in jobs if not job.is_video])
        self.videos([job for job in jobs if job.is_video], stride)
        if not self.looked:
            what = "images" if not any(job.is_video for job in jobs) else "images and videos"
            raise InputError(f"None of the {len(jobs)} {what} could be used; the first: {self.skipped[0].reason}")

    def images(self, jobs: Sequence[Job]) -> None:
        """Look at images. An image that cannot be read, or whose results cannot be written, is left out."""
        by_path = {job.source: job for job in jobs if isinstance(job.source, Path)}
        for path, image in readable(list(by_path), "detect", self.skipped, self.progress, some=False):
            found, masks = find_masks(self.model.predict, image, self.model.imgsz, self.options)
            job = by_path[path]
            with self._leaving_out(job):
                self.saver.image(job, image, found, masks)
                self._note(job.name, image, found, masks)
                self.looked.append(Looked(job, counts([found])))

    def videos(self, jobs: Sequence[Job], stride: int) -> None:
        """Look at videos, at the last of every `stride` frames. A live one goes on until Ctrl-C."""
        for job in jobs:
            with self._leaving_out(job):
                self._video(job, stride)

    def _video(self, job: Job, stride: int) -> None:
        by_class: dict[int, int] = {}
        number = 0
        with opened(job.source, stride) as clip, self.saver.video(job, clip.fps) as save:
            try:
                for image in clip.frames:
                    found, masks = find_masks(self.model.predict, image, self.model.imgsz, self.options)
                    save(number + 1, image, found, masks)
                    number += 1
                    self._note(f"{job.crop.as_posix()}_{number}.jpg", image, found, masks)
                    for kind, objects in counts([found]).items():
                        by_class[kind] = by_class.get(kind, 0) + objects
                    self.progress("video", number, max(clip.count, number + 1))
            except KeyboardInterrupt:
                if isinstance(job.source, Path) or not number:
                    raise
                self.remarks.append(f"Stopped after {number} frames.")
            if not number:
                raise Unusable(f"{job.name} holds no frame that can be read.")
        if number < (1 - MISSING) * clip.count:
            self.remarks.append(f"{job.source} says it has {clip.count} frames; {number} could be read.")
        self.looked.append(Looked(job, by_class, number))

    @contextmanager
    def _leaving_out(self, job: Job) -> Iterator[None]:
        try:
            yield
        except Unusable as error:
            self.skipped.append(Skipped(job.source, str(error)))

    def _note(self, name: str, image: Image, found: Found, masks: Masks) -> None:
        if self.gathered is not None:
            self.gathered.add(name, image, found, masks)
