"""Measure several models against each other: load them, find the images, compute accuracy and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.base.size import SizeLike
from dsconvert.measure.calibration import Progress
from dsconvert.onnxfile.presets import Preset
from dsconvert.photos.dataset import images_of
from dsconvert.photos.images import spread
from dsconvert.photos.labels import Labelled, label_path, read_labelled
from dsconvert.scoring.accuracy import CONFIDENT, Detections, Predictor, detect_all
from dsconvert.scoring.candidates import Candidate, load_candidates
from dsconvert.scoring.coco import Metrics
from dsconvert.scoring.latency import Latency, interleaved_latency
from dsconvert.scoring.masks import MaskPredictor
from dsconvert.yolo.boxes import LEAST
from dsconvert.yolo.classes import label_rules, other_order


@dataclass(frozen=True)
class Evaluated:
    """One model's accuracy and latency, on the same images as the others.

    metrics: None where there is nothing to measure: without labels, if the first model finds nothing.
    images: measured on.
    skipped: why other images could not be read.
    split: of the data.yaml.
    """

    candidate: Candidate
    metrics: Metrics | None
    latency: Latency
    images: int
    skipped: tuple[str, ...]
    split: str | None = None


@dataclass(frozen=True)
class Entrants:
    """Models at one image size, and the images on which they are measured.

    nc: number of classes.
    labelled: whether the truth is the labels; otherwise it is what the first model finds with confidence.
    split: of the data.yaml.
    confidence, overlap: as for `detect_all`.
    """

    candidates: Sequence[Candidate]
    paths: Sequence[Path]
    nc: int
    labelled: bool
    labels: Labelled | None = None
    split: str | None = None
    confidence: float = LEAST
    overlap: float | None = None


def entrants(
    models: Sequence[Path],
    data: Path,
    imgsz: SizeLike | None = None,
    samples: int | None = None,
    split: str | None = None,
    strict: bool = False,
    confidence: float = LEAST,
    overlap: float | None = None,
    preset: Preset | None = None,
) -> Entrants:
    """Load models, and find the images of a folder or of a split of a data.yaml.

    data: the folder or data.yaml.
    samples: most images; None: all.
    split: None: val, or else test, or else train.
    strict: whether labels and lists with unusable parts are refused.
    confidence, overlap: as for `detect_all`.
    preset: as for `load_candidates`.

    Raises InputError when a model's classes differ from the data's, or from the first model's.
    """
    given = images_of(data, ("val", "test", "train"), split, strict)
    described, paths = given.described, given.paths if samples is None else spread(given.paths, samples)
    candidates = load_candidates(models, imgsz, preset)
    first = next((c for c in candidates if c.nc), candidates[0])
    whose, nc = (str(data), len(described.names)) if described else (str(first.path), first.nc)
    if not nc:
        raise InputError.naming(
            "{} does not say how many classes it finds; give {data} a data.yaml, which does.", first.path
        )
    for c in candidates:
        if c.nc and c.nc != nc:
            way = "give {data} a folder of images to measure agreement with the first model without labels"
            way = way if described else "models of different classes cannot be compared"
            raise InputError.naming(f"{{}} has {{}} classes, {{}} has {{}}; {way}.", c.path, c.nc, whose, nc)
    named = [c for c in candidates if c.names]
    for c in named:
        if other_order(named[0].names, c.names):
            raise InputError(
                f"{c.path} names its classes in another order than {named[0].path}, so they cannot be compared."
            )
    if described is None:
        return Entrants(candidates, paths, nc, False, confidence=confidence, overlap=overlap)
    names, of = (named[0].names, str(named[0].path)) if named else ((), "")
    masks = any(isinstance(c.predict, MaskPredictor) for c in candidates)
    labels = read_labelled(paths, label_rules(described, names, of, strict), masks)
    if not labels.files:
        raise InputError.naming(
            "None of the {} images of {} has labels; the first one's should be at {}; give {data} a folder of images "
            "to measure agreement without labels.", len(paths), data, label_path(paths[0])
        )  # fmt: skip
    return Entrants(candidates, labels.paths, nc, True, labels, given.split, confidence, overlap)


def evaluate(
    models: Sequence[Path],
    data: Path,
    imgsz: SizeLike | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
    split: str | None = None,
    strict: bool = False,
    confidence: float = LEAST,
    overlap: float | None = None,
    preset: Preset | None = None,
) -> list[Evaluated]:
    """Measure the latency of models on images of `data` (see `entrants`), and their accuracy if there is an object to
    find.
    """
    given = entrants(models, data, imgsz, samples, split, strict, confidence, overlap, preset)
    found = look(given, progress)
    there = given.labelled or found.measurable  # if labels were promised but are missing, `metrics` raises an error
    metrics: Sequence[Metrics | None] = found.metrics() if there else [None] * len(given.candidates)
    latencies = interleaved_latency([c.run_once for c in given.candidates])
    return [
        Evaluated(c, m, t, len(found.shapes), found.skipped, given.split)
        for c, m, t in zip(given.candidates, metrics, latencies, strict=True)
    ]


def nothing_found(first: Path | str, confidence: float = LEAST) -> str:
    """Return a sentence that says why there is no accuracy."""
    return (
        f"{first} finds nothing above a score of {max(CONFIDENT, confidence):g} in these images, so there is no "
        "agreement to measure; give images of what it was trained on, or labels."
    )


def look(
    given: Entrants, progress: Progress | None = None, predictors: Sequence[Predictor] | None = None
) -> Detections:
    """Run the models, or `predictors` instead, on the images; under torchrun every process runs a part of them."""
    report = progress or (lambda stage, done, total: None)
    return detect_all(
        predictors or [c.predict for c in given.candidates], given.paths, given.candidates[0].imgsz, given.nc,
        given.labels or given.labelled, lambda done, total: report("evaluate", done, total),
        given.confidence, given.overlap,
    )  # fmt: skip
