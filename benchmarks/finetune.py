"""What learning the shifts recovers on another domain:  python benchmarks/finetune.py --work FOLDER

The demo's checkpoint, trained by day, is converted by day. Its scenes are then drawn by night and in fog: 300 to learn
on, 40 that choose the epoch, and 100 that are only measured on. Every row is kept in the folder, so a run that was
stopped goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from dsconvert.base.files import write_atomic
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import MODEL_FILE, save_quantized
from dsconvert.model.file import model_bytes
from dsconvert.photos.dataset import image_paths
from dsconvert.scoring.accuracy import evaluate_predictors
from dsconvert.scoring.candidates import load_candidate
from dsconvert.tune.finetune import FinetuneOptions, finetune
from dsconvert.tune.latents import TRAINED
from dsconvert.yolo.checkpoint import load_checkpoint

DEMO = Path(__file__).resolve().parents[1] / "calib" / "demo"
sys.path.insert(0, str(DEMO))
from looks import LOOKS  # noqa: E402
from make_dataset import write_dataset  # noqa: E402
from scenes import NAMES, SIDE  # noqa: E402

# seeds that neither the checkpoint was trained on nor the conversion calibrated on
SPLITS = {"train": (4_000_000, 300), "val": (5_000_000, 40), "test": (6_000_000, 100)}


def measured(model: Path, folder: Path) -> float:
    """mAP50-95 on the test scenes, by torch: integers for a converted model."""
    paths = image_paths(folder / "images" / "test")
    (found,) = evaluate_predictors([load_candidate(model, SIDE).predict], paths, SIDE, len(NAMES))
    return found.map50_95


def kept(path: Path, make: Any) -> Any:
    """The JSON value in the file, made and written first where it is not there."""
    if not path.exists():
        write_atomic(path, json.dumps(make()).encode(), force=True)
    return json.loads(path.read_text())


def converted(work: Path) -> Path:
    """The demo at 4 bits in blocks of 32, calibrated by day."""
    folder = work / "day4"
    if not (folder / MODEL_FILE).exists():
        options = QuantizeOptions(calib=DEMO / "images" / "calib", imgsz=SIDE, block_size=32, bits=4)
        save_quantized(quantize(load_checkpoint(DEMO / "demo.pt"), options), folder, force=True)
    return folder / MODEL_FILE


def row(work: Path, look: str, name: str, options: FinetuneOptions) -> dict[str, Any]:
    """Train on a look, and measure."""
    target, state = work / f"{name}.safetensors", work / f"{name}.state"
    began = time.process_time()
    result = finetune(
        converted(work), options, note=lambda line: print(name, line, flush=True), unfinished=state,
        resume=state.exists(),
    )  # fmt: skip
    seconds = time.process_time() - began
    write_atomic(target, model_bytes(result.model), force=True)
    return {"map50_95": measured(target, work / look), "share": result.share, "seconds": seconds, "log": result.log}


def spread(values: list[float], form: str) -> str:
    """Their mean, and where there are several the lowest and the highest."""
    low, mean, high = (form.format(v) for v in (min(values), sum(values) / len(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


def main() -> None:
    """Parse the command line, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument(
        "--looks", nargs="+", choices=[look for look in LOOKS if look != "day"], default=["night", "fog"]
    )
    parser.add_argument("--train", nargs="+", choices=TRAINED, default=list(TRAINED))
    parser.add_argument("--epochs", type=int, default=FinetuneOptions.epochs)
    parser.add_argument("--batch", type=int, default=FinetuneOptions.batch)
    parser.add_argument("--rate", type=float, default=FinetuneOptions.rate)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of the order and changes of training images")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    work: Path = args.work
    for look in ("day", *args.looks):
        if not (work / look / "data.yaml").exists():
            write_dataset(work / look, look, SPLITS)
    lines = ["| look | model | numbers learned | mAP50-95 | of the loss recovered |", "|---|---|---|---|---|"]
    models = {"float32": DEMO / "demo.pt", "4 bits": converted(work)}
    before = {
        (look, name): kept(work / f"{look}-{name}.json", lambda m=model, k=look: measured(m, work / k))
        for look in ("day", *args.looks) for name, model in models.items()
    }  # fmt: skip
    lines += [f"| {look} | {name} | | {value:.4f} | |" for (look, name), value in before.items()]
    for look in args.looks:
        for train in args.train:
            runs = []
            for seed in args.seeds:
                name = f"{look}-{train}-{args.epochs}-{args.batch}-{args.rate}-{seed}"
                options = FinetuneOptions(
                    work / look / "data.yaml", train, args.epochs, args.batch, args.rate, seed=seed
                )  # fmt: skip
                runs.append(kept(work / f"{name}.json", lambda k=look, n=name, o=options: row(work, k, n, o)))
            lost = before["day", "4 bits"] - before[look, "4 bits"]
            values = [run["map50_95"] for run in runs]
            recovered = spread([100 * (v - before[look, "4 bits"]) / lost for v in values], "{:.0f} %")
            share = f"{100 * runs[0]['share']:.2f} %"
            lines.append(f"| {look} | 4 bits, {train} | {share} | {spread(values, '{:.4f}')} | {recovered} |")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
