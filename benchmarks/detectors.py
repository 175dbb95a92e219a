"""ONNX detectors of other families: what dsconvert makes of them, beside ONNX Runtime's static int8 and OpenVINO NNCF.

    python benchmarks/detectors.py --models ../shared/data/onnx --data ../shared/data/coco/coco500.yaml

Each file is converted on the first 128 calibration images that an even spread takes, by each tool, its decoding kept
float by all. mAP50-95 is measured on the validation images, and its drops are paired over them; latencies are measured
in one process, in turns. Files that are made already, in --work, are taken as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter
import onnxruntime as ort
import torch
from bootstrap import bootstrap, image_draws
from machine import cpu_name
from numpy.typing import NDArray
from peers import Images, decoded, nncf_int8, openvino_model, ort_static

from dsconvert.base.size import Size
from dsconvert.convert.exporting import onnx_bytes
from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
from dsconvert.convert.onnx_int8 import OnnxInt8
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import save_quantized
from dsconvert.export.weights.layouts import PACKED
from dsconvert.onnxfile.decoding import boxes_of
from dsconvert.onnxfile.operators import with_operators
from dsconvert.onnxfile.presets import Preset, named_preset
from dsconvert.photos.dataset import read_data_yaml
from dsconvert.photos.form import InputForm
from dsconvert.scoring.accuracy import Predictor, detect_all
from dsconvert.scoring.candidates import load_candidate
from dsconvert.scoring.latency import interleaved_times
from dsconvert.yolo.checkpoint import load_checkpoint

# files by the preset of their family; those without labels for what they detect are timed alone
FAMILIES = {
    "yolox_nano.onnx": "yolox", "picodet_s_416_coco.onnx": "picodet", "nanodet.onnx": "nanodet",
    "v5Lite-e-sim-320.onnx": "v5lite", "FastestDet.onnx": "fastestdet", "yolov8-lite-t.onnx": "yolov8-face",
}  # fmt: skip
UNLABELLED = ("yolov8-lite-t.onnx",)
FAST = "dsconvert, layout fast"
SAMPLES = 128
TURNS = 60  # of latency
LEAST_SCORE = 0.05  # of boxes that are looked at: with all of them suppression takes most of an hour


class OpenVinoFile:
    """An OpenVINO IR as a predictor, what is float in it in f32."""

    def __init__(self, path: Path, preset: Preset, size: Size) -> None:
        self.compiled, _ = openvino_model(path, "f32")
        self.preset, self.size = preset, size

    @property
    def form(self) -> InputForm:
        """Of its input."""
        return self.preset.form

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        found = self.compiled([batch])
        return boxes_of(self.preset.decode, [np.asarray(v) for v in found.values()], self.size, 0)[None]


def inputs_of(path: Path) -> tuple[str, Size]:
    """The name of the image that a file takes, and its size."""
    entry = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0]
    return str(entry.name), Size(int(entry.shape[2]), int(entry.shape[3]))


def made(target: Path, make: Callable[[], object]) -> bool:
    """Make a file unless it is there; whether it is then."""
    if not target.exists():
        began = time.perf_counter()
        try:
            make()
        except Exception as error:  # a peer that fails on a file is a result, too
            print(f"{target.name}: {type(error).__name__}: {str(error)[:200]}", flush=True)
            return False
        print(f"{target.name}: {time.perf_counter() - began:.0f} s", flush=True)
    return True


def ours(source: Path, target: Path, data: Path, preset: Preset, **how: Any) -> None:
    """Convert with the defaults, or as the plan says."""
    plan = OnnxPlan(samples=SAMPLES, form=preset.form, **how)
    found = quantize_onnx(source, data, plan, note=lambda sentence: print(f"  {sentence}", flush=True))
    target.write_bytes(found.model.SerializeToString())
    said: dict[str, Any] = {"weight bits": found.weight_bits}
    if isinstance(found, OnnxInt8):
        said |= {"float share": found.low.float_share, "stayed": dict(found.low.stayed)}
    target.with_suffix(".json").write_text(json.dumps(said))


def for_peers(source: Path, work: Path) -> Path:
    """The file as other tools can take it: stored tensors are no inputs, and opset 13 knows scales by channel."""
    target = work / f"{source.stem}-13.onnx"
    model = onnx.load(source)
    stored = {t.name for t in model.graph.initializer}
    inputs = [v for v in model.graph.input if v.name not in stored]
    del model.graph.input[:]
    model.graph.input.extend(inputs)
    model.ir_version = max(model.ir_version, 7)
    if model.opset_import[0].version < 13:
        model = onnx.version_converter.convert_version(model, 13)
    onnx.save(model, target)
    return target


def files_for(source: Path, data: Path, preset: Preset, work: Path, fast: bool) -> dict[str, Path]:
    """Every tool's file; `fast`: ours in layout fast, too, whose numbers are those of packed."""
    name, size = inputs_of(source)
    images: list[NDArray[np.float32]] = []

    def given() -> Images:
        if not images:
            images.extend(decoded(data, size, SAMPLES, preset.form))
        return images

    made_by: dict[str, tuple[Path, Callable[[Path], object]]] = {
        "dsconvert": (work / f"{source.stem}-packed.onnx", lambda t: ours(source, t, data, preset)),
        "ONNX Runtime int8": (
            work / f"{source.stem}-ort.onnx", lambda t: ort_static(for_peers(source, work), t, given(), False, name)
        ),
        "OpenVINO NNCF": (work / f"{source.stem}-nncf.xml", lambda t: nncf_int8(for_peers(source, work), t, given())),
    }  # fmt: skip
    if fast:
        target = work / f"{source.stem}-fast.onnx"
        made_by[FAST] = (target, lambda t: ours(source, t, data, preset, layout="fast"))
    found = {"float32": source}
    for tool, (target, make) in made_by.items():
        if made(target, lambda make=make, target=target: make(target)):  # type: ignore[misc]
            found[tool] = target
    return found


