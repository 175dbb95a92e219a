"""Load anything that can be evaluated (`.pt`, `.safetensors`, `.onnx`) as one kind of value."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsconvert.base import workers
from dsconvert.base.errors import InputError, printable, refusing
from dsconvert.base.filekinds import CHECKPOINT, MODEL, file_kind
from dsconvert.base.size import USUAL, Size, SizeLike
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import export_float, export_quantized
from dsconvert.export.weights.layouts import PACKED, REAL
from dsconvert.graph.ir import ConvParams
from dsconvert.model.file import load_model
from dsconvert.onnxfile.bounds import Bounds
from dsconvert.onnxfile.decoding import SHAPES, OtherFamily, boxes_of, check_scores, classes_of, usual_names
from dsconvert.onnxfile.engines import TYPES, Session, as_input, check_image_input, check_pixels, load_file, session
from dsconvert.onnxfile.external import parsed
from dsconvert.onnxfile.images import refuse_scaled_bytes
from dsconvert.onnxfile.inspect import conv_weights
from dsconvert.onnxfile.presets import INPUT_KEY, Preset, of_text
from dsconvert.onnxfile.rules import Unfit
from dsconvert.onnxfile.trial import try_out
from dsconvert.photos.form import InputForm
from dsconvert.scoring.accuracy import Predictor
from dsconvert.scoring.masks import MaskPredictor
from dsconvert.scoring.metadata import MAX_CLASSES, NMS_KEY, class_names, suppression
from dsconvert.scoring.predictors import BoundedPredictor, float_predictor, model_predictor
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.layers import MAX_MASKS
from dsconvert.yolo.lower import lower

MAX_NUMBERS = 5 + MAX_CLASSES + MAX_MASKS  # numbers of a box at most
MAX_PROTOTYPES = 16  # prototype numbers for each pixel of the image at most; the published heads have two


@dataclass(frozen=True)
class Candidate:
    """A model ready to be measured.

    `predict` is for accuracy. It runs a `.pt` in float and a `.safetensors` in integers, both in torch, and an `.onnx`
    in ONNX Runtime. `run_once` is one inference in ONNX Runtime, for latency. The first two are exported in memory for
    it, so that all latencies come from one engine.
    """

    path: Path
    format: str
    names: tuple[str, ...]
    imgsz: Size
    weight_bits: float
    predict: Predictor
    run_once: Callable[[], object]
    nc: int  # number of classes; 0 if unknown
    limits: Nms | None = None  # of a file that ends with non-maximum suppression
    batch: int = 1  # images that the file takes at once; `run_once` runs so many
    input_type: type[Any] = np.float32  # numpy type of the input
    # returns an ONNX file's unread outputs for one image
    outputs: Callable[[NDArray[np.float32]], list[Any]] | None = None

    @property
    def size_bytes(self) -> int:
        """Size of the file."""
        return self.path.stat().st_size

    @property
    def named(self) -> Candidate:
        """The same model; if it has no class names and 80 classes, with COCO's names."""
        return replace(self, names=usual_names()) if not self.names and self.nc == len(usual_names()) else self


class OtherOutput(InputError):
    """A file's outputs are not boxes in a known form."""


def load_candidate(
    path: Path, imgsz: SizeLike | None, device: str = "cpu", preset: Preset | None = None
) -> Candidate:  # fmt: skip
    """Load a model for evaluation.

    imgsz: side of the images; None: the size that the model was made for, or 640.
    device: as for `workers.named_device`. Only a checkpoint can run on another device than the CPU.
    preset: of an ONNX file; None: what its metadata says, or YOLOv5's input and outputs recognised by shape.

    Raises InputError when the model cannot be loaded so.
    """
    kind, asked = file_kind(path), Size.perhaps(imgsz)
    if preset is not None and kind in (CHECKPOINT, MODEL):
        raise InputError.naming("{} knows its own input; {input} and its options are for ONNX files only.", path)
    if kind == CHECKPOINT:
        return _float(path, asked or USUAL, device)
    if workers.named_device(device) != "cpu":
        raise InputError.naming(
            "{} runs on the CPU here; leave out {device} {}, or give the float checkpoint.", path, device
        )
    return _converted(path, asked) if kind == MODEL else _onnx(path, asked, preset)


