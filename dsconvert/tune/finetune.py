"""Train a converted model on labelled images: from files to a model and a record of the training."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.sealed import run_key
from dsconvert.export.check import check_accumulators
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import DataYaml, read_data_yaml
from dsconvert.photos.labels import Labelled, label_path, read_labelled
from dsconvert.scoring.accuracy import evaluate_predictors
from dsconvert.scoring.predictors import model_predictor
from dsconvert.tune.augment import NOTHING, Augment
from dsconvert.tune.latents import TRAINED, Latents, learned, share, start
from dsconvert.tune.loop import Plan, Student, train
from dsconvert.tune.photos import Photos, open_photos
from dsconvert.tune.state import SETS, State, read_state, write_state
from dsconvert.yolo.classes import label_rules

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class FinetuneOptions:
    """All that decides the result, besides the model file, the images and the machine.

    data: a data.yaml with train and val splits.
    train: what learns, one of TRAINED.
    epochs: at most.
    batch: images in a batch, over all processes.
    rate: learning rate of CDSw's factor (see `latents.PACE` for the others).
    warmup: in epochs.
    patience: epochs without a better mAP50-95 on val after which training stops.
    mosaic: share of training images that are a mosaic of four.
    augment: whether images are augmented at all.
    strict: whether lists and labels with unusable parts are refused.
    """

    data: Path
    train: str = "shifts+bias"
    epochs: int = 20
    batch: int = 16
    rate: float = 0.01
    warmup: float = 0.5
    patience: int = 10
    mosaic: float = 0.5
    augment: bool = True
    seed: int = 0
    device: str = "cpu"
    strict: bool = False


@dataclass(frozen=True)
class Finetuned:
    """The result of training.

    model: the best one.
    log: mAP50-95 and loss of each epoch; entry 0 is before training.
    best_epoch: whose model it is.
    share: numbers that learned, as a share of the network's.
    images: trained on.
    skipped: why other images could not be read.
    """

    model: DSModel
    log: list[dict[str, float]]
    best_epoch: int
    share: float
    images: int
    skipped: tuple[str, ...]


def finetune(
    path: Path,
    options: FinetuneOptions,
    command: str = "",
    progress: Progress | None = None,
    note: Callable[[str], None] = lambda line: None,
    unfinished: Path | None = None,
    resume: bool = False,
) -> Finetuned:
    """Train the model file at `path`, and return the best model.

    command: noted in the model file.
    progress: called with a stage, the number done and the total.
    note: called with a line after every epoch.
    unfinished: a file that keeps the state after every epoch; None keeps nothing.
    resume: go on from the state that an equal run left in `unfinished`.

    Under torchrun every process takes a part of each batch and returns the whole result. Only the first process writes.

    Raises InputError for files and options that cannot be used.
    """
    _check(options)
    report = progress or (lambda stage, done, total: None)
    model = load_model(path)
    if model.head.nm:
        raise InputError(f"{path} is a segmentation model; finetune can train detectors only.")
    data = read_data_yaml(options.data)
    _check_data(options.data, data, model)
    device = workers.device(options.device)
    rules = label_rules(data, model.head.names, str(path), options.strict)
    splits = {split: data.images(split, options.strict) for split in ("train", "val")}
    judging = read_labelled(splits["val"], rules)
    photos = open_photos(splits["train"], rules, model.imgsz, lambda done, total: report("images", done, total))
    if min(options.batch, len(photos)) < workers.count():
        raise InputError(f"A batch of {min(options.batch, len(photos))} is too small for {workers.count()} processes.")
    layers, latents = start(model, options.train, device)
    state = State.new(latents)
    key = _key(path, options, photos, judging, data.names) if unfinished is not None else ""
    if resume:
        state = read_state(unfinished, key, latents) if unfinished is not None and not workers.number() else state
        state = _spread(state)

    def measure(latents: Latents) -> float:
        predict = model_predictor(learned(model, layers, latents), device)
        (found,) = evaluate_predictors(
            [predict], judging.paths, model.imgsz, model.head.nc, judging,
            lambda done, total: report("evaluate", done, total),
        )  # fmt: skip
        return found.map50_95

    def after_epoch(state: State) -> None:
        note(_line(state, options.epochs))
        if unfinished is not None and not workers.number():
            write_state(unfinished, key, state)

    how = replace(Augment(), mosaic=options.mosaic) if options.augment else NOTHING
    plan = Plan(
        options.epochs, options.batch, options.rate, options.warmup, options.patience, options.seed, how
    )  # fmt: skip
    student = Student(model.graph, layers, model.activations, model.head, device)
    torch.manual_seed(options.seed)
    train(student, photos, plan, state, measure, lambda done, total: report("train", done, total), after_epoch)
    best = learned(model, layers, state.best)
    check_accumulators(best)
    told = {"command": command, "options": {**asdict(options), "data": str(options.data.resolve())}}
    provenance = {**model.provenance, "finetune": {**told, "map50_95": [e["map50_95"] for e in state.log]}}
    return Finetuned(
        replace(best, provenance=provenance), state.log, state.best_epoch, share(model, latents), len(photos),
        photos.skipped,
    )  # fmt: skip


def _check(options: FinetuneOptions) -> None:
    if options.train not in TRAINED:
        raise InputError.naming("{train} is one of {}.", ", ".join(TRAINED))
    if min(options.epochs, options.batch, options.patience) < 1:
        raise InputError.naming("{epochs}, {batch} and {patience} must be at least 1.")
    if not 0 < options.rate <= 1 or not 0 <= options.warmup <= options.epochs or not 0 <= options.mosaic <= 1:
        raise InputError.naming(
            "{rate} must be above 0 and at most 1, {warmup} from 0 to {epochs}, {mosaic} from 0 to 1."
        )
    workers.check_device(options.device)


def _check_data(path: Path, data: DataYaml, model: DSModel) -> None:
    if len(data.names) != model.head.nc:
        raise InputError(f"The model has {model.head.nc} classes, {path} has {len(data.names)}.")
    for split in ("train", "val"):
        if not data.splits[split]:
            raise InputError(f"{path} names no {split} images; finetune learns on train and chooses the epoch by val.")


def _line(state: State, epochs: int) -> str:
    """Return the line that describes the last epoch."""
    epoch, last = len(state.log) - 1, state.log[-1]
    if not epoch:
        return f"before training: mAP50-95 {last['map50_95']:.4f}"
    best = ", the best so far" if state.best_epoch == epoch else ""
    return f"epoch {epoch} of {epochs}: loss {last['loss']:.4f}, mAP50-95 {last['map50_95']:.4f}{best}"


def _key(path: Path, options: FinetuneOptions, photos: Photos, judging: Labelled, names: Sequence[str]) -> str:
    """Return a digest of all that decides the result: images and labels of both splits by content, options and
    classes.
    """
    digest = hashlib.sha256()
    for image in (*photos.paths, *judging.paths):
        digest.update(f"{image}\0{_content(image)}\0".encode("utf-8", "surrogatepass"))
    for image in judging.paths:
        digest.update(f"{_content(label_path(image))}\0".encode())
    labels = hashlib.sha256(b"".join(labels.tobytes() for labels in photos.labels)).hexdigest()
    return run_key(asdict(options), _content(path), digest.hexdigest(), labels, list(names), workers.count())


def _content(path: Path) -> str:
    """Return a digest of a file's content, or an empty string if there is no file."""
    try:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    except FileNotFoundError:
        return ""


def _spread(state: State) -> State:
    """Send the first process's state to all processes."""
    if workers.count() == 1:
        return state
    sent = workers.gathered({} if workers.number() else _plain(state))[0]
    for name, tensors in sent["sets"].items():
        with torch.no_grad():
            for key, value in getattr(state, name).items():
                value.copy_(tensors[key])
    state.steps, state.log = sent["steps"], sent["log"]
    return state


def _plain(state: State) -> dict[str, Any]:
    sets = {n: {k: v.detach().cpu() for k, v in getattr(state, n).items()} for n in SETS}
    return {"sets": sets, "steps": state.steps, "log": state.log}
