"""The Python API for models, as used in a notebook; `import dsconvert` offers all of it and loads it when first used.

    m = dsconvert.load("best.pt")
    q = dsconvert.quantize(m, "photos/", target_size=900_000)
    q.save("small")
    q.export("small/best.onnx")
    dsconvert.evaluate([m, q, "small/best.onnx"], "data.yaml")

This is a thin layer over `dsconvert.convert.quantize`; `detect` and `compare` are in `photos`. Bad input raises
`dsconvert.InputError` with one sentence. Existing files are replaced only with force=True.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dsconvert.api.checked import check_split, check_values
from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import MODEL, ONNX, file_kind
from dsconvert.base.files import refuse_inputs, write_atomic
from dsconvert.base.size import SizeLike
from dsconvert.convert import exporting
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.record import MODEL_FILE, Quantized, layer_table, quantize_report, save_quantized
from dsconvert.export.ends.inputs import INPUT_TYPES
from dsconvert.export.ends.nms import Nms
from dsconvert.export.onnx import Ends
from dsconvert.export.weights.layouts import PACKED, layout_named
from dsconvert.measure.calibration import Progress
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.presets import perhaps_named
from dsconvert.scoring import contest
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint

File = str | Path


@dataclass(frozen=True, repr=False)
class FloatModel:
    """A YOLOv5 checkpoint as it was trained; `load` returns one."""

    checkpoint: Checkpoint

    @property
    def path(self) -> Path:
        """The file that it was loaded from."""
        return self.checkpoint.path

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""
        return self.checkpoint.head.names

    def __repr__(self) -> str:
        return f"FloatModel({str(self.path)!r}, {len(self.names)} classes, {self.checkpoint.size_bytes / 1e6:.2f} MB)"

    def export(
        self, file: File, *, imgsz: SizeLike = 640, check: bool = True, force: bool = False, **ends: Any
    ) -> Path:
        """Write the float32 network as ONNX and return the file; arguments are as in QuantizedModel.export."""
        refuse_inputs([Path(file)], [self.path])
        return _write(file, exporting.onnx_bytes(self.path, PACKED, imgsz, _ends(**ends), check), force)


@dataclass(frozen=True, repr=False)
class QuantizedModel:
    """A converted model from `quantize` or `load`; `result` describes the conversion, and is None after `load`."""

    model: DSModel
    result: Quantized | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Class names."""
        return self.model.head.names

    @property
    def imgsz(self) -> int | tuple[int, int]:
        """Size of the calibration images in pixels: one number for a square, else height and width."""
        height, width = self.model.imgsz.pair
        return height if height == width else (height, width)

    @property
    def weight_bits(self) -> float:
        """Mean stored bits of a convolution weight, with shifts."""
        return self.model.weight_bits

    @property
    def map_drop(self) -> float | None:
        """Points of mAP50-95 lost on held-back images; None unless target_map_drop was given."""
        return self.result.map_drop if self.result else None

    @property
    def layers(self) -> list[dict[str, Any]]:
        """One row for each convolution.

        It has name, shape, kind, bits, block_size, bytes, float32_bytes, and the expected damage by bits. After
        `quantize` it also has sqnr_db, the weight's signal-to-quantization-noise ratio in dB.
        """
        if self.result is None:
            return layer_table(self.model)
        return list(quantize_report(self.result)["layers"])

    def __repr__(self) -> str:
        return f"QuantizedModel({_source(self.model)!r}, {len(self.names)} classes, {self.weight_bits:.2f} bits)"

    def save(self, folder: File, *, force: bool = False) -> Path:
        """Write model.safetensors and quantize.json into a folder; return the model's path."""
        if self.result is None:
            raise InputError("This model was loaded from a file, so it is saved already; copy that file.")
        return save_quantized(self.result, Path(folder), force)

    def export(
        self,
        file: File,
        layout: str = PACKED.name,
        *,
        imgsz: SizeLike | None = None,
        check: bool = True,
        force: bool = False,
        **ends: Any,
    ) -> Path:
        """Write ONNX with integer weights; return the file.

        layout: packed (smallest), fused (for ONNX Runtime, loads faster), fast (fused with an operator of
            dsconvert-ops, which it needs), blocked (ONNX block scales), openvino (for OpenVINO, the fastest there),
            int8 (runs on old engines), or float (for kds="float").
        imgsz: pixels of the input, a square's side or (height, width); None: as calibrated.
        check: whether to run the file in ONNX Runtime first and compare it with torch.
        force: whether to replace an existing file.
        dynamic_batch: leave the batch size open.
        dynamic: leave batch size, height and width open (for ONNX Runtime; slower).
        input_type: float32 or float16 in 0..1, or uint8 (the image's bytes).
        nms: end with non-maximum suppression. The output `detections` (k, 7) is image, x1, y1, x2, y2, score, class.
        conf_thres, iou_thres, max_det: limits of the suppression.

        Raises CheckError if the check fails.
        """
        chosen, asked = layout_named(layout), _ends(**ends)
        with tempfile.TemporaryDirectory() as folder:
            made = exporting.onnx_bytes(as_file(self, Path(folder)), chosen, imgsz, asked, check)
        return _write(file, made, force)


