"""From a float ONNX file and images to one with DSConv weights: in integers throughout (see `onnx_int8`), or, where
activations are to stay float, the same graph with other weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dsconvert.base.errors import CheckError, InputError
from dsconvert.base.files import scratch_folder
from dsconvert.base.size import SizeLike
from dsconvert.base.text import Sentence
from dsconvert.convert.division import divided
from dsconvert.convert.onnx_int8 import OnnxInt8, Wish, quantize_lowered, taken_apart
from dsconvert.convert.onnx_lockstep import fit_lockstep
from dsconvert.convert.onnx_rewrite import LAYOUTS, with_floats, with_integers
from dsconvert.dsconv.codes import usual_format
from dsconvert.export.weights.layouts import PACKED, check_library, layout_named
from dsconvert.fit.layer import GPTQ
from dsconvert.graph.integer import QConv
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.images import batches, pictures, probe_of
from dsconvert.onnxfile.layers import Layer, find_layers
from dsconvert.onnxfile.lower import NotLowered
from dsconvert.onnxfile.presets import INPUT_KEY, Preset, as_text
from dsconvert.onnxfile.scale import warning
from dsconvert.onnxfile.source import Array, Source, giving, opset_of, read_source
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.photos.images import Image
from dsconvert.photos.sameness import warning_of

LITTLE = 0.1  # share of all weights that the last layers may hold to be spared
MOST_COLUMNS = 4608  # 512 channels of 3x3: H takes 170 MB, and what is computed from it some times that
# Two engines' or two graphs' float32 sums, in another order, through a deep network.
RTOL, ATOL = 1e-3, 1e-4
# layouts by what becomes of activations
KINDS = {"int8": ("packed", "fused", "fast", "int8", "blocked", "openvino"), "float": tuple(LAYOUTS)}
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OnnxPlan:
    """What decides the result besides the file, the images and the machine.

    With float activations, the first layer, depthwise ones, and those at the end that hold few weights have 8 bits."""

    bits: int | None = None  # 2..8, of every layer; None: by layer, within the bytes of 4; with float activations 4
    block_size: int | None = None  # input channels a shift covers; None: by layer; with float activations 32
    layout: str = PACKED.name  # or int8, which needs a lower opset; with int8 activations also OpenVINO's
    imgsz: SizeLike | None = None  # of the images for a file that leaves it open, pixels; None: 640
    samples: int = 256  # most calibration images used
    form: InputForm = PLAIN  # of the input that the file wants
    decode: str | None = None  # the rule that makes boxes of its outputs, see `onnxfile.rules`; None: their shapes tell
    seed: int = 0  # of every random choice
    split: str | None = None  # which images of a data.yaml; None: train, else val
    strict: bool = False  # lists of which a part cannot be used are refused
    activations: str = "int8"  # or float: then weights alone are quantized
    target_bytes: int | None = None  # largest file, bytes; None: by bits
    finetune_steps: int | None = None  # of the brief fine-tune; 0: none; None: as many as seem of use
    finetune_time: float | None = None  # seconds that it takes at most; 0: none; None: any

    def __post_init__(self) -> None:
        bits, block = (usual if given is None else given for given, usual in ((self.bits, 4), (self.block_size, 32)))
        if not 2 <= bits <= 8 or block < 1 or self.samples < 1:
            raise InputError("bits must be 2 to 8, block_size and samples at least 1.")
        if self.activations not in KINDS:
            raise InputError(f"activations {self.activations!r} is not one of {', '.join(KINDS)}.")
        if self.bits is not None and self.target_bytes is not None:
            raise InputError.naming("{bits} and {target_size} each decide the widths; give one of them.")
        if self.layout not in KINDS[self.activations]:
            there = ", ".join(KINDS[self.activations])
            raise InputError(
                f"{self.layout!r} is not a layout for an ONNX file with {self.activations} activations; there are "
                f"{there}."
            )
        if self.activations == "float" and self.target_bytes is not None:
            raise InputError.naming("{target_size} needs int8 activations; leave out {activations} float.")

    @property
    def wish(self) -> Wish:
        """What is asked of a file that is converted to integers."""
        return Wish(
            self.bits, self.block_size, self.target_bytes, layout_named(self.layout), self.seed, self.finetune_steps,
            self.finetune_time,
        )  # fmt: skip


@dataclass(frozen=True)
class OnnxConverted:
    """A converted file, and what its owner should know of it."""

    model: onnx.ModelProto  # what is written
    source: Source  # what it was made from, its opset raised where needed
    layers: list[Layer]  # those that are converted
    fitted: dict[int, QConv]  # their weights by node index
    images: int  # that it was fitted on
    skipped: tuple[str, ...]  # why files could not be read
    warnings: tuple[str, ...] = ()  # sentences about the images and their scale

    @property
    def weight_bits(self) -> float:
        """Mean stored bits of a converted weight, shifts included."""
        weights = [conv.weight for conv in self.fitted.values()]
        return sum(w.weight_bits * w.vqk.numel() for w in weights) / sum(w.vqk.numel() for w in weights)

    @property
    def table(self) -> list[tuple[str, tuple[int, ...], int]]:
        """Name, weight shape and bits of every layer, in order."""
        return [(n.name, tuple(n.weight.shape), self.fitted[n.index].weight.bits) for n in self.layers]

    def float_model(self) -> onnx.ModelProto:
        """The source with W' as float weights: what the written model computes."""
        return with_floats(self.source, self.layers, self.fitted)


