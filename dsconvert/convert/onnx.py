"""From a float ONNX file and images to the same graph with DSConv weights: the steps, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch

from dsconvert.base.errors import CheckError, InputError
from dsconvert.base.files import scratch_folder
from dsconvert.base.text import Sentence
from dsconvert.convert.onnx_lockstep import fit_lockstep
from dsconvert.convert.onnx_rewrite import LAYOUTS, with_floats, with_integers
from dsconvert.dsconv.codes import usual_format
from dsconvert.export.weights.layouts import PACKED, Layout
from dsconvert.fit.layer import GPTQ
from dsconvert.graph.integer import QConv
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.images import as_input, batches, pictures
from dsconvert.onnxfile.layers import Layer, find_layers
from dsconvert.onnxfile.presets import INPUT_KEY, Preset, as_text
from dsconvert.onnxfile.scale import warning
from dsconvert.onnxfile.source import Array, Source, opset_of, read_source
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.photos.images import spread
from dsconvert.photos.sameness import warning_of

LITTLE = 0.1  # share of all weights that the last layers may hold to be spared
MOST_COLUMNS = 4608  # 512 channels of 3x3: H takes 170 MB, and what is computed from it some times that
# Two engines' or two graphs' float32 sums, in another order, through a deep network.
RTOL, ATOL = 1e-3, 1e-4
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class OnnxPlan:
    """What decides the result besides the file, the images and the machine."""

    bits: int = 4  # 2..8, of every layer but the first, depthwise ones, and those at the end that hold few weights: 8
    block_size: int = 32  # input channels a shift covers
    layout: str = PACKED.name  # or int8, which keeps the file's opset
    imgsz: int | None = None  # side of the images for a file that leaves it open, pixels; None: 640
    samples: int = 256  # most calibration images used
    form: InputForm = PLAIN  # of the input that the file wants
    decode: str | None = None  # the rule that makes boxes of its outputs, see `onnxfile.rules`; None: their shapes tell
    seed: int = 0  # of every random choice
    split: str | None = None  # which images of a data.yaml; None: train, else val
    strict: bool = False  # lists of which a part cannot be used are refused

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.block_size < 1 or self.samples < 1:
            raise InputError("bits must be 2 to 8, block_size and samples at least 1.")
        if self.layout not in LAYOUTS:
            raise InputError(f"{self.layout!r} is not a layout for an ONNX file; there are {', '.join(LAYOUTS)}.")


@dataclass(frozen=True)
class OnnxConverted:
    """A converted file, and what its owner should know of it."""

    model: onnx.ModelProto  # what is written
    source: Source  # what it was made from, its opset raised where needed
    layers: list[Layer]  # those that are converted
    fitted: dict[int, QConv]  # their weights by node index
    images: int  # that it was fitted on
    skipped: list[str]  # why files could not be read
    warnings: tuple[str, ...] = ()  # sentences about the images and their scale

    @property
    def weight_bits(self) -> float:
        """Mean stored bits of a converted weight, shifts included."""
        weights = [conv.weight for conv in self.fitted.values()]
        return sum(w.weight_bits * w.vqk.numel() for w in weights) / sum(w.vqk.numel() for w in weights)

    def float_model(self) -> onnx.ModelProto:
        """The source with W' as float weights: what the written model computes."""
        return with_floats(self.source, self.layers, self.fitted)


def quantize_onnx(
    path: Path, calib: Path, plan: OnnxPlan | None = None, progress: Progress | None = None,
    note: Callable[[str], None] = lambda sentence: None,
) -> OnnxConverted:  # fmt: skip
    """Fit the Conv, Gemm and MatMul weights of a float ONNX file on what they see of the images. `note` hears at once
    what is in the result's warnings.

    Raises InputError when the file or the images cannot be used, CheckError when the result computes something else
    than its weights say."""
    plan, report = plan or OnnxPlan(), progress or (lambda stage, done, total: None)
    threads, layout = torch.get_num_threads(), LAYOUTS[plan.layout]
    given = read_source(path, plan.imgsz, threads)
    find_layers(given)  # nothing to do is said before images are read
    paths = calibration_images(calib, plan.split, plan.strict)
    images, skipped = pictures(spread(paths, plan.samples), given.image, plan.form)
    report("images", len(images), len(images))
    probe = as_input(images[:1] * given.image.batch, given.image, plan.form)
    source = _raised(path, given, layout, probe)
    running = session(given.model.SerializeToString(), threads, str(path))
    doubt = warning(lambda x: running.run(None, {given.image.name: x}), images, given.image, plan.form, plan.decode)
    if doubt:
        note(doubt)
    layers = find_layers(source)
    bits = _bits(layers, plan.bits, source)
    formats = {n.index: usual_format(bits[n.index], n.weight.shape[1], plan.block_size) for n in layers}
    with scratch_folder() as folder, torch.no_grad():
        fitted = fit_lockstep(
            source, layers, batches(images, source.image, plan.form), GPTQ(most_columns=MOST_COLUMNS), formats,
            folder, threads, plan.seed, lambda done, total: report("fit", done, total),
            math.ceil(len(images) / source.image.batch),
        )  # fmt: skip
    same = warning_of(image.transpose(2, 0, 1) for image in images)
    if same:
        note(same)
    made = OnnxConverted(
        with_integers(source, layers, fitted, layout), source, layers, fitted, len(images), skipped,
        tuple(sentence for sentence in (doubt, same) if sentence),
    )  # fmt: skip
    _check(made, probe)
    preset = Preset(plan.form, plan.decode)
    if preset != Preset():  # so that eval, detect and compare know it
        made.model.metadata_props.add(key=INPUT_KEY, value=as_text(preset))
    return made


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


def _raised(path: Path, given: Source, layout: Layout, probe: Array) -> Source:
    """The source at an opset that knows the layout; it must compute what it did before."""
    before = _outputs(given.model, given, probe, path)
    if given.opset >= layout.rewrites:
        return given
    hint = (
        Sentence("give {layout} int8, which keeps it") if given.opset >= LAYOUTS["int8"].rewrites else "export it anew"
    )
    refused = InputError.naming(
        "{} has opset {}, which cannot be raised to {}; {}.", path, given.opset, layout.rewrites, hint
    )
    try:
        model = onnx.version_converter.convert_version(given.model, layout.rewrites)
        made = Source(model, given.image)
        after = _outputs(model, made, probe, path)
    except Exception:  # the converter raises many kinds, on operators that it does not know
        raise refused from None
    if opset_of(model) < layout.rewrites or not _close(before, after):
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
    there = {v.name for v in model.graph.output}
    if more:
        copied = onnx.ModelProto()
        copied.CopyFrom(model)
        copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in more if name not in there)
        model = copied
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
