"""Turn a model file or a checkpoint into the bytes of an ONNX file, for the command line and the Python API."""

from __future__ import annotations

from pathlib import Path

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import CHECKPOINT, ONNX, file_kind
from dsconvert.base.notes import unheard
from dsconvert.base.size import USUAL, Size, SizeLike
from dsconvert.convert.origin import known_images
from dsconvert.convert.record import MODEL_FILE
from dsconvert.export.check import check_accumulators, check_export, check_images, float_reference, reference_of
from dsconvert.export.onnx import PLAIN, Ends, export_float, export_quantized
from dsconvert.export.weights.layouts import Layout
from dsconvert.model.file import load_model
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.compact import compact
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.images import Image, letterbox, read_image
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.lower import lower


def onnx_bytes(path: Path, layout: Layout, imgsz: SizeLike | None, ends: Ends = PLAIN, check: bool = True) -> bytes:
    """Return the ONNX file of a converted model in a layout, or of a `.pt` checkpoint's float32 network.

    path: the model file or checkpoint.
    layout: for a converted model.
    imgsz: None: the model's own size, or 640 for a checkpoint.
    ends: how the file begins and ends.
    check: whether to check the file before it is returned (see `export.check`).

    Raises CheckError when the check fails.
    """
    photographs: list[Image] = []
    asked = Size.perhaps(imgsz)
    if exportable(path) == CHECKPOINT:
        checkpoint = load_checkpoint(path)
        graph, params = lower(checkpoint.network.fused())
        size, reference = asked or USUAL, float_reference(graph, params, checkpoint.head)
        made = named = export_float(graph, params, checkpoint.head, size, ends)
    else:
        model = load_model(path)
        size, reference = asked or model.imgsz, reference_of(model, layout)
        named = export_quantized(model, layout, size, ends)
        made = compact(named)
        if check:
            check_accumulators(model)
            photographs = first_calibration_image(model, size, path)
    data = made.SerializeToString(deterministic=True)
    if check:
        check_export(data, reference, ends, check_images(size, photographs), named.SerializeToString())
    return data


def exportable(path: Path) -> str:
    """Return whether the file is a CHECKPOINT or a MODEL. Raises InputError for any other file."""
    kind = file_kind(path)
    if kind == ONNX:
        raise InputError(
            f"{path} is an ONNX file already; give export a model file that dsconvert quantize wrote (.safetensors), "
            "or a checkpoint (.pt)."
        )
    return kind


def first_calibration_image(model: DSModel, size: Size, path: Path = Path(MODEL_FILE)) -> list[Image]:
    """Return an image (3, h, w) that the model at `path` was calibrated on, in a list.

    The list is empty when the image is gone or must not be opened (see `origin`).
    """
    split = model.provenance.get("options", {}).get("split")
    try:
        with unheard():
            first = calibration_images(known_images(model.provenance, path), split)[0]
        return [letterbox(read_image(first), size)[0].transpose(2, 0, 1)]
    except InputError:
        return []


def newest_result(root: Path) -> Path:
    """Return the newest model file under `root` (runs/dsconvert). Raises InputError when there is none."""
    found = sorted(root.glob(f"*/{MODEL_FILE}"), key=lambda p: p.stat().st_mtime_ns)
    if not found:
        raise InputError(f"There is no converted model under {root}; run dsconvert quantize first, or name a MODEL.")
    return found[-1]