def load_candidates(paths: Sequence[Path], imgsz: SizeLike | None, preset: Preset | None = None) -> list[Candidate]:
    """Load several models for one image size: `imgsz`, or the size that they were made for (a `.pt` fits any).

    preset: of all ONNX files.

    Raises InputError when a model cannot be loaded, or sizes differ.
    """
    kinds = {p: file_kind(p) for p in paths}
    if preset is not None and set(kinds.values()) <= {CHECKPOINT, MODEL}:
        raise InputError.naming("{input} and its options are for ONNX files, and none of the models is one.")
    sized = {
        p: load_candidate(p, imgsz, preset=None if kind == MODEL else preset)
        for p, kind in kinds.items() if kind != CHECKPOINT
    }  # fmt: skip
    sizes = {c.imgsz for c in sized.values()}
    if len(sizes) > 1:
        several = ", ".join(map(str, sorted(sizes)))
        raise InputError.naming("The models were made for different image sizes, {}; give {imgsz}.", several)
    given = sizes.pop() if sizes else imgsz
    return [sized[p] if p in sized else load_candidate(p, given) for p in paths]


def _once(make: Callable[[], Session], imgsz: Size, count: int = 1) -> Callable[[], object]:
    """Return one inference on `count` fixed random images; the session is made at the first call, as it may not be
    needed.
    """

    @functools.cache
    def prepared() -> Callable[[], object]:
        running = make()
        entry = running.inner.get_inputs()[0]
        kind = TYPES.get(entry.type, np.float32)
        image = as_input(np.random.default_rng(0).random((count, *imgsz.image), np.float32), kind)
        return running.repeated({entry.name: image})

    return lambda: prepared()()


def _check_size(path: Path, imgsz: Size, stride: int) -> None:
    if not imgsz.fits(stride):
        raise InputError.naming("{imgsz} {} is not a multiple of the stride {} of {}.", imgsz, stride, path)


def _float(path: Path, imgsz: Size, device: str = "cpu") -> Candidate:
    checkpoint = load_checkpoint(path)
    head = checkpoint.head
    _check_size(path, imgsz, head.stride)
    graph, params = lower(checkpoint.network.fused())

    def running() -> Session:
        return session(export_float(graph, params, head, imgsz).SerializeToString(), torch.get_num_threads(), str(path))

    bits = float(checkpoint.stored_bits)
    device = workers.device(device)
    own = {name: ConvParams(p.weight.to(device), p.bias.to(device)) for name, p in params.items()}
    # the bound is one of main memory, of which CUDA reserves more than it uses
    bounds = Bounds(str(path), path.stat().st_size) if device == "cpu" else None
    predict = float_predictor(graph, own, head, device, bounds)
    return Candidate(path, "pt", head.names, imgsz, bits, predict, _once(running, imgsz), head.nc)


def _converted(path: Path, asked: Size | None) -> Candidate:
    model = load_model(path)
    imgsz = asked or model.imgsz
    check_pixels(path, imgsz.image, asked)
    _check_size(path, imgsz, model.head.stride)
    layout = REAL if model.has_real_alpha else PACKED

    def running() -> Session:
        return session(export_quantized(model, layout, imgsz).SerializeToString(), torch.get_num_threads(), str(path))

    predict = model_predictor(model, bounds=Bounds(str(path), path.stat().st_size))
    return Candidate(path, "safetensors", model.head.names, imgsz, model.weight_bits, predict, _once(running, imgsz),
                     model.head.nc)  # fmt: skip


