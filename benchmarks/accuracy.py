"""Accuracy of dsconvert and of int8 peers on the same images; writes docs/accuracy.md.

    python benchmarks/accuracy.py --checkpoint yolov5n.pt --data coco.yaml

Needs the `bench` extra. Models are calibrated on the train split and measured on the val split, which nothing else
sees; peers get the images that dsconvert takes by default, decoded in the same way. Finished models are kept in --work
and not made again.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from bootstrap import bootstrap
from machine import cpu_name
from notes import kept
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

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.evaluate.accuracy import CONFIDENT, Detections, Predictor, detect_all
from dsconvert.evaluate.candidates import load_candidate
from dsconvert.evaluate.compare import match, shifts_of
from dsconvert.fit.gptq import fit_layer, fit_weight_gptq, measure_moments
from dsconvert.fit.least_squares import fit_weight
from dsconvert.graph.blockfloat import run_block_float
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import INPUT
from dsconvert.model import DSModel
from dsconvert.modelfile import load_model
from dsconvert.pipeline import QuantizeOptions, onnx_bytes, quantize, save_quantized
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.dataset import read_data_yaml
from dsconvert.yolo.decode import decode

SIDE = 640
PACKED = "packed.onnx"
SECOND = ", second draw"
FEWER = (4, 16, 32, 128)  # calibration images of the rows that ask how many are needed
DECIDES = 500  # images from which on a table says anything
FEW = (
    "they are wide because the images are few, and a fit that draws other calibration pixels moves a drop by another "
    "point. So no conclusion can be drawn from these tables: a difference of a point or two is chance, whatever its "
    "sign."
)


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


def dsconvert_row(name: str, group: str, checkpoint: Path, work: Path, options: QuantizeOptions) -> Row:
    """Quantize, export packed; the ONNX file is what is measured."""
    folder = folder_of(work, name)
    model, target = folder / "model.safetensors", folder / PACKED
    seconds = made(
        model,
        lambda: save_quantized(
            quantize(load_checkpoint(checkpoint), options, name, cache=work / "cache"), folder, force=True
        ),
    )
    made(target, lambda: target.write_bytes(onnx_bytes(model, "packed", SIDE)))
    made_of = load_model(model)
    weights = inner_weights(made_of)
    smaller = 32 * sum(w.vqk.numel() for w in weights) / sum(w.weight_bits * w.vqk.numel() for w in weights)
    return Row(name, group, target, load_candidate(target, SIDE).predict, made_of.weight_bits, seconds, smaller)


def inner_weights(model: DSModel) -> list[DSTensor]:
    """Of every layer but the stem and Detect, also of those that were given 8 bits."""
    ends = {n.name for n in model.graph.convs() if INPUT in n.inputs} | set(model.graph.outputs)
    return [c.weight for name, c in model.convs.items() if name not in ends]


def folder_of(work: Path, name: str) -> Path:
    """Where a row's files are kept."""
    return work / name.replace(" ", "-").replace(",", "")


def with_fit(fit: Callable[..., DSTensor | QConv], run: Callable[[], None]) -> None:
    """Make a row whose output channels are fitted on their own, by `fit` in the place of `fit.gptq.fit_layer`."""
    import dsconvert.pipeline as pipeline

    original = pipeline.fit_layer, pipeline.coupled
    pipeline.fit_layer, pipeline.coupled = fit, lambda *given: {}
    try:
        run()
    finally:
        pipeline.fit_layer, pipeline.coupled = original


def plain_fit(node, weight, width, images, channels, photographs):  # type: ignore[no-untyped-def]
    """Least squares on the weights alone."""
    return fit_weight(weight, *width)


def symmetric_fit(node, weight, width, images, channels, photographs):  # type: ignore[no-untyped-def]
    """GPTQ towards the float weight on the quantized network's inputs."""
    moments = measure_moments(node, weight.shape, images, photographs)
    moments = replace(moments, cross=weight.cpu().double().flatten(1) @ moments.hessian)
    return fit_weight_gptq(weight, moments, width.bits, width.block_size, None, width.trellis)


def unweighted_fit(node, weight, width, images, channels, photographs):  # type: ignore[no-untyped-def]
    """Asymmetric GPTQ, every position counting the same."""
    even = (replace(seen, weights=torch.ones_like(seen.weights)) for seen in images)
    moments = measure_moments(node, weight.shape, even, photographs)
    return fit_weight_gptq(weight, moments, width.bits, width.block_size, None, width.trellis)


