"""Everything the page says, measured: the converted model beside its float checkpoint and any int8 peers."""

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

WATCHED_IMAGES = 8  # that activations are looked at on
MOST_BYTES = 16 << 20  # of quantize.json: 0.1 MB for a yolov5x
MOST_DB, MOST_LOSS = 1e4, 1e12  # what is noted there beyond these is not shown: no fit and no training ends there
SHOWN_LAYERS = 6  # histograms of weights, and of activations


@dataclass(frozen=True)
class ReportOptions:
    """What to report on: the converted model; data as `contest.entrants`; the float checkpoint; int8 peers as ONNX
    files; how many photos are shown; image size and most images evaluated as `contest.entrants`; whether latency is
    measured (the one thing that is never twice the same); split and strict as `contest.entrants`."""

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
    """One model. `role` is float, converted or peer; `metrics` as `contest.Evaluated`."""

    label: str
    role: str
    size_bytes: int
    weight_bits: float
    metrics: Metrics | None
    curves: Mapping[int, ClassCurve]
    latency: Latency | None


@dataclass(frozen=True)
class Record:
    """What quantize.json noted beside the model: weight errors in dB by layer name, and the brief fine-tune's curve:
    steps, and the error of images held back then."""

    sqnr_db: Mapping[str, float]
    finetune: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class Report:
    """All figures. rows[0] is the float model, rows[1] the converted one, peers follow. `differing[i]` counts the
    boxes of image i without a partner; `scores` says how sure the first two rows are; `skipped` why other images could
    not be read. Views are empty where there is nothing to see (float activations)."""

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
    """Measure everything. Raises InputError for files that are missing, unreadable or do not fit each other."""
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
    """quantize.json, as far as it is there and about the model with this provenance. Raises InputError when it is
    there but cannot be read."""
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
        raise InputError(f"{path} is not a readable record of dsconvert quantize; remove it or make it anew.") from None
    return Record(
        {name: db for name, db in errors.items() if abs(db) <= MOST_DB},
        tuple(s for s in steps if all(abs(n) <= MOST_LOSS for n in s)),
    )


def _detect(given: Entrants, say: Progress) -> tuple[Detections, list[list[NDArray[Any]]]]:
    """What every model finds; and of the first two, the boxes a user of detect.py would see at a threshold next to
    nothing, per image, in pixels of the letterboxed image."""
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
    """Layers, and the histograms of the worst of them; activations on some of the images at `paths`."""
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
