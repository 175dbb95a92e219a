"""Accuracy of dsconvert and of its peers on the same images; writes docs/accuracy.md.

    python benchmarks/accuracy.py --checkpoint yolov5n.pt --data coco500.yaml --name "COCO, 500 images"

Needs the `bench` extra. Models are calibrated on the train split and measured on the val split, which nothing else
sees; peers get the images that dsconvert takes by default, decoded in the same way. Finished models are kept in --work
and not made again. The results of each --name take the place of its last ones in docs/accuracy.json, and the page is
written from all that are there.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accuracy_page import DATA_FREE, DEFAULT, SECOND, write_page
from blockfloat import run_block_float
from bootstrap import bootstrap, image_draws
from machine import cpu_name
from named_fits import FITS, PRODUCT, Maker
from numpy.typing import NDArray
from peers import (
    decoded,
    mnn_convert,
    mnn_predictor,
    nncf_int8,
    openvino_predictor,
    ort_predictor,
    ort_static,
    ultralytics_int8,
)

from dsconvert.base.size import Size
from dsconvert.convert.exporting import onnx_bytes
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import save_quantized
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.ir import INPUT
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import read_data_yaml
from dsconvert.scoring.accuracy import CONFIDENT, Detections, Predictor, detect_all
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.compare import match, shifts_of
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import decode

PACKED = "packed.onnx"
IN_OPENVINO = ", layout openvino"
FEWER = (4, 16, 32, 128)  # calibration images of the rows that ask how many are needed
SIZES = (725_000, 800_000, 1_400_000)  # bytes of the rows that ask what a file of a given size keeps


@dataclass(frozen=True)
class Row:
    """A model of the table: what it is, its file, how its output is computed, and if known stored bits a weight and how
    many times smaller than float32 the weights of all layers but the stem and Detect are."""

    name: str
    group: str
    path: Path
    predict: Predictor
    weight_bits: float | None
    seconds: float | None
    smaller: float | None = None


def made(path: Path, make: Callable[[], object]) -> float | None:
    """Make a file unless it is there; seconds taken (None when it was)."""
    if path.exists():
        return None
    began = time.perf_counter()
    make()
    return time.perf_counter() - began


def dsconvert_row(name: str, group: str, checkpoint: Path, work: Path, options: QuantizeOptions, fit: Maker) -> Row:
    """Quantize, export packed; the ONNX file is what is measured."""
    folder = folder_of(work, name)
    model, target = folder / "model.safetensors", folder / PACKED
    seconds = made(
        model,
        lambda: save_quantized(
            quantize(load_checkpoint(checkpoint), options, name, cache=work / "cache", by=fit), folder, force=True
        ),
    )
    made(target, lambda: target.write_bytes(onnx_bytes(model, layout_named("packed"), options.imgsz)))
    made_of = load_model(model)
    weights = inner_weights(made_of)
    smaller = 32 * sum(w.vqk.numel() for w in weights) / sum(w.weight_bits * w.vqk.numel() for w in weights)
    return Row(
        name, group, target, load_candidate(target, options.imgsz).predict, made_of.weight_bits, seconds, smaller
    )


def openvino_row(row: Row, side: Size) -> Row:
    """The same model in layout openvino, run in OpenVINO."""
    target = row.path.with_name("openvino.onnx")
    made(
        target,
        lambda: target.write_bytes(onnx_bytes(row.path.with_name("model.safetensors"), layout_named("openvino"), side)),
    )
    name = f"{row.name.removesuffix(SECOND)}{IN_OPENVINO}{SECOND if row.name.endswith(SECOND) else ''}"
    return replace(row, name=name, path=target, predict=openvino_predictor(target))


def inner_weights(model: DSModel) -> list[DSTensor]:
    """Of every layer but the stem and Detect, also of those that were given 8 bits."""
    ends = {n.name for n in model.graph.convs() if INPUT in n.inputs} | set(model.graph.outputs)
    return [c.weight for name, c in model.convs.items() if name not in ends]


def folder_of(work: Path, name: str) -> Path:
    """Where a row's files are kept."""
    return work / name.replace(" ", "-").replace(",", "")


