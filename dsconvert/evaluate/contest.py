"""Models measured against each other: which may enter, the images that judge them, accuracy and latency."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconvert.calibration import Progress
from dsconvert.errors import InputError
from dsconvert.evaluate.accuracy import Detections, Predictor, detect_all
from dsconvert.evaluate.candidates import Candidate, load_candidates
from dsconvert.evaluate.coco import Metrics
from dsconvert.evaluate.latency import Latency, interleaved_latency
from dsconvert.yolo.images import image_paths, read_data_yaml, spread


@dataclass(frozen=True)
class Evaluated:
    """One model's accuracy and latency on the same images as the others."""

    candidate: Candidate
    metrics: Metrics
    latency: Latency


@dataclass(frozen=True)
class Entrants:
    """Models at one image size and the images they are judged on. The truth has nc classes: it is the labels beside
    the images, or (labelled False) what the first model finds with confidence."""

    candidates: Sequence[Candidate]
    paths: Sequence[Path]
    nc: int
    labelled: bool


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
    first = next((c for c in candidates if c.nc), candidates[0])
    whose, nc = (str(data), len(described.names)) if described else (str(first.path), first.nc)
    if not nc:
        raise InputError(f"{first.path} does not say how many classes it finds; give --data a data.yaml, which does.")
    for c in candidates:
        if c.nc and c.nc != nc:
            way = "give --data a folder of images to measure agreement with the first model without labels"
            raise InputError(
                f"{c.path} has {c.nc} classes, {whose} has {nc}; "
                f"{way if described else 'models of different classes cannot be compared'}."
            )
    return Entrants(candidates, paths, nc, labelled)


def evaluate(
    models: Sequence[Path],
    data: Path,
    imgsz: int | None = None,
    samples: int | None = None,
    progress: Progress | None = None,
) -> list[Evaluated]:
    """Measure models on the images of `data`, see `entrants`."""
    given = entrants(models, data, imgsz, samples)
    metrics = look(given, progress).metrics()
    latencies = interleaved_latency([c.run_once for c in given.candidates])
    return [Evaluated(c, m, t) for c, m, t in zip(given.candidates, metrics, latencies, strict=True)]


def look(
    given: Entrants, progress: Progress | None = None, predictors: Sequence[Predictor] | None = None
) -> Detections:
    """What the models (or `predictors` in their place) find in the images; under torchrun every process looks at a part
    of them."""
    report = progress or (lambda stage, done, total: None)
    return detect_all(
        predictors or [c.predict for c in given.candidates], given.paths, given.candidates[0].side, given.nc,
        given.labelled, lambda done, total: report("evaluate", done, total),
    )  # fmt: skip
