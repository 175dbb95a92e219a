"""The readers to fuzz, with good files made of the demo, and of small graphs and networks."""

from __future__ import annotations

import copy
import random
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
from fuzz_damage import anywhere, inside_archive, inside_graph, inside_header
from onnx import numpy_helper

from dsconvert.base.errors import InputError
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import save_quantized
from dsconvert.convert.resume import META as UNFINISHED_META
from dsconvert.convert.resume import read_unfinished, write_unfinished
from dsconvert.export.check import check_accumulators
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.measure.cache import META as CACHE_META
from dsconvert.measure.cache import remembered
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.bounds import enforced
from dsconvert.photos.dataset import read_data_yaml
from dsconvert.photos.images import read_image
from dsconvert.photos.labels import read_labels
from dsconvert.scoring.candidates import load_candidate
from dsconvert.tune.latents import learned, start
from dsconvert.tune.state import META as STATE_META
from dsconvert.tune.state import State, read_state, write_state
from dsconvert.yolo.cfgfile import OURS, cfg_names, chosen_blocks
from dsconvert.yolo.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "calib" / "demo"
TESTS = ROOT / "tests"
SMALL = 5000  # weights of a layer that is kept in a finetune's file: megabytes would be damaged slowly
Inside = Callable[[bytes, random.Random], bytes]


@dataclass(frozen=True)
class Target:
    """A reader, the suffix of its files, good files to damage, and how a container is put together again so that the
    damage reaches what is inside (None: files are damaged as they are)."""

    read: Callable[[Path], Any]
    suffix: str
    seeds: list[bytes]
    inside: Inside | None = None


def targets(folder: Path) -> dict[str, Target]:
    """Readers by name; `folder` holds what they need."""
    checkpoint = DEMO / "demo.pt"
    options = QuantizeOptions(calib=DEMO / "images" / "calib", imgsz=64, samples=1, bits=4)
    loaded = load_checkpoint(checkpoint)
    with patch.object(pipeline, "remembered", wraps=remembered) as asked:
        quantized = pipeline.quantize(loaded, options, cache=folder / "cache")
    made = save_quantized(quantized, folder / "q", False)
    model = load_model(made)
    graphs = [
        export_quantized(model, layout_named(layout), 64).SerializeToString()
        for layout in ("packed", "fused", "blocked", "openvino", "int8")
    ]
    labels = [p.read_bytes() for p in sorted((DEMO / "labels").rglob("*.txt"))[:8]]
    photos = [p.read_bytes() for p in sorted((DEMO / "images").rglob("*.jpg"))[:4]]
    yamls = [(DEMO / "data.yaml").read_bytes(), b"a: &a [1, *a]\nnames: {0: x, 1: y}\nnc: 2\ntrain: [a, b]\n"]
    archive, stored = checkpoint.read_bytes(), made.read_bytes()
    two, shifted = (
        model_bytes(pipeline.quantize(loaded, replace(options, **other)).model)
        for other in ({"bits": 2}, {"bits": 4, "kds": "float", "activations": "float"})
    )
    families = other_families()
    cfgs = [(OURS / name).read_bytes() for name in cfg_names()]
    cfgs.append((DEMO / "model.yaml").read_bytes().replace(b" C3,", b" DSConv2D_C3,", 1))
    kinds = [type(layer).__name__ for layer in loaded.network.model]
    floats = float_graphs()
    return {
        "checkpoint": Target(load_checkpoint, ".pt", [archive]),
        "checkpoint pickle": Target(load_checkpoint, ".pt", [archive], inside_archive),
        "YOLOv7 and Ghost": Target(load_checkpoint, ".pt", families, inside_archive),
        **both("model", "dsconvert", load_model, [stored, two, shifted]),
        "data.yaml": Target(read_data_yaml, ".yaml", yamls),
        "cfg yaml": Target(lambda p: chosen_blocks(p, kinds), ".yaml", cfgs),
        "labels": Target(lambda p: read_labels(p, 6), ".txt", labels),
        "images": Target(read_image, ".jpg", photos),
        "onnx": Target(run_onnx, ".onnx", graphs),
        "onnx graph": Target(run_onnx, ".onnx", graphs, inside_graph),
        "float onnx": Target(float_onnx(folder), ".onnx", floats),
        "float onnx graph": Target(float_onnx(folder), ".onnx", floats, inside_graph),
        **both("finetune", STATE_META, *finetunes(model, folder)),
        **both("unfinished", UNFINISHED_META, *unfinished(model, folder)),
        **both("cache", CACHE_META, *cached(asked.call_args.args, folder)),
    }


def both(name: str, meta: str, read: Callable[[Path], Any], good: list[bytes]) -> dict[str, Target]:
    """Safetensors files damaged anywhere, and in their JSON alone."""
    return {
        name: Target(read, ".safetensors", good, anywhere(meta)),
        f"{name} header": Target(read, ".safetensors", good, inside_header(meta)),
    }


def other_families() -> list[bytes]:
    """Small YOLOv7, YOLOv7-tiny, P6 and Ghost checkpoints."""
    sys.path[:0] = [str(TESTS), str(TESTS / "help"), str(TESTS.parent / "calib" / "demo")]
    from conftest import randomise
    from fake_trees import trained
    from tables import SHORT

    return [trained(copy.deepcopy(config), strides, randomise, old=True)[0] for config, strides in SHORT.values()]