def all_rows(
    checkpoint: Path, options: QuantizeOptions, work: Path, groups: Sequence[str], sizes: Sequence[int], only_made: bool
) -> list[Row]:
    """Every model of the groups wanted, the float one first; `main` always. `only_made`: those in the work folder."""
    side = options.size
    float_file = work / "float32.onnx"
    made(float_file, lambda: float_file.write_bytes(onnx_bytes(checkpoint, layout_named("packed"), side)))
    rows = [Row("float32", "main", float_file, load_candidate(float_file, side).predict, 32.0, None)]
    rows += peer_rows(float_file, decoded(options.calib or Path(), side, options.samples), work)

    def add(name: str, group: str, options: QuantizeOptions, fit: Maker = FITS[PRODUCT]) -> None:
        if group in ("main", *groups) and (not only_made or (folder_of(work, name) / "model.safetensors").exists()):
            row = dsconvert_row(name, group, checkpoint, work, options, fit)
            rows.append(row)
            if name.removesuffix(SECOND) in ("dsconvert 8 bit", DEFAULT, f"dsconvert mixed, {sizes[0] / 1e6:g} MB"):
                rows.append(openvino_row(row, side))
            print(row.name, f"{row.seconds or 0:.0f} s", flush=True)

    add("dsconvert 8 bit", "main", replace(options, bits=8))
    for drawn, group, suffix in ((options, "main", ""), (replace(options, seed=1), "draws", SECOND)):
        add(f"{DEFAULT}{suffix}", group, drawn)
        if "uniform" in groups:
            add(f"dsconvert 4 bit everywhere{suffix}", group, replace(drawn, bits=4))
            add(f"dsconvert 3 bit everywhere{suffix}", group, replace(drawn, bits=3))
            size = (folder_of(work, "dsconvert 3 bit everywhere") / PACKED).stat().st_size
            add(f"dsconvert mixed, 3 bit size{suffix}", group, replace(drawn, target_bytes=size))
    add(DATA_FREE, "data-free", replace(options, calib=None))
    for count in FEWER:
        add(f"dsconvert default, {count} images", "images", replace(options, samples=count))
    for size in sizes:
        add(f"dsconvert mixed, {size / 1e6:g} MB", "frontier", replace(options, target_bytes=size))
    for name, other in (
        (DATA_FREE, replace(options, calib=None)),
        (f"dsconvert mixed, {sizes[0] / 1e6:g} MB", replace(options, target_bytes=sizes[0])),
    ):
        add(f"{name}{SECOND}", "draws", replace(other, seed=1))
    four = replace(options, bits=4)
    for name, fit in (("least squares", "least-squares"), ("GPTQ, symmetric", "symmetric"),
                      ("GPTQ, asymmetric, positions unweighted", "unweighted"),
                      ("GPTQ, output channels on their own", "alone")):  # fmt: skip
        add(name, "ablation", four, FITS[fit])
    for block in (32, 64, 128):
        add(f"4 bit, block size {block}", "block", replace(four, block_size=block))
    add("4 bit, activations float", "ablation", replace(four, activations="float"))
    return rows + (block_float_rows(rows[-1]) if rows[-1].name == "4 bit, activations float" else [])


def peer_rows(float_file: Path, images: Sequence[NDArray[np.float32]], work: Path) -> list[Row]:
    """What others make of the float file with the same decoded images (MNN takes none)."""
    rows = []
    for name, file, make in (
        ("ONNX Runtime int8, convolutions only", "ort-convs", partial(ort_static, convs_only=True)),
        ("ONNX Runtime int8", "ort-all", partial(ort_static, convs_only=False)),
        ("Ultralytics' way of int8 ONNX", "ultralytics", ultralytics_int8),
    ):
        path = work / f"{file}.onnx"
        seconds = made(path, partial(make, float_file, path, images))
        rows.append(Row(f"{name}, exact products", "main", path, ort_predictor(path, exact=True), None, seconds))
        if not has_vnni():
            rows.append(Row(f"{name}, as it runs on this CPU", "main", path, ort_predictor(path, False), None, None))
    path = work / "nncf.xml"
    seconds = made(path, lambda: nncf_int8(float_file, path, images))
    rows.append(Row("OpenVINO NNCF int8", "main", path.with_suffix(".bin"), openvino_predictor(path), None, seconds))
    for bits in (4, 3):
        path = work / f"mnn{bits}.mnn"
        seconds = made(path, partial(mnn_convert, float_file, path, bits))
        predict = mnn_predictor(path, torch.get_num_threads())
        rows.append(Row(f"MNN, {bits}-bit weights", "main", path, predict, None, seconds))
    return rows