def all_rows(checkpoint: Path, data: Path, work: Path, groups: Sequence[str], only_made: bool) -> list[Row]:
    """Every model of the groups wanted, the float one first; `main` always. `only_made`: those in the work folder."""
    options = QuantizeOptions(calib=data, imgsz=SIDE)
    float_file = work / "float32.onnx"
    made(float_file, lambda: float_file.write_bytes(onnx_bytes(checkpoint, "packed", SIDE)))
    rows = [Row("float32", "main", float_file, load_candidate(float_file, SIDE).predict, 32.0, None)]
    rows += peer_rows(float_file, decoded(data, SIDE, options.samples), work)

    def add(name: str, group: str, options: QuantizeOptions) -> None:
        if group in ("main", *groups) and (not only_made or (folder_of(work, name) / "model.safetensors").exists()):
            rows.append(dsconvert_row(name, group, checkpoint, work, options))
            print(rows[-1].name, f"{rows[-1].seconds or 0:.0f} s", flush=True)

    add("dsconvert 8 bit", "main", replace(options, bits=8))
    for drawn, group, suffix in ((options, "main", ""), (replace(options, seed=1), "draws", SECOND)):
        add(f"dsconvert default (mixed, 4 bit size){suffix}", group, drawn)
        add(f"dsconvert 4 bit everywhere{suffix}", group, replace(drawn, bits=4))
        add(f"dsconvert 3 bit everywhere{suffix}", group, replace(drawn, bits=3))
        size = (folder_of(work, "dsconvert 3 bit everywhere") / PACKED).stat().st_size
        add(f"dsconvert mixed, 3 bit size{suffix}", group, replace(drawn, target_bytes=size))
    add("dsconvert default, data-free", "data-free", replace(options, calib=None))
    for count in FEWER:
        add(f"dsconvert default, {count} images", "images", replace(options, samples=count))
    for name, other in (
        ("dsconvert default, data-free", replace(options, calib=None)),
        ("dsconvert mixed, 0.725 MB", replace(options, target_bytes=725_000)),
    ):
        add(f"{name}{SECOND}", "draws", replace(other, seed=1))
    for size in (725_000, 800_000, 1_400_000):
        add(f"dsconvert mixed, {size / 1e6:g} MB", "frontier", replace(options, target_bytes=size))
    four = replace(options, bits=4)
    for name, fit in (("least squares", plain_fit), ("GPTQ, symmetric", symmetric_fit),
                      ("GPTQ, asymmetric, positions unweighted", unweighted_fit),
                      ("GPTQ, output channels on their own", fit_layer)):  # fmt: skip
        with_fit(fit, lambda n=name: add(n, "ablation", four))  # type: ignore[misc]
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


def beside(found: Detections, index: int) -> tuple[float, float, float]:
    """Of the float network's sure boxes the share that a row has not, of the row's the share that the float network has
    not, and how far the scores of the others are apart on average."""
    sure = [
        (a[a[:, 4] > CONFIDENT], b[b[:, 4] > CONFIDENT])
        for a, b in zip(found.found[0], found.found[index], strict=True)
    ]
    matches = [match(a, b) for a, b in sure]
    both, moved = sum(len(m.iou) for m in matches), shifts_of(sure, matches)
    first, second = (max(1, sum(len(pair[side]) for pair in sure)) for side in (0, 1))
    return 1 - both / first, 1 - both / second, float(np.abs(moved).mean()) if moved else 0.0


def has_vnni() -> bool:
    """Whether this CPU adds int8 products in 32 bits."""
    return "vnni" in Path("/proc/cpuinfo").read_text()