def quantize_onnx(
    path: Path, calib: Path, plan: OnnxPlan | None = None, progress: Progress | None = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> OnnxConverted | OnnxInt8:  # fmt: skip
    """Convert a float ONNX file on images. `note` hears at once what is in the result's warnings.

    A file whose layers the graph cannot express keeps float activations, and `note` hears why. Raises InputError when
    the file or the images cannot be used, CheckError when the result computes something else than it should."""
    plan, report = plan or OnnxPlan(), progress or (lambda stage, done, total: None)
    threads = torch.get_num_threads()
    check_library(layout_named(plan.layout))  # before minutes of work
    given = read_source(path, plan.imgsz, threads)
    find_layers(given)  # nothing to do is said before images are read
    finetunes = plan.activations == "int8" and plan.wish.finetunes
    paths = divided(calibration_images(calib, plan.split, plan.strict), plan.samples, False, finetunes)
    images, skipped = pictures(paths.fit, given.image, plan.form)
    report("images", len(images), len(images))
    running = session(given.model.SerializeToString(), threads, str(path))
    said = [
        warning(lambda x: running.run(None, {given.image.name: x}), images, given.image, plan.form, plan.decode),
        warning_of(image.transpose(2, 0, 1) for image in images),
    ]
    for sentence in filter(None, said):
        note(sentence)
    probe = probe_of(images, given.image, plan.form)
    if plan.activations == "int8":
        try:
            source = _raised(path, given, layout_named(plan.layout).opset, probe)
            facts, low = taken_apart(source, probe)
        except NotLowered as why:
            if plan.layout not in LAYOUTS:
                raise InputError.naming(
                    "{} keeps float activations, as {}; give {layout} packed or int8.", path, str(why)
                ) from None
            said.append(f"Activations stay float, and no speed is gained, as {why}.")
            note(str(said[-1]))
        else:
            judges: list[Image] = []
            with suppress(InputError):  # there is no fine-tune where none of them can be read
                judges = pictures(paths.judges, given.image, plan.form)[0] if paths.judges else []
            with scratch_folder() as folder:
                converted = quantize_lowered(facts, low, images, judges, plan.form, plan.wish, report, folder)
            _note_input(converted.model, plan)
            for sentence in converted.warnings:
                note(sentence)
            return replace(
                converted, skipped=tuple(skipped), warnings=(*filter(None, said), *converted.warnings)
            )  # fmt: skip
    return _weights_alone(path, given, images, skipped, said, probe, plan, report)


def _weights_alone(
    path: Path, given: Source, images: list[Image], skipped: list[str], said: list[str | None], probe: Array,
    plan: OnnxPlan, report: Progress,
) -> OnnxConverted:  # fmt: skip
    """Fit the Conv, Gemm and MatMul weights on what they see of the images."""
    threads, layout = torch.get_num_threads(), LAYOUTS[plan.layout]
    source = _raised(path, given, layout.rewrites, probe)
    layers = find_layers(source)
    bits = _bits(layers, plan.bits or 4, source)
    formats = {n.index: usual_format(bits[n.index], n.weight.shape[1], plan.block_size or 32) for n in layers}
    with scratch_folder() as folder, torch.no_grad():
        fitted = fit_lockstep(
            source, layers, batches(images, source.image, plan.form), GPTQ(most_columns=MOST_COLUMNS), formats,
            folder, threads, plan.seed, lambda done, total: report("fit", done, total),
            math.ceil(len(images) / source.image.batch),
        )  # fmt: skip
    made = OnnxConverted(
        with_integers(source, layers, fitted, layout), source, layers, fitted, len(images), tuple(skipped),
        tuple(filter(None, said)),
    )  # fmt: skip
    _check(made, probe)
    _note_input(made.model, plan)
    return made


def _note_input(model: onnx.ModelProto, plan: OnnxPlan) -> None:
    """Say in the file which input it wants, so that eval, detect and compare know it."""
    preset = Preset(plan.form, plan.decode)
    if preset != Preset():
        model.metadata_props.add(key=INPUT_KEY, value=as_text(preset))


def _bits(layers: list[Layer], bits: int, source: Source) -> dict[int, int]:
    """Bits of every layer: at the ends of a network errors count most, and one weight cannot share a shift."""
    total = sum(layer.weight.numel() for layer in layers)
    used = {i for layer in layers for i in source.needed([layer.value])}
    last = [layer for layer in layers if layer.index not in used]
    edges = {layers[0].index}
    if sum(layer.weight.numel() for layer in last) < LITTLE * total:
        edges |= {layer.index for layer in last}
    depthwise = {layer.index for layer in layers if layer.weight.shape[1] == 1}
    return {layer.index: 8 if layer.index in edges | depthwise else bits for layer in layers}


def _raised(path: Path, given: Source, opset: int, probe: Array) -> Source:
    """The source at that opset or a later one; it must compute what it did before."""
    before = _outputs(given.model, given, probe, path)
    if given.opset >= opset:
        return given
    hint = (
        Sentence("give {layout} int8, which keeps it") if given.opset >= LAYOUTS["int8"].rewrites else "export it anew"
    )
    refused = InputError.naming("{} has opset {}, which cannot be raised to {}; {}.", path, given.opset, opset, hint)
    try:
        model = onnx.version_converter.convert_version(given.model, opset)
        made = Source(model, given.image)
        after = _outputs(model, made, probe, path)
    except Exception:  # the converter raises many kinds, on operators that it does not know
        raise refused from None
    if opset_of(model) < opset or not _close(before, after):
        raise refused
    find_layers(made)
    return made


def _check(made: OnnxConverted, probe: Array) -> None:
    """The written file against W' as float weights, layer by layer: an end may hide what goes wrong before it."""
    names = [made.source.nodes[layer.index].output[0] for layer in made.layers]
    wanted, found = (_outputs(m, made.source, probe, None, names) for m in (made.float_model(), made.model))
    if not _close(wanted, found):
        raise CheckError("The file computes something else than its weights say, so it was not written; please report.")


def _outputs(
    model: onnx.ModelProto, source: Source, probe: Array, path: Path | None, more: Sequence[str] = ()
) -> list[Any]:
    """The model's outputs and `more` of its values. Raises InputError about the file at `path`, which must compute the
    same each time, CheckError without."""
    model = giving(model, more) if more else model
    try:
        running = session(model.SerializeToString(), torch.get_num_threads(), str(path or "The file"))
        found = list(running.run(None, {source.image.name: probe}))
        again = found if path is None else running.run(None, {source.image.name: probe})
    except InputError:
        raise
    except Exception:  # onnxruntime raises many kinds
        if path is None:
            raise CheckError("ONNX Runtime fails on the file that was made, so it was not written.") from None
        sides = f"{source.image.width} by {source.image.height}"
        raise InputError(f"{path} fails in ONNX Runtime on an image of {sides} pixels.") from None
    if not _close(found, again):
        raise InputError(f"{path} computes something else each time it runs, so nothing can be fitted to it.")
    return found


def _close(wanted: list[Any], found: list[Any]) -> bool:
    """Equal but for rounding. Outputs that are no float arrays (classes, places) may hang on a rounding, and are not
    compared, nor are those whose number of rows does."""
    pairs = [(w, f) for w, f in zip(wanted, found, strict=True) if getattr(w, "dtype", np.dtype(int)).kind == "f"]
    return all(
        np.allclose(f, w, RTOL, ATOL * float(np.abs(w).max(initial=0)), equal_nan=True)
        for w, f in pairs if f.shape == w.shape
    )  # fmt: skip