def _onnx(path: Path, asked: Size | None, preset: Preset | None) -> Candidate:
    if not path.is_file():
        raise InputError(f"There is no ONNX file at {path}.")
    given = parsed(path)
    with refusing(f"{path} is not an ONNX file that ONNX Runtime can run."):
        weights = conv_weights(given.model)
    try_out(path, "onnxruntime", torch.get_num_threads(), asked, given.size)
    running = load_file(path, torch.get_num_threads(), given.size)
    entries = running.inner.get_inputs()
    check_image_input(path, [e.shape for e in entries], [e.type for e in entries], asked)
    entry = entries[0]
    if isinstance(entry.shape[1], int) and entry.shape[1] != 3:
        raise InputError(f"{path} takes images of {entry.shape[1]} channels, but these commands give it three.")
    imgsz = _size(path, entry.shape, asked)
    most = entry.shape[0] if isinstance(entry.shape[0], int) else 1
    check_pixels(path, (most, *imgsz.image), asked)
    kind = TYPES.get(entry.type, np.float32)
    meta = running.inner.get_modelmeta().custom_metadata_map
    if preset is None:
        preset = of_text(meta[INPUT_KEY], path) if meta.get(INPUT_KEY) else Preset()
    names = class_names(meta.get("names", ""), path)
    makes_masks = preset.decode is None and [len(o.shape) for o in running.inner.get_outputs()] == [3, 4]
    count = sum(w.count for w in weights)
    form = _form_of(preset, kind)

    def outputs(batch: NDArray[np.float32]) -> list[Any]:
        filled = np.repeat(batch, most, 0) if most > 1 else batch  # a file with a fixed batch gets copies of the image
        return _outputs(path, running, {entry.name: as_input(filled, kind)})

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        found = outputs(batch)
        if NMS_KEY in meta and (out := _floats(path, found[0])).ndim == 2 and out.shape[1] == 7:
            return _as_predictions(out[out[:, 0] == 0], len(names), path)
        return running.bounds.later(lambda: _read(path, preset.decode, found, batch, names, most), batch.nbytes)[None]

    def predict_masks(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        out, protos = (_floats(path, o)[:1] for o in outputs(batch)[:2])
        whole = _has_boxes(out, 1, imgsz) and protos.ndim == 4 and 0 < protos.size <= MAX_PROTOTYPES * imgsz.pixels
        finer = any(n > side // 2 for n, side in zip(protos.shape[2:], imgsz.pair, strict=False))
        if not whole or finer or out.shape[2] != 5 + nc + protos.shape[1]:
            raise InputError(f"{path} does not have the outputs of YOLOv5's segmentation: boxes and prototypes.")
        return out, protos

    nc = len(names) or _classes(running, makes_masks, imgsz)
    if preset.decode is not None and not names:  # a first run tells the number of classes if no shape does
        with suppress(OtherOutput):  # raised again, and shown, when the file is run
            grey = np.full((*imgsz.pair, 3), form.pad, np.uint8)
            nc = predict(form.apply(grey, *imgsz.pair)[None]).shape[2] - 5
    bits = sum(w.bits for w in weights) / count if count else 32.0
    limits = suppression(meta.get(NMS_KEY, ""), path)
    bounds = running.bounds
    made: Predictor = BoundedPredictor(predict, bounds, form)
    if makes_masks:
        made = MaskPredictor(predict_masks, nc, bounds, form)
    return Candidate(path, "onnx", names, imgsz, bits, made, _once(lambda: running, imgsz, most),
                     nc, limits, most, kind, outputs)  # fmt: skip


def _form_of(preset: Preset, kind: type[Any]) -> InputForm:
    """Return the form of the input.

    A file that takes bytes scales them itself, and is fed from 0..1 like all others.
    """
    if kind is not np.uint8:
        return preset.form
    refuse_scaled_bytes(preset.form)
    return replace(preset.form, scale=255)


def _read(
    path: Path, rule: str | None, found: Sequence[Any], batch: NDArray[np.float32], names: Sequence[str], images: int
) -> NDArray[np.float32]:
    """Return the boxes (boxes, 5 + classes) in the outputs for one image; a fixed batch holds copies of it."""
    floats = [_floats(path, o) for o in (found if rule else found[:1])]
    if rule is None:  # further outputs may tell what the first one is
        floats += [o for o in found[1:] if isinstance(o, np.ndarray) and o.dtype.kind == "f" and len(o.shape) > 1]
    if images > 1 and any(len(o) != images for o in floats if o.ndim):
        raise _other_output(path, floats, names)
    own = [o[:1] for o in floats] if images > 1 else floats
    size = Size(*batch.shape[2:])
    if any(o.size > MAX_NUMBERS * size.pixels for o in own):
        raise _other_output(path, floats, names)
    try:
        rows = boxes_of(rule, own, size, len(names))
        if not _has_boxes(rows[None], 1, size) or (names and rows.shape[1] != 5 + len(names)):
            raise Unfit(SHAPES)
        check_scores(rows)
    except OtherFamily as error:
        ways = " or ".join(f"{{input}} {name}" for name in error.names)
        raise OtherOutput.naming(f"{{}} has outputs like another family's, not YOLOv5's; give {ways}.", path) from None
    except Unfit as error:
        raise _other_output(path, floats, names, str(error)) from None
    return rows


def _has_boxes(out: NDArray[Any], images: int, imgsz: Size) -> bool:
    """Return whether an output is (images, boxes, 5 + classes), with no more boxes than pixels and a possible number of
    classes.
    """
    return (
        out.ndim == 3 and out.shape[0] == images and out.shape[1] <= imgsz.pixels and 6 <= out.shape[2] <= MAX_NUMBERS
    )


def _size(path: Path, shape: Sequence[Any], asked: Size | None) -> Size:
    """Return the height and width that a file takes.

    An open side is the one asked for, or else equal to the other side.

    Raises InputError when the file takes another size than the one asked for.
    """
    known = [n for n in shape[2:] if isinstance(n, int)]
    found = (asked or Size.of(known[0] if known else USUAL)).filling(shape[2:])
    if asked is not None and asked != found:
        taken = found if len(known) == 2 else Size.of(known[0])
        raise InputError.naming("{} was exported for {} pixels; {imgsz} {} does not fit it.", path, taken, asked)
    return found


def _classes(running: Session, masks: bool, imgsz: Size) -> int:
    """Return the number of classes that the shapes of the outputs tell; 0 if they do not."""
    shapes = [o.shape for o in running.inner.get_outputs()]
    if not masks:
        return classes_of(shapes[0], imgsz)
    numbers, beside = shapes[0][-1], shapes[1][1]
    return max(0, numbers - 5 - beside) if isinstance(numbers, int) and isinstance(beside, int) else 0


def _other_output(
    path: Path, found: Sequence[NDArray[Any]], names: Sequence[str], wanted: str | None = None
) -> OtherOutput:  # fmt: skip
    """Return the error for outputs that cannot be read as boxes.

    wanted: the outputs that a rule expects; None: any known form.
    """
    given = printable(" and ".join(str(list(o.shape)) for o in found), 60)
    usual = "YOLOv5's output (1, boxes, 5 + classes){}, nor YOLOv8's (1, 4 + classes, boxes), nor (1, boxes, 6)"
    said = f" of the {len(names)} it names" if names else ""
    if wanted in (None, SHAPES):
        wanted = usual.format(said)
    return OtherOutput.naming(
        f"{{}} does not have {wanted}, but {{}}; give {{input}} if it belongs to a known family, or compare two such "
        "files output by output.", path, given,
    )  # fmt: skip


def _outputs(path: Path, running: Session, feed: dict[str, NDArray[Any]]) -> list[Any]:
    imgsz = Size(*next(iter(feed.values())).shape[-2:])
    with refusing(f"{path} fails in ONNX Runtime on an image of {imgsz} pixels."):
        return running.run(None, feed)


def _floats(path: Path, out: Any) -> NDArray[np.float32]:
    if not isinstance(out, np.ndarray) or out.dtype.kind != "f":
        raise _other_output(path, [np.asarray(out)], ())
    return out.astype(np.float32, copy=False)


def _as_predictions(found: NDArray[np.float32], nc: int, path: Path) -> NDArray[np.float32]:
    """Turn the detections (k, 7) of one image into (1, k, 5 + nc), each with its one class.

    Evaluation suppresses boxes again. It drops more of these only if it allows less overlap than the file did.
    """
    if not bool(((found[:, 6] >= 0) & (found[:, 6] < nc)).all()):
        raise InputError(f"{path} finds classes it does not name.")
    out = np.zeros((1, len(found), 5 + nc), np.float32)
    low, high = found[:, 1:3], found[:, 3:5]
    out[0, :, :2], out[0, :, 2:4], out[0, :, 4] = (low + high) / 2, high - low, 1
    out[0, np.arange(len(found)), 5 + found[:, 6].astype(int)] = found[:, 5]
    return out
