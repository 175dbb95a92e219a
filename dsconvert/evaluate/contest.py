"""Models measured against each other: which may enter, the images that judge them, accuracy and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from dsconvert.calibration import Progress
from dsconvert.errors import InputError
from dsconvert.evaluate.accuracy import CONFIDENT, LEAST, Detections, Predictor, detect_all
from dsconvert.evaluate.candidates import Candidate, load_candidates
from dsconvert.evaluate.coco import Metrics
from dsconvert.evaluate.latency import Latency, interleaved_latency
from dsconvert.yolo.images import image_paths, read_data_yaml, spread


@dataclass(frozen=True)
class Evaluated:
    """One model's accuracy and latency on the same images as the others; why files could not be read, which are not
    among the images. `metrics` is None where there is nothing to measure: without labels, when the first model finds
    nothing."""

    candidate: Candidate
    metrics: Metrics | None
    latency: Latency
    images: int
    skipped: tuple[str, ...]


@dataclass(frozen=True)
class Entrants:
    """Models at one image size and the images they are judged on. The truth has nc classes: it is the labels beside
    the images, or (labelled False) what the first model finds with confidence. `confidence` and `overlap` as
    `detect_all`."""

    candidates: Sequence[Candidate]
    paths: Sequence[Path]
    nc: int
    labelled: bool
    confidence: float = LEAST
    overlap: float | None = None


def entrants(models: Sequence[Path], data: Path, imgsz: int | None = None, samples: int | None = None) -> Entrants:
    """Load models, and find the images of the val split of a data.yaml (its train split when there is no val) or of a
    folder. Raises InputError when a model's classes are not the data's, or the first model's."""
    labelled = data.suffix.lower() in (".yaml", ".yml")
    described = read_data_yaml(data) if labelled else None
    paths = list(described.val or described.train) if described else image_paths(data)
    if not paths:
        raise InputError(f"{data} names neither val nor train images.")
    if samples is not None:
        paths = spread(paths, samples)
    candidates = load_candidates(models, imgsz)
    whose, nc = (str(data), len(described.names)) if described else (str(models[0]), len(candidates[0].names))
    for c in candidates:
        if c.names and len(c.names) != nc:
            raise InputError(
                f"{c.path} has {len(c.names)} classes, {whose} has {nc}; give --data a folder of images to measure "
                "agreement with the first model without labels."
            )
    return Entrants(candidates, paths, nc, labelled)


def evaluate(
    models: Sequence[Path],
    data: Path,
    imgsz: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
    confidence: float = LEAST,
    overlap: float | None = None,
) -> list[Evaluated]:
    """Measure models on the images of `data`, see `entrants`; `confidence` and `overlap` as `detect_all`."""
    given = replace(entrants(models, data, imgsz, samples), confidence=confidence, overlap=overlap)
    found = look(given, progress)
    there = given.labelled or found.measurable  # images without labels are an error of those who say there are some
    metrics: Sequence[Metrics | None] = found.metrics() if there else [None] * len(given.candidates)
    latencies = interleaved_latency([c.run_once for c in given.candidates])
    return [
        Evaluated(c, m, t, len(found.shapes), found.skipped)
        for c, m, t in zip(given.candidates, metrics, latencies, strict=True)
    ]


def nothing_found(first: Path | str, confidence: float = LEAST) -> str:
    """Why there is no accuracy, in one sentence."""
    return (
        f"{first} finds nothing above a score of {max(CONFIDENT, confidence):g} in these images, so there is no "
        "agreement to measure; images that show what it was trained on, or labels, would tell."
    )


def look(
    given: Entrants, progress: Progress | None = None, predictors: Sequence[Predictor] | None = None
) -> Detections:
    """What the models (or `predictors` in their place) find in the images; under torchrun every process looks at a part
    of them."""
    report = progress or (lambda stage, done, total: None)
    return detect_all(
        predictors or [c.predict for c in given.candidates], given.paths, given.candidates[0].side, given.nc,
        given.labelled, lambda done, total: report("evaluate", done, total),
        given.confidence, given.overlap,
    )  # fmt: skip