@dataclass(frozen=True)
class EvaluationRow:
    """One model in an evaluation; fields are as in `dsconvert eval`.

    model: its file.
    map50_95, map50, precision, recall: 0..1; None if, without labels, the first model finds nothing.
    size_bytes, weight_bits: of the file, and of a stored weight.
    latency_ms, latency_spread_ms: median and interquartile range of ONNX Runtime.
    images: how many it was measured on.
    ap50_95: average precision by class number.
    """

    model: str
    map50_95: float | None
    map50: float | None
    precision: float | None
    recall: float | None
    size_bytes: int
    weight_bits: float
    latency_ms: float
    latency_spread_ms: float
    images: int
    ap50_95: dict[int, float] = field(repr=False)


class Evaluation(tuple[EvaluationRow, ...]):
    """Rows in the order of the models; it prints as a table, and `pandas.DataFrame(evaluation)` works too."""

    __slots__ = ()

    def __repr__(self) -> str:
        wide = max(len("model"), *(len(r.model) for r in self))
        lines = [f"{'model':{wide}}  mAP50-95   mAP50       P       R      MB   bits      ms"]
        lines += [
            f"{r.model:{wide}}  {_shown(r.map50_95, 4):>8}  {_shown(r.map50, 4):>6}  {_shown(r.precision, 3):>6}  "
            f"{_shown(r.recall, 3):>6}  "
            f"{r.size_bytes / 1e6:6.2f}  {r.weight_bits:5.2f}  {r.latency_ms:6.1f}"
            for r in self
        ]
        return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def load(path: File) -> FloatModel | QuantizedModel:
    """Read a YOLOv5 checkpoint (`.pt`, nothing in it is executed) or a converted model (`.safetensors`)."""
    path = Path(path)
    kind = ONNX if path.suffix == ".onnx" and path.is_file() else file_kind(path)
    if kind == MODEL:
        return QuantizedModel(load_model(path))
    if kind == ONNX:
        raise InputError(f"{path} is an ONNX file; give its path to evaluate, or open it with ONNX Runtime.")
    return FloatModel(load_checkpoint(path))


def quantize(
    model: FloatModel | File,
    images: File | None = None,
    *,
    bits: int | None = None,
    target_size: int | None = None,
    target_map_drop: float | None = None,
    block_size: int | None = None,
    blocks: str = "all",
    scope: str = "all",
    activations: str = "int8",
    kds: str = "int",
    imgsz: SizeLike = 640,
    samples: int = 256,
    split: str | None = None,
    strict: bool = False,
    finetune_steps: int | None = None,
    finetune_time: float | None = None,
    seed: int = 0,
    device: str = "cpu",
    progress: Progress | None = None,
) -> QuantizedModel:
    """Convert a checkpoint to DSConv. The checkpoint is left as it is.

    model: a checkpoint, or its file.
    images: folder, data.yaml or text file of paths, without labels; None: synthesised from the checkpoint.
    bits: 2..8, of every weight.
    target_size: largest packed ONNX file, in bytes.
    target_map_drop: most points of mAP50-95 to lose on held-back images. At most one of these three may be given.
        Without any, the bits of each layer are chosen so that the damage is least at the size of 4 bits everywhere.
    block_size: input channels that share a KDS (group size); None: chosen for each layer.
    blocks: all, head, backbone, or C3 layers such as "13,17,20,23".
    scope: bottleneck, c3 or all.
    activations: int8, or float to quantize weights only.
    kds: int, or float for the paper's real-valued KDS.
    imgsz: pixels, a square's side or (height, width), in multiples of the model's stride.
    samples: most images used.
    split: of a data.yaml; None: train, else val.
    strict: refuse lists and labels with unusable parts, instead of a warning.
    finetune_steps: steps of the brief fine-tune; None: as many as are useful; 0: none.
    finetune_time: seconds after which the fine-tune stops; None: no limit; 0: no fine-tune.
    device: cpu, or a GPU (0, cuda:0, cuda).
    progress: called as progress(stage, done, total).
    """
    source = load(model) if isinstance(model, (str, Path)) else model
    if not isinstance(source, FloatModel):
        raise InputError("This model is converted already; quantize takes a checkpoint (.pt).")
    options = QuantizeOptions(
        calib=None if images is None else Path(images), block_size=block_size, bits=bits, target_bytes=target_size,
        target_drop=target_map_drop, blocks=blocks, scope=scope, imgsz=imgsz, samples=samples, seed=seed,
        split=split, strict=strict, device=device, activations=activations, kds=kds, finetune_steps=finetune_steps,
        finetune_time=finetune_time,
    )  # fmt: skip
    check_values(options)
    # the fit folds BatchNorm and may move the network to a device, in place
    own = replace(source.checkpoint, network=copy.deepcopy(source.checkpoint.network))
    result = pipeline.quantize(own, options, _as_call(source, options), progress)
    return QuantizedModel(result.model, result)


