"""An ONNX file in an engine: loaded with a number of threads, fed, run. No torch here: peak memory is measured
in processes that import this module and nothing heavier (see `footprint`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dsconvert.base.errors import InputError, printable, refusing
from dsconvert.base.filekinds import NAMES, ONNX, check_ordinary, file_kind
from dsconvert.base.size import USUAL, Size, SizeLike
from dsconvert.onnxfile.bounds import Bounds
from dsconvert.onnxfile.operators import check_operators, with_operators

ENGINES = ("onnxruntime", "openvino")
MAX_SIDE = 8192
LARGE = 2048**2  # pixels
TYPES: dict[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


class Session:
    """An ONNX Runtime CPU session within `bounds`."""

    def __init__(self, inner: ort.InferenceSession, bounds: Bounds) -> None:
        self.inner, self.bounds, self.ran = inner, bounds, False

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, NDArray[Any]]) -> list[Any]:
        """What ONNX Runtime makes of the arrays. Raises InputError beyond the bounds, anything for faulty files."""
        call = self.bounds.again if self.ran else self.bounds.first
        made = call(lambda: self.inner.run(outputs, feed), sum(a.nbytes for a in feed.values()))
        self.ran = True
        return list(made)

    def repeated(self, feed: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """For timing: after the first inference, what is done beside it takes some 20 microseconds."""
        size = sum(a.nbytes for a in feed.values())

        def once() -> object:
            return self.bounds.timed(lambda: self.inner.run(None, feed), size) if self.ran else self.run(None, feed)

        return once


def session(model: bytes | Path, threads: int, what: str = "The file", size: int | None = None) -> Session:
    """A session of a file in memory or on disk, of so many bytes with all that belongs to it (None: its own). Raises
    InputError about `what` when it takes more than such a file should or needs the library of `operators`, which is not
    there; anything when it is faulty."""
    bounds = Bounds(what, size or (model.stat().st_size if isinstance(model, Path) else len(model)))
    try:
        return Session(bounds.first(lambda: _inference_session(model, threads)), bounds)
    except InputError:
        raise
    except Exception:  # onnxruntime raises many kinds
        check_operators(model, what)
        raise


def _inference_session(model: bytes | Path, threads: int) -> ort.InferenceSession:
    options = with_operators(ort.SessionOptions())
    if isinstance(model, bytes):  # of a fit or a check, never timed: threads that wait let others work meanwhile
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    options.log_severity_level = 4  # errors are raised anyway; its log shows names of a stranger as they are
    # idle threads of one session would otherwise spin on into the next one's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
    )


def as_input(batch: NDArray[np.float32], kind: type[Any]) -> NDArray[Any]:
    """Images in 0..1 as the numbers a file takes: bytes 0..255 for np.uint8, else the same in another float type."""
    return np.rint(batch * 255).astype(np.uint8) if kind is np.uint8 else batch.astype(kind)


def open_model(
    path: Path, engine: str, threads: int, imgsz: SizeLike | None, size: int | None = None
) -> Callable[[], object]:
    """Load the file and return one inference on a fixed random image; `imgsz` is for inputs that leave theirs open,
    `size` are the file's bytes with its external data (None: it has none).

    Raises InputError when the engine cannot load it or it takes anything but one image."""
    check_onnx(path)
    opened = _openvino if engine == "openvino" else _onnxruntime
    return opened(path, threads, Size.perhaps(imgsz), size or path.stat().st_size)


def check_onnx(path: Path) -> None:
    """Raises InputError for a file of another kind, or none."""
    check_ordinary(path)
    kind = file_kind(path) if path.exists() else ONNX
    if not path.is_file():
        raise InputError(f"There is no ONNX file at {path}.")
    if kind != ONNX:
        raise InputError(f"{path} is {NAMES[kind]}, not an ONNX file; write one with dsconvert export {path} --onnx.")


def engine_version(engine: str) -> str:
    """The installed version. Raises InputError when the engine is not installed."""
    if engine == "onnxruntime":
        return str(ort.__version__)
    try:
        import openvino
    except ImportError:
        raise InputError.naming(
            "OpenVINO is not installed; pip install openvino, or leave out {engine} openvino."
        ) from None
    return str(openvino.__version__)


def _onnxruntime(path: Path, threads: int, imgsz: Size | None, size: int) -> Callable[[], object]:
    running = load_file(path, threads, size)
    entries = running.inner.get_inputs()
    image = _image(path, [e.shape for e in entries], [e.type for e in entries], imgsz)
    return running.repeated({entries[0].name: image})


def load_file(path: Path, threads: int, size: int) -> Session:
    """A session of a stranger's file, `size` bytes with its external data. Raises InputError when there can be none."""
    with refusing(f"{path} is not an ONNX file ONNX Runtime can run."):
        return session(path, threads, str(path), size)


