"""Load an ONNX file in an engine with a number of threads, feed it and run it.

This module does not import torch: peak memory is measured in processes that import this module and nothing heavier (see
`footprint`).
"""

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
from dsconvert.onnxfile.operators import check_operators, quiet_options

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
        """Run the file on the arrays and return its outputs.

        Raises InputError if the file needs more than its bounds. A faulty file raises ONNX Runtime's own exceptions.
        """
        call = self.bounds.again if self.ran else self.bounds.first
        made = call(lambda: self.inner.run(outputs, feed), sum(a.nbytes for a in feed.values()))
        self.ran = True
        return list(made)

    def repeated(self, feed: Mapping[str, NDArray[Any]]) -> Callable[[], object]:
        """Return a call of one inference to time; from the second call on, our own code takes about 20 microseconds of
        it.
        """
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
    options = quiet_options()
    if isinstance(model, bytes):  # of a fit or a check, never timed: threads that wait let others work meanwhile
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.intra_op_num_threads = threads
    # Else idle threads of one session would still spin during the next session's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
    )


def as_input(batch: NDArray[np.float32], kind: type[Any]) -> NDArray[Any]:
    """Return images in 0..1 as the numbers a file takes: bytes 0..255 for np.uint8, else the same numbers as another
    float.
    """
    return np.rint(batch * 255).astype(np.uint8) if kind is np.uint8 else batch.astype(kind)


def open_model(
    path: Path, engine: str, threads: int, imgsz: SizeLike | None, size: int | None = None
) -> Callable[[], object]:
    """Load the file and return a call of one inference on a fixed random image.

    imgsz: size for inputs that leave theirs open.
    size: bytes of the file with its external data (None: it has none).

    Raises InputError if the engine cannot load the file, or if it does not take exactly one image.
    """
    check_onnx(path)
    opened = _openvino if engine == "openvino" else _onnxruntime
    return opened(path, threads, Size.perhaps(imgsz), size or path.stat().st_size)


def check_onnx(path: Path) -> None:
    """Raise InputError if there is no file, or one of another kind."""
    check_ordinary(path)
    kind = file_kind(path) if path.exists() else ONNX
    if not path.is_file():
        raise InputError(f"There is no ONNX file at {path}.")
    if kind != ONNX:
        raise InputError(f"{path} is {NAMES[kind]}, not an ONNX file; write one with dsconvert export {path} --onnx.")


def engine_version(engine: str) -> str:
    """Return the installed version.

    Raises InputError if the engine is not installed.
    """
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
    """Return a session of an untrusted file of `size` bytes with its external data.

    Raises InputError if ONNX Runtime cannot load it.
    """
    with refusing(f"{path} is not an ONNX file that ONNX Runtime can run."):
        return session(path, threads, str(path), size)


def _openvino(path: Path, threads: int, imgsz: Size | None, size: int) -> Callable[[], object]:
    engine_version("openvino")
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    bounds = Bounds(str(path), size)
    with refusing(f"{path} is not an ONNX file that OpenVINO can run."):
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
    """Raise InputError unless the only input is images (n, 3, height, width) of at most MAX_SIDE pixels a side.

    All images together have at most LARGE pixels, unless their size was `asked` for.
    """
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
        raise InputError(f"{path} takes images of shape {list(shapes[0])}; at most {list(most)} is possible.")
    check_pixels(path, filled(shapes[0], asked), asked)


def filled(shape: Sequence[object], imgsz: Size | None) -> list[int]:
    """Return an input's shape with its open dimensions filled in: one image, three channels, `imgsz` pixels."""
    usual = (1, *(imgsz or USUAL).image)
    return [given if isinstance(given, int) else other for given, other in zip(shape, usual, strict=True)]


def check_pixels(path: Path, numbers: Sequence[int], asked: Size | None) -> None:
    """Raise InputError for an input (n, channels, height, width) that needs gigabytes, with all that is computed from
    it.

    A file of a few bytes may declare such an input. If its height or width was asked for, several images together may
    have as many pixels as one of the largest size.
    """
    known = asked is not None and any(n == given for n, given in zip(numbers[-2:], asked.pair, strict=True))
    most = 3 * MAX_SIDE**2 if known else 3 * LARGE
    if math.prod(numbers) > most:
        raise InputError.naming(
            "{} takes {} numbers at once, which may need gigabytes of memory; give its {imgsz} to run it "
            "nevertheless.", path, list(numbers)
        )  # fmt: skip


def _image(path: Path, shapes: Sequence[Sequence[object]], types: Sequence[str], imgsz: Size | None) -> NDArray[Any]:
    """Return a random image for the only input; open dimensions become one image, three channels, `imgsz` pixels."""
    check_image_input(path, shapes, types, imgsz)
    shape = filled(shapes[0], imgsz)
    return as_input(np.random.default_rng(0).random(shape, np.float32), TYPES[types[0]])