def evaluate(
    models: FloatModel | QuantizedModel | File | Sequence[FloatModel | QuantizedModel | File],
    data: File,
    *,
    imgsz: SizeLike | None = None,
    samples: int | None = None,
    split: str | None = None,
    strict: bool = False,
    input: str | None = None,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure accuracy, size and latency of models.

    models: values, or `.pt`, `.safetensors` and `.onnx` files.
    data: a data.yaml with labels, or a folder of images. Without labels, the first model's detections are the truth.
    imgsz: pixels of the images, a square's side or (height, width); None: what the models were made for.
    samples, split, strict: as in `quantize`, but split None takes val, else test or train.
    input: the family of ONNX files, as in `detect`.
    progress: called as progress(stage, done, total).

    A converted model has the size of the file that `save` writes.
    """
    given = [models] if isinstance(models, (str, Path, FloatModel, QuantizedModel)) else list(models)
    if not given:
        raise InputError("There is no model to evaluate.")
    if samples is not None and samples < 1:
        raise InputError("samples must be at least 1.")
    check_split(split)
    preset = perhaps_named(input)
    with tempfile.TemporaryDirectory() as folder:
        paths = [as_file(m, Path(folder, str(i))) for i, m in enumerate(given)]
        found = contest.evaluate(paths, Path(data), imgsz, samples, progress, split, strict, preset=preset)
        if found[0].metrics is None:
            warnings.warn(contest.nothing_found(paths[0]), stacklevel=2)
        return Evaluation(_row(m, e) for m, e in zip(given, found, strict=True))


def _row(model: FloatModel | QuantizedModel | File, found: contest.Evaluated) -> EvaluationRow:
    m, t, c = found.metrics, found.latency, found.candidate
    a, b, p, r = (m.map50_95, m.map50, m.precision, m.recall) if m else (None, None, None, None)
    name = f"{_source(model.model)} (converted)" if isinstance(model, QuantizedModel) else str(c.path)
    return EvaluationRow(
        name, a, b, p, r, c.size_bytes, c.weight_bits, t.median_ms, t.spread_ms,
        found.images, dict(m.per_class) if m else {},
    )  # fmt: skip


def _source(model: DSModel) -> str:
    """Return the file name of the checkpoint that a model was made from."""
    return Path(str(model.provenance.get("source", "model"))).name


def as_file(model: FloatModel | QuantizedModel | File, folder: Path) -> Path:
    """Return the model's file; a model in memory is first written into `folder`."""
    if isinstance(model, FloatModel):
        return model.path
    if not isinstance(model, QuantizedModel):
        return Path(model)
    path = folder / MODEL_FILE
    write_atomic(path, model_bytes(model.model), force=False)
    return path


def _write(file: File, data: bytes, force: bool) -> Path:
    write_atomic(Path(file), data, force)
    return Path(file)


def _ends(
    *,
    dynamic_batch: bool = False,
    dynamic: bool = False,
    input_type: str = "float32",
    nms: bool = False,
    conf_thres: float | None = None,
    iou_thres: float | None = None,
    max_det: int | None = None,
) -> Ends:
    if input_type not in INPUT_TYPES:
        raise InputError(f"{input_type!r} is not an input type; there are {', '.join(INPUT_TYPES)}.")
    limits: dict[str, Any] = {"confidence": conf_thres, "iou": iou_thres, "most": max_det}
    chosen = {name: value for name, value in limits.items() if value is not None}
    if chosen and not nms:
        raise InputError("conf_thres, iou_thres and max_det work only with nms=True; give it too.")
    return Ends(dynamic_batch, input_type, Nms(**chosen) if nms else None, dynamic)


def _as_call(source: FloatModel, options: QuantizeOptions) -> str:
    """Return the call that the model file notes as its origin."""
    keywords = {"calib": "images", "target_bytes": "target_size", "target_drop": "target_map_drop"}
    default = QuantizeOptions()
    given = {
        keywords.get(name, name): str(value) if isinstance(value, Path) else value
        for name, value in vars(options).items()
        if value != getattr(default, name)
    }
    parts = [repr(str(source.path)), *(f"{name}={value!r}" for name, value in given.items())]
    return f"dsconvert.quantize({', '.join(parts)})"