def _openvino(path: Path, threads: int, imgsz: Size | None, size: int) -> Callable[[], object]:
    engine_version("openvino")
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    bounds = Bounds(str(path), size)
    with refusing(f"{path} is not an ONNX file OpenVINO can run."):
        compiled = bounds.first(lambda: core.compile_model(core.read_model(path), "CPU", settings))
    names = {"u8": "tensor(uint8)", "f16": "tensor(float16)", "f32": "tensor(float)"}
    shapes = [[d.get_length() if d.is_static else None for d in entry.get_partial_shape()] for entry in compiled.inputs]
    kinds = [names.get(entry.get_element_type().get_type_name(), "other") for entry in compiled.inputs]
    image = _image(path, shapes, kinds, imgsz)
    request = compiled.create_infer_request()
    ran: list[object] = []

    def infer() -> object:
        if not ran:
            ran.append(bounds.first(lambda: request.infer([image]), image.nbytes))
        return bounds.timed(lambda: request.infer([image]), image.nbytes)

    return infer


def check_image_input(
    path: Path, shapes: Sequence[Sequence[object]], types: Sequence[str], asked: Size | None = None
) -> None:
    """Raises InputError unless the inputs are one image (n, 3, height, width) of up to MAX_SIDE pixels, and not more
    than LARGE pixels together, unless that size was `asked` for."""
    if len(shapes) != 1 or len(shapes[0]) != 4 or types[0] not in TYPES:
        what = f"{len(shapes)} inputs" if len(shapes) != 1 else f"{printable(list(shapes[0]), 80)} of {types[0]}"
        raise InputError(f"{path} does not take one image (n, 3, height, width) of float or bytes, but {what}.")
    if shapes[0][3] == 3 and shapes[0][1] != 3:
        raise InputError(
            f"{path} takes images with their channels last {printable(list(shapes[0]), 80)}, not (n, 3, height, "
            "width); export it again with channels first."
        )
    most = (64, 3, MAX_SIDE, MAX_SIDE)
    if any(isinstance(n, int) and not 1 <= n <= m for n, m in zip(shapes[0], most, strict=True)):
        raise InputError(f"{path} takes images of another size than any detector's: {list(shapes[0])}.")
    check_pixels(path, filled(shapes[0], asked), asked)


def filled(shape: Sequence[object], imgsz: Size | None) -> list[int]:
    """The shape of one input with its open dimensions filled in: one image, three channels, `imgsz` pixels."""
    usual = (1, *(imgsz or USUAL).image)
    return [given if isinstance(given, int) else other for given, other in zip(shape, usual, strict=True)]


def check_pixels(path: Path, numbers: Sequence[int], asked: Size | None) -> None:
    """Raises InputError for an input (n, channels, height, width) that takes gigabytes, with all that is made of it,
    unless its height or width was asked for: a file of a few bytes may say that it has one. Several images of a size
    that was asked for may be as large together as the largest one."""
    known = asked is not None and any(n == given for n, given in zip(numbers[-2:], asked.pair, strict=True))
    most = 3 * MAX_SIDE**2 if known else 3 * LARGE
    if math.prod(numbers) > most:
        raise InputError.naming(
            "{} takes {} numbers at once, gigabytes with all that is made of them; give its {imgsz} to have it "
            "nevertheless.", path, list(numbers)
        )  # fmt: skip


def _image(path: Path, shapes: Sequence[Sequence[object]], types: Sequence[str], imgsz: Size | None) -> NDArray[Any]:
    """A random image for the one input; its open dimensions are one image, three channels, `imgsz` pixels."""
    check_image_input(path, shapes, types, imgsz)
    shape = filled(shapes[0], imgsz)
    return as_input(np.random.default_rng(0).random(shape, np.float32), TYPES[types[0]])
