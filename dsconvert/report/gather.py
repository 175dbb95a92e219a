"""Measure everything that the page shows: the converted model beside its float checkpoint and other int8 files."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.convert.record import REPORT_FILE
from dsconvert.graph.ir import ConvParams
from dsconvert.measure.calibration import Progress
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.bounds import made_of
from dsconvert.photos.images import letterbox, read_image, spread, to_tensor
from dsconvert.report.activations import activation_view, watch
from dsconvert.report.layers import (
    ActivationView,
    Layer,
    WeightView,
    check_same_network,
    layer_rows,
    weight_view,
    worst_first,
)
from dsconvert.report.photos import Photo, differing, load_photo
from dsconvert.report.text import labels_of
from dsconvert.scoring.accuracy import CONFIDENT, OVERLAP, Detections, Predictor
from dsconvert.scoring.candidates import Candidate
from dsconvert.scoring.coco import Metrics, coco_tables, metrics_of
from dsconvert.scoring.compare import ScoreShift, score_shift
from dsconvert.scoring.contest import Entrants, entrants, look
from dsconvert.scoring.curves import ClassCurve, class_curves, object_counts
from dsconvert.scoring.detect import DetectOptions
from dsconvert.scoring.latency import Latency, interleaved_latency
from dsconvert.yolo.boxes import suppressed
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower, split_detect

WATCHED_IMAGES = 8  # images on which activations are watched
MOST_BYTES = 16 << 20  # of quantize.json, which has 0.1 MB for a yolov5x
MOST_DB, MOST_LOSS = 1e4, 1e12  # larger numbers in quantize.json are not shown, as no fit and no training has any
SHOWN_LAYERS = 6  # histograms of weights, and of activations


@dataclass(frozen=True)
class ReportOptions:
    """What to report on.

    model: the converted model.
    data, imgsz, samples, split, strict: as for `contest.entrants`.
    float_model: the float checkpoint.
    against: int8 ONNX files to compare with.
    images: photos shown at most.
    latency: whether latency is measured; it is the only figure that differs between runs.
    """

    model: Path
    data: Path
    float_model: Path
    against: tuple[Path, ...] = ()
    images: int = 6
    imgsz: SizeLike | None = None
    samples: int | None = None
    latency: bool = True
    split: str | None = None
    strict: bool = False


@dataclass(frozen=True)
class Row:
    """One model in the comparison.

    role: float, converted or peer.
    metrics: as in `contest.Evaluated`.
    """

    label: str
    role: str
    size_bytes: int
    weight_bits: float
    metrics: Metrics | None
    curves: Mapping[int, ClassCurve]
    latency: Latency | None


@dataclass(frozen=True)
class Record:
    """What quantize.json holds about the model.

    sqnr_db: weight errors in dB by layer name.
    finetune: the brief fine-tune's curve: (step, error of the held-back images).
    """

    sqnr_db: Mapping[str, float]
    finetune: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Report:
    """All figures of the page.

    rows: the float model, the converted one, then the peers.
    differing: for each image, the number of boxes without a partner.
    scores: how confident the first two rows are.
    weights, activations: histograms; no activations if these are float.
    skipped: why other images could not be read.
    """

    rows: Sequence[Row]
    labelled: bool
    data: str
    imgsz: Size
    names: Sequence[str]
    objects: Mapping[int, int]
    differing: Sequence[int]
    scores: ScoreShift
    photos: Sequence[Photo]
    layers: Sequence[Layer]
    weights: Sequence[WeightView]
    activations: Sequence[ActivationView]
    watched_images: int
    finetune: Sequence[tuple[float, float]]
    provenance: Mapping[str, Any]
    same_source: bool
    threads: int
    skipped: Sequence[str] = ()


def gather(options: ReportOptions, progress: Progress | None = None) -> Report:
    """Measure everything. Raises InputError for files that are missing, unreadable or do not fit together."""
    say = progress or (lambda stage, done, total: None)
    model, source = load_model(options.model), options.float_model
    checkpoint = load_checkpoint(source)
    _, params = split_detect(*lower(checkpoint.network.fused()), checkpoint.head)
    check_same_network(params, model, source)
    record = read_record(options.model.parent / REPORT_FILE, model.provenance)
    paths = (source, options.model, *options.against)
    given = entrants(paths, options.data, options.imgsz, options.samples, options.split, options.strict)
    found, every = _detect(given, say)
    rows = _rows(given, found, options, say)
    sure = [[boxes[boxes[:, 4] > CONFIDENT] for boxes in seen] for seen in every]
    counts = differing(*sure)
    size = given.candidates[0].imgsz
    shown = sorted(range(len(counts)), key=lambda i: (-counts[i], i))[: options.images]
    layers, weights, activations, watched = _inside(model, params, record, found.read, size, say)
    return Report(
        rows, given.labelled, options.data.name, size, model.head.names, object_counts(found.truths), counts,
        score_shift(every[0], every[1]),
        [load_photo(found.read[i], size, sure[0][i], sure[1][i]) for i in shown],
        layers, weights, activations, watched, record.finetune, model.provenance,
        hashlib.sha256(source.read_bytes()).hexdigest() == model.provenance.get("source_sha256"),
        torch.get_num_threads(), found.skipped,
    )  # fmt: skip


def read_record(path: Path, provenance: Mapping[str, Any]) -> Record:
    """Return what quantize.json holds, or an empty record if it is missing or about another model.

    Raises InputError when it cannot be read.
    """
    if not path.is_file():
        return Record({}, ())
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError("size")
        noted = json.loads(path.read_bytes())
        if noted["provenance"] != dict(provenance):
            return Record({}, ())
        errors = {str(row["name"]): float(row["sqnr_db"]) for row in noted["layers"]}
        curve = (noted.get("finetune") or {"curve": ()})["curve"]
        steps = tuple((float(look["step"]), float(look["held_back"])) for look in curve)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RecursionError):
        raise InputError(f"{path} is not a readable record of dsconvert quantize; remove it.") from None
    return Record(
        {name: db for name, db in errors.items() if abs(db) <= MOST_DB},
        tuple(s for s in steps if all(abs(n) <= MOST_LOSS for n in s)),
    )


def _detect(given: Entrants, say: Progress) -> tuple[Detections, list[list[NDArray[Any]]]]:
    """Run all models. For the first two, also return the boxes that detect.py would show at a very low threshold.

    These boxes are given for each image, in pixels of the letterboxed image.
    """
    every: list[list[NDArray[Any]]] = [[], []]
    predictors = [_noting(c, s) for c, s in zip(given.candidates, every, strict=False)]
    predictors += [c.predict for c in given.candidates[2:]]
    return look(given, say, predictors), every


def _noting(candidate: Candidate, seen: list[NDArray[Any]]) -> Predictor:
    def predict(batch: NDArray[Any]) -> NDArray[Any]:
        raw = candidate.predict(batch)
        most = DetectOptions.most
        found = made_of(
            candidate.predict, lambda: suppressed(raw[0], iou=OVERLAP, most=most, best_class_only=True)[0], raw.nbytes
        )
        seen.append(found)
        return raw

    return predict


def _rows(given: Entrants, found: Detections, options: ReportOptions, say: Progress) -> list[Row]:
    there = given.labelled or found.measurable
    tables = [
        coco_tables(boxes, found.truths, found.shapes, found.nc, found.most) if there else None for boxes in found.found
    ]
    timed: list[Latency | None] = [None] * len(tables)
    if options.latency:
        say("bench", 0, 1)
        timed = list(interleaved_latency([c.run_once for c in given.candidates]))
        say("bench", 1, 1)
    roles = ["float", "converted", *["peer"] * len(options.against)]
    labels = labels_of([c.path for c in given.candidates])
    return [
        Row(
            label,
            role,
            c.size_bytes,
            c.weight_bits,
            metrics_of(t, len(found.read)) if t else None,
            class_curves(t) if t else {},
            latency,
        )
        for label, role, c, t, latency in zip(labels, roles, given.candidates, tables, timed, strict=True)
    ]


def _inside(
    model: DSModel,
    params: Mapping[str, ConvParams],
    record: Record,
    paths: Sequence[Path],
    size: Size,
    say: Progress,
) -> tuple[list[Layer], list[WeightView], list[ActivationView], int]:
    """Return the layers, histograms of the worst layers' weights and activations, and the number of images for the
    latter.
    """
    chosen = spread(paths, WATCHED_IMAGES) if model.activations else []
    batches = (to_tensor([letterbox(read_image(p), size)[0]]) for p in chosen)
    watched = {}
    if chosen:
        watched = watch(
            model.graph, params, model.activations, batches, progress=lambda done: say("activations", done, len(chosen))
        )
    layers = layer_rows(model, params, record.sqnr_db, {name: w.db for name, w in watched.items()})
    nodes = {row.name: node.name for row, node in zip(layers, model.graph.convs(), strict=True)}
    weights = [
        weight_view(row.name, params[nodes[row.name]].weight, model.convs[nodes[row.name]].weight)
        for row in worst_first(layers)[:SHOWN_LAYERS]
    ]
    noisiest = sorted((r for r in layers if r.activation_db is not None), key=lambda r: r.activation_db or 0.0)
    activations = [activation_view(row.name, watched[nodes[row.name]]) for row in noisiest[:SHOWN_LAYERS]]
    return layers, weights, activations, len(chosen)