def both_ways(checkpoint: Path, data: Path, work: Path) -> dict[str, Path]:
    """A checkpoint's float file, and what becomes of the checkpoint and of that file by their two ways."""
    names = ("float32", "dsconvert, of the checkpoint", "dsconvert, of its ONNX file")
    files = {name: work / f"{checkpoint.stem}-{i}.onnx" for i, name in enumerate(names)}
    float_file, by_checkpoint, by_onnx = files.values()

    def convert(target: Path) -> None:
        options = QuantizeOptions(calib=data, samples=SAMPLES)
        folder = work / checkpoint.stem
        save_quantized(quantize(load_checkpoint(checkpoint), options), folder, force=True)
        target.write_bytes(onnx_bytes(folder / "model.safetensors", PACKED, None))

    made(float_file, lambda: float_file.write_bytes(onnx_bytes(checkpoint, PACKED, None)))
    made(by_checkpoint, lambda: convert(by_checkpoint))
    made(by_onnx, lambda: ours(float_file, by_onnx, data, Preset()))
    return files


def size_of(path: Path) -> int:
    """Bytes of a file, of an OpenVINO IR with its weights."""
    return path.stat().st_size + (path.with_suffix(".bin").stat().st_size if path.suffix == ".xml" else 0)


def accuracies(files: dict[str, Path], data: Path, preset: Preset, rounds: int) -> dict[str, dict[str, float]]:
    """mAP50-95 in points, and what each file loses with its interval, over the validation images."""
    _, size = inputs_of(files["float32"])
    described = read_data_yaml(data)
    predictors: list[Predictor] = [
        OpenVinoFile(path, preset, size) if path.suffix == ".xml" else load_candidate(path, size, preset=preset).predict
        for path in files.values()
    ]
    found = detect_all(predictors, described.val, size, len(described.names), confidence=LEAST_SCORE)
    samples = bootstrap(found, image_draws(len(found.truths), rounds))
    low, high = np.percentile(100 * (samples[:, :1] - samples), (2.5, 97.5), axis=0)
    scores = [100 * score.map50_95 for score in found.metrics()]
    return {
        tool: {"map": scores[i], "drop": scores[0] - scores[i], "low": float(low[i]), "high": float(high[i])}
        for i, tool in enumerate(files)
    }


def latencies(files: dict[str, Path], threads: int) -> dict[str, float]:
    """Median, over turns, of each ONNX file's time as a share of the float file's."""
    running = {}
    for tool, path in files.items():
        if path.suffix == ".onnx":
            options = with_operators(ort.SessionOptions())
            options.intra_op_num_threads, options.log_severity_level = threads, 3
            options.add_session_config_entry("session.force_spinning_stop", "1")
            running[tool] = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    entry = next(iter(running.values())).get_inputs()[0]
    shape = [n if isinstance(n, int) else 1 for n in entry.shape]
    feed = {entry.name: np.random.default_rng(0).random(shape, np.float32)}
    times = interleaved_times([partial(one.run, None, feed) for one in running.values()], TURNS)
    ratios = {tool: float(np.median(t / times[0])) for tool, t in zip(running, times, strict=True)}
    return {**ratios, "float32 ms": float(np.median(times[0]))}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, required=True, help="folder of the float files")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/detectors"))
    parser.add_argument("--out", type=Path, default=Path("docs/detectors.json"))
    parser.add_argument("--only", nargs="*", help="names of files")
    parser.add_argument("--parts", nargs="*", default=["accuracy", "latency"])
    parser.add_argument("--checkpoint", type=Path, help="one that is converted both ways, as it is and as ONNX")
    parser.add_argument("--fast", nargs="*", default=[], help="names of files that are timed in layout fast, too")
    parser.add_argument("--rounds", type=int, default=1000)
    args = parser.parse_args(arguments)
    args.work.mkdir(parents=True, exist_ok=True)
    threads = len(os.sched_getaffinity(0))
    torch.set_num_threads(threads)
    ort.set_default_logger_severity(3)
    results = json.loads(args.out.read_text()) if args.out.exists() else {"files": {}}
    results |= {"command": shlex.join(["python", *sys.argv]), "date": date.today().isoformat(), "cpu": cpu_name(),
                "threads": threads}  # fmt: skip

    def measure(name: str, files: dict[str, Path], preset: Preset) -> None:
        row = results["files"].setdefault(name, {})
        row["bytes"] = {tool: size_of(path) for tool, path in files.items()}
        told = files.get("dsconvert", files["float32"]).with_suffix(".json")
        row |= json.loads(told.read_text()) if told.exists() else {}
        if "latency" in args.parts:
            row["latency"] = latencies(files, threads)
        if "accuracy" in args.parts and name not in UNLABELLED:
            compared = {tool: path for tool, path in files.items() if tool != FAST}
            row["accuracy"] = accuracies(compared, args.data, preset, args.rounds)
        print(name, json.dumps(row, indent=1), flush=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")

    for name, family in FAMILIES.items():
        if args.only is None or name in args.only:
            preset = named_preset(family)
            measure(name, files_for(args.models / name, args.data, preset, args.work, name in args.fast), preset)
    if args.checkpoint is not None:
        measure(args.checkpoint.name, both_ways(args.checkpoint, args.data, args.work), Preset())


if __name__ == "__main__":
    main()
