"""The command `dsconvert finetune`."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import MODEL, NAMES, file_kind
from dsconvert.base.files import check_target, check_writable, write_atomic
from dsconvert.base.notes import so_far
from dsconvert.commands.folders import refuse_to_lose, run_folder
from dsconvert.commands.shared import (
    PATH,
    RUNS,
    as_json,
    bars,
    console,
    device,
    force,
    print_json,
    quiet,
    say,
    strict,
    table,
    tell,
    threads,
    typed_command,
    warn,
)
from dsconvert.convert.record import MODEL_FILE
from dsconvert.model.file import model_bytes
from dsconvert.tune.finetune import Finetuned, FinetuneOptions, finetune
from dsconvert.tune.latents import TRAINED
from dsconvert.tune.state import NAME as UNFINISHED

RECORD_FILE = "finetune.json"
DEFAULT = FinetuneOptions(Path())


@click.command("finetune")
@click.argument("model", type=PATH)
@click.option("--data", type=PATH, required=True, help="data.yaml with labelled train and val images.")
@click.option("--train", type=click.Choice(TRAINED), default=DEFAULT.train, show_default=True,
              help="What learns. shifts: m and CDSw; shifts+bias: CDSb too; all: VQK too.")  # fmt: skip
@click.option("--epochs", default=DEFAULT.epochs, show_default=True, help="Passes over the training images, at most.")
@click.option("--batch", default=DEFAULT.batch, show_default=True, help="Images in a step.")
@click.option("--rate", default=DEFAULT.rate, show_default=True, help="Highest learning rate.")
@click.option("--warmup", default=DEFAULT.warmup, show_default=True, help="Epochs in which the rate rises.")
@click.option("--patience", default=DEFAULT.patience, show_default=True,
              help="Stop after so many epochs without a better mAP50-95 on val.")  # fmt: skip
@click.option("--mosaic", default=DEFAULT.mosaic, show_default=True, help="Share of images that combine four photos.")
@click.option("--no-augment", is_flag=True, help="Train on the images as they are.")
@click.option("--seed", default=0, show_default=True, help="Seed of every random choice.")
@strict
@threads
@device
@click.option("--out", type=PATH, help="Folder to write to (default: runs/dsconvert/NAME-finetuned).")
@click.option("--resume", is_flag=True, help="Continue a stopped run that had the same options.")
@force
@quiet
@as_json
def finetune_command(
    model: Path, threads: int, out: Path | None, resume: bool, force: bool, quiet: bool, as_json: bool,
    no_augment: bool, **options: Any,
) -> None:  # fmt: skip
    """Train the shifts of a converted MODEL on labelled images.

    MODEL is a .safetensors file. Its shifts (group and channel scales) learn; its integers stay, unless --train all.
    The result is a new file for export, from the epoch with the best mAP50-95 on val.

    \b
    Examples: dsconvert finetune model.safetensors --data night.yaml
              dsconvert finetune model.safetensors --data d.yaml --train all
    """
    began = time.perf_counter()
    if (kind := file_kind(model)) != MODEL:
        raise InputError(
            f"{model} is {NAMES[kind]}, not a .safetensors file; give finetune a file that dsconvert quantize wrote."
        )
    workers.start()
    chosen = FinetuneOptions(**options, augment=not no_augment)
    if workers.number():  # one process writes and prints for all
        finetune(model, chosen, resume=resume)
        return
    base = RUNS / f"{model.parent.name if model.name == MODEL_FILE else model.stem}-finetuned"
    check_writable(out or RUNS)
    if out is not None:
        refuse_to_lose([out, *(out / name for name in (MODEL_FILE, RECORD_FILE, UNFINISHED))], [model, chosen.data])
        check_target(out / MODEL_FILE, force)
        check_target(out / RECORD_FILE, force=True)  # a record alone was left by a run that was killed
    command = typed_command()
    note: Callable[[str], None] = (lambda line: None) if quiet else say
    with run_folder(out, base, UNFINISHED, resume) as folder, bars(quiet, lines=True) as progress:
        result = finetune(model, chosen, command, progress, note, folder / UNFINISHED, resume)
    record = _record(result, model, chosen, folder)
    write_atomic(folder / RECORD_FILE, (json.dumps(record, indent=1) + "\n").encode(), force=True)
    write_atomic(folder / MODEL_FILE, model_bytes(result.model), force)
    (folder / UNFINISHED).unlink(missing_ok=True)
    if result.skipped:
        warn(f"{len(result.skipped)} images could not be read and were left out; the first: {result.skipped[0]}")
    if not result.best_epoch:
        warn("No epoch was better on val than the model before; the result is the unchanged model.")
    seconds = time.perf_counter() - began
    if as_json:
        print_json({**record, "seconds": round(seconds, 2), "warnings": so_far()})
    elif quiet:
        tell(str(folder / MODEL_FILE))
    else:
        _print(result, folder / MODEL_FILE, seconds)


def _record(result: Finetuned, model: Path, options: FinetuneOptions, folder: Path) -> dict[str, Any]:
    """Return what finetune.json and --json hold."""
    return {
        "path": str(folder / MODEL_FILE), "model": str(model), "data": str(options.data), "train": options.train,
        "trained_share": round(result.share, 5), "images": result.images, "unreadable_images": len(result.skipped),
        "map50_95_before": result.log[0]["map50_95"], "map50_95": result.log[result.best_epoch]["map50_95"],
        "best_epoch": result.best_epoch, "epochs": result.log[1:],
    }  # fmt: skip


def _print(result: Finetuned, written: Path, seconds: float) -> None:
    before, best = result.log[0], result.log[result.best_epoch]
    tell(
        f"Learned {100 * result.share:.2f} % of the network's numbers on {result.images} images, "
        f"{len(result.log) - 1} epochs in {seconds:.0f} s."
    )
    shown = table("", "epoch", "mAP50-95")
    shown.add_row("before", "0", f"{before['map50_95']:.4f}")
    shown.add_row("finetuned", str(result.best_epoch), f"{best['map50_95']:.4f}")
    console().print(shown)
    tell(f"Wrote {written}")
    tell(f"Next: dsconvert export {shlex.quote(str(written))} --onnx")