def block_float_rows(weights_only: Row) -> list[Row]:
    """The paper's activations, simulated in torch on a model whose weights alone are quantized."""
    model = load_model(weights_only.path.with_name("model.safetensors"))

    def row(bits: int) -> Row:
        def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
            return decode(run_block_float(model.graph, model.convs, torch.from_numpy(batch), bits), model.head).numpy()

        name = f"4 bit, block floating point activations of {bits} bits"
        return replace(weights_only, name=name, group="block float", predict=predict)

    return [row(bits) for bits in (8, 6, 5, 4, 3)]


def box_counts(found: Detections, index: int) -> NDArray[np.float64]:
    """By image (images, 4): sure boxes of the float network, of a row, those that both have, and by how much the scores
    of the latter differ in all."""
    counts = []
    for first, second in zip(found.found[0], found.found[index], strict=True):
        sure = first[first[:, 4] > CONFIDENT], second[second[:, 4] > CONFIDENT]
        both = match(*sure)
        moved = np.abs(shifts_of([sure], [both])).sum()
        counts.append((len(sure[0]), len(sure[1]), len(both.iou), float(moved)))
    return np.array(counts)


def beside(counts: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of sums of `box_counts` (..., 4): the share of the float network's boxes that a row has not, the share of the
    row's that the float network has not, and how far the scores of the others are apart on average, (..., 3)."""
    first, second, both, moved = np.moveaxis(counts, -1, 0)
    lost, new = (1 - both / np.maximum(1, boxes) for boxes in (first, second))
    return np.stack((lost, new, moved / np.maximum(1, both)), -1)


def has_vnni() -> bool:
    """Whether this CPU adds int8 products in 32 bits."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def figures(rows: Sequence[Row], found: Detections, draws: list[NDArray[np.float64]]) -> list[dict[str, Any]]:
    """What the page shows of every row, with intervals from the images drawn in each round of a bootstrap."""
    scores, samples = found.metrics(), bootstrap(found, draws)
    low, high = np.percentile(100 * (samples[:, :1] - samples), (2.5, 97.5), axis=0)
    made = []
    for i, (row, score) in enumerate(zip(rows, scores, strict=True)):
        counts = box_counts(found, i)
        lost, new, moved = beside(counts.sum(0)).tolist()
        drawn = np.percentile(beside(np.stack(draws) @ counts), (2.5, 97.5), axis=0).T.tolist()
        made.append({
            "name": row.name, "group": row.group, "map": score.map50_95, "map50": score.map50,
            "drop": 100 * (scores[0].map50_95 - score.map50_95), "low": low[i], "high": high[i],
            "lost": lost, "new": new, "moved": moved, "box intervals": drawn, "bytes": row.path.stat().st_size,
            "weight bits": row.weight_bits, "smaller": row.smaller,
        })  # fmt: skip
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--name", required=True, help="what the set of images is called on the page")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy.md"), help="its .json is beside it")
    parser.add_argument(
        "--groups",
        nargs="*",
        default=["uniform", "data-free", "draws", "images", "frontier"],
        help="besides main; ablation and block are known too",
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes; the first in two draws")
    parser.add_argument("--only-made", action="store_true", help="leave out models that --work does not hold yet")
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    described = read_data_yaml(args.data)
    options = QuantizeOptions(calib=args.data, imgsz=args.imgsz)
    rows = all_rows(args.checkpoint, options, args.work, args.groups, args.sizes, args.only_made)
    found = detect_all([r.predict for r in rows], described.val, args.imgsz, len(described.names))
    shown = figures(rows, found, image_draws(len(found.truths), args.rounds))
    for row in shown:
        print(f"{row['map']:.4f} {row['name']}", flush=True)
    store = args.out.with_suffix(".json")
    results = json.loads(store.read_text()) if store.exists() else {}
    results[args.name] = {
        "command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "cpu": cpu_name(),
        "threads": torch.get_num_threads(), "images": len(found.truths), "imgsz": args.imgsz, "rounds": args.rounds,
        "rows": shown,
    }  # fmt: skip
    store.write_text(json.dumps(results, indent=1) + "\n")
    write_page(results, args.out)


if __name__ == "__main__":
    main()