def finetunes(model: DSModel, folder: Path) -> tuple[Callable[[Path], Any], list[bytes]]:
    """A finetune that is past its last epoch: only the model that it learned is to be written."""
    layers, latents = start(model, "all", "cpu")
    small = {name for name, conv in model.convs.items() if conv.weight.vqk.numel() < SMALL}
    latents = {key: u for key, u in latents.items() if key.rpartition(".")[0] in small}
    state, path = State.new(latents), folder / "finetuning.safetensors"
    state.steps, state.log = 8, [{"map50_95": 0.4}, {"map50_95": 0.5, "loss": 1.25}, {"map50_95": 0.45, "loss": 1.0}]
    write_state(path, "key", state)

    def read(damaged: Path) -> None:
        found = read_state(damaged, "key", latents)
        if found.best_epoch >= len(found.log) or not isinstance(found.steps, int):
            raise RuntimeError("the log is none")
        best = learned(model, layers, found.best)
        check_accumulators(best)
        usable(best, damaged)

    return read, [path.read_bytes()]


def unfinished(model: DSModel, folder: Path) -> tuple[Callable[[Path], Any], list[bytes]]:
    """What a quantize run keeps until it is done: layers, of which a model is made."""
    path = folder / "unfinished.safetensors"
    write_unfinished(path, "key", model.convs)
    shapes = {name: conv.weight.vqk.shape for name, conv in model.convs.items()}

    def read(damaged: Path) -> None:
        usable(replace(model, convs={**model.convs, **read_unfinished(damaged, "key", shapes)}), damaged)

    return read, [path.read_bytes()]


def usable(model: DSModel, beside: Path) -> None:
    """Raises RuntimeError when a model made of what was read could not be read again."""
    path = beside.with_name("made.safetensors")
    path.write_bytes(model_bytes(model))
    try:
        load_model(path)
    except InputError as error:
        raise RuntimeError(f"makes a model that says: {error}") from None


def cached(given: tuple[Any, ...], folder: Path) -> tuple[Callable[[Path], Any], list[bytes]]:
    """A calibration, kept under a key; a damaged one is made again, which counts as refused here."""
    _, key, _, check, room = given
    again = folder / "again"
    again.mkdir()

    def make() -> Any:
        raise InputError("It is made again.")

    def read(damaged: Path) -> None:
        shutil.copyfile(damaged, again / f"{key}.safetensors")
        remembered(again, key, make, check, room)

    return read, [(folder / "cache" / f"{key}.safetensors").read_bytes()]


def run_onnx(path: Path) -> None:
    """What `eval` and `detect` do with an exported file, on one image, within the command line's bounds."""
    with enforced():
        candidate = load_candidate(path, None)
        candidate.predict(np.full((1, *candidate.imgsz.image), 0.5, np.float32))


def float_onnx(folder: Path) -> Callable[[Path], Any]:
    """`quantize model.onnx` on two images."""
    photos = folder / "photos"
    if not photos.exists():
        photos.mkdir()
        for source in sorted((DEMO / "images" / "calib").glob("*.jpg"))[:2]:
            shutil.copy(source, photos)

    def read(path: Path) -> None:
        with enforced():
            quantize_onnx(path, photos, OnnxPlan(block_size=4, imgsz=16, samples=2))

    return read


GRAPHS = {
    "detector": """(float[1,3,16,16] x) => (float y) {
        a = Conv<pads = [1, 1, 1, 1], strides = [2, 2]>(x, w, b) s = Sigmoid(a) m = Mul(a, s)
        g = Conv<group = 2, pads = [1, 1, 1, 1]>(m, v) r = Relu(g) t = Add(r, m)
        n = Shape(t) p = Transpose<perm = [0, 2, 3, 1]>(t) y = MatMul(p, u) }""",
    "classifier": """(float[N,3,H,W] x) => (float y) {
        a = Conv<auto_pad = "SAME_UPPER">(x, w, b) r = Relu(a) q = GlobalAveragePool(r) f = Flatten(q)
        k = Constant<value = float[8,4] {1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5,6,7,8,9,1,2,3,4,5}>()
        h = Gemm(f, k) z = ReduceSum<keepdims = 0>(h) o = Greater(z, zero)
        y = If<then_branch = t () => (float i) { i = Softmax(h) }, else_branch = e () => (float j) { j = Relu(h) }>(o)
    }""",
}


def float_graphs() -> list[bytes]:
    """Small float ONNX files with most of what makes a difference in them."""
    rng = np.random.default_rng(0)
    shapes = {"w": (8, 3, 3, 3), "b": (8,), "v": (8, 4, 3, 3), "u": (8, 6), "zero": ()}
    made = []
    for text in GRAPHS.values():
        model = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : 17]> agraph {text}')
        read = {name for node in model.graph.node for name in node.input}
        model.graph.initializer.extend(
            numpy_helper.from_array(rng.normal(size=shape).astype(np.float32), name)
            for name, shape in shapes.items() if name in read
        )  # fmt: skip
        made.append(model.SerializeToString())
    return made