def write(rows: list[Row], found: Detections, samples: np.ndarray, images: int, target: Path, command: str) -> None:
    """The page."""
    scores = found.metrics()
    drops = 100 * (samples[:, :1] - samples)
    low, high = np.percentile(drops, (2.5, 97.5), axis=0)

    def table(names: list[int]) -> list[str]:
        lines = [
            "| model | mAP50-95 | mAP50 | drop, points | 95 % interval | boxes lost | new | score moved | file MB | "
            "bits a weight | DSConv layers |",
            "|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for i in names:
            row, m = rows[i], scores[i]
            drop = 100 * (scores[0].map50_95 - m.map50_95)
            bits = f"{row.weight_bits:.2f}" if row.weight_bits else ""
            smaller = f"1/{row.smaller:.1f}" if row.smaller else ""
            lost, new, moved = beside(found, i)
            lines.append(
                f"| {row.name} | {m.map50_95:.4f} | {m.map50:.4f} | {drop:.2f} | {low[i]:.2f} to {high[i]:.2f} | "
                f"{100 * lost:.1f} % | {100 * new:.1f} % | {moved:.3f} | {row.path.stat().st_size / 1e6:.2f} | "
                f"{bits} | {smaller} |"
            )
        return lines

    def group(*names: str) -> list[int]:
        return [i for i, r in enumerate(rows) if r.group in names]

    def section(title: str, names: list[int]) -> list[str]:
        return [f"### {title}", "", *table(names), ""] if names else []

    def chance() -> list[str]:
        """Both draws of every row that has two."""
        at = {r.name: i for i, r in enumerate(rows)}
        loss = [100 * (scores[0].map50_95 - m.map50_95) for m in scores]
        pairs = [(name, loss[i], loss[at[name + SECOND]]) for name, i in at.items() if name + SECOND in at]
        return [
            "### How much of this is chance", "",
            "The same fit with another `--seed`, which draws other calibration pixels:", "",
            "| model | drop, points | drop, points, second draw | mean |", "|---|---|---|---|",
            *(f"| {name} | {a:.2f} | {b:.2f} | {(a + b) / 2:.2f} |" for name, a, b in pairs), "",
        ]  # fmt: skip

    four = next(i for i, r in enumerate(rows) if r.name == "dsconvert 4 bit everywhere")
    default = [
        i
        for i, r in enumerate(rows)
        if r.name in ("dsconvert default (mixed, 4 bit size)", "dsconvert default, data-free")
    ]
    cpu, few = cpu_name(), len(found.truths) < DECIDES
    text = [
        "# Accuracy", "", *kept(target),
        f"## {'A quick look at ' if few else ''}{len(found.truths)} images", "",
        f"Made by `{command}` on {torch.get_num_threads()} threads of {cpu}. {len(found.truths)} validation images "
        "that nothing was tuned on; calibration without labels on the train split. Every row is its file, run: ONNX in "
        f"ONNX Runtime, NNCF in OpenVINO. Intervals: paired bootstrap over images, "
        f"{images} draws{f'; {FEW}' if few else '.'}", "",
        *table(group("main", "data-free")), "",
        f"Boxes are those with a score above {CONFIDENT}, by class and at an IoU of 0.5: *lost* is the share of "
        "float32's that a file has not, *new* the share of a file's that float32 has not, *score moved* the mean "
        "absolute difference of the scores of all others. The stem and Detect are int8 in every dsconvert row; "
        "activations are uint8. *DSConv layers*: VQK "
        "and KDS of all others, those that got 8 bits too, against float32. *Default* spends the bytes of "
        "4 bits everywhere where they save most (`dsconvert quantize` without `--bits`). *Exact products*: with ONNX "
        "Runtime's `session.x64quantprecision`; by default a CPU without VNNI saturates ordinary int8 weights' "
        "products. dsconvert's weights cannot saturate, so its rows are the same on every CPU. *Ultralytics' way*: "
        "`quantize_static` with its defaults (MinMax, one scale for all of a layer's weights, int8 activations) on "
        "Conv, Gemm and MatMul. *MNN*: `mnnconvert --weightQuantBits 4 --weightQuantBlock 32 --hqq`, run in MNN; "
        "activations stay float, and no images are needed. What is float in a file runs in float32 in every row, in "
        "OpenVINO too, which would choose bfloat16 on CPUs that have it.", "",
        *(chance() if group("draws") else []),
        *section("What each step is worth (4 bits everywhere; the last row is the product)",
                 [*group("ablation"), four] if group("ablation") else []),
        *section("How many calibration images", sorted([*group("images"), *default]) if group("images") else []),
        *section("Block size", sorted([*group("block"), four]) if group("block") else []),
        *section("The paper's activations: block floating point, blocks of 32 channels (simulated in torch)",
                 group("block float")),
        "### Size against accuracy", "", "![size against accuracy](accuracy.svg)", "",
        *(table(group("frontier")) if group("frontier") else []), "",
    ]  # fmt: skip
    target.write_text("\n".join(text))
    plot(rows, [m.map50_95 for m in scores], target.with_suffix(".svg"))


def plot(rows: list[Row], scores: list[float], target: Path) -> None:
    """File size against mAP for the main and frontier rows."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "dsconvert"
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    mixed = sorted((r.path.stat().st_size / 1e6, s) for r, s in zip(rows, scores, strict=True)
                   if "mixed" in r.name and "dsconvert" in r.name)  # fmt: skip
    axes.plot(*zip(*mixed, strict=True), "o-", label="dsconvert, mixed widths")
    for label, marker, chosen in (
        ("dsconvert, one width", "s", lambda n: "everywhere" in n or n.endswith("8 bit")),
        ("int8 peers", "^", lambda n: "int8" in n),
    ):
        points = [(r.path.stat().st_size / 1e6, s) for r, s in zip(rows, scores, strict=True) if chosen(r.name)]
        axes.plot(*zip(*points, strict=True), marker, label=label)
    axes.axhline(scores[0], linestyle=":", label=f"float32 ({rows[0].path.stat().st_size / 1e6:.1f} MB)")
    axes.set(xlabel="file, MB", ylabel="mAP50-95")
    axes.legend(loc="lower right")
    figure.savefig(target, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--out", type=Path, default=Path("docs/accuracy.md"))
    parser.add_argument(
        "--groups",
        nargs="*",
        default=["data-free", "draws", "images", "frontier", "ablation", "block"],
        help="besides main",
    )
    parser.add_argument("--only-made", action="store_true", help="leave out models that --work does not hold yet")
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    described = read_data_yaml(args.data)
    rows = all_rows(args.checkpoint, args.data, args.work, args.groups, args.only_made)
    found = detect_all([r.predict for r in rows], described.val, SIDE, len(described.names))
    for row, metrics in zip(rows, found.metrics(), strict=True):
        print(f"{metrics.map50_95:.4f} {row.name}", flush=True)
    command = shlex.join(["python", *sys.argv])
    write(rows, found, bootstrap(found, args.rounds), args.rounds, args.out, command)


if __name__ == "__main__":
    main()
