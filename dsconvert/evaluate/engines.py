"""An ONNX file in an engine: loaded with a number of threads, fed, run. No torch here: peak memory is measured
in processes that import this module and nothing heavier (see `footprint`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from dsconvert.errors import InputError

ENGINES = ("onnxruntime", "openvino")
MAX_SIDE = 8192
SIDE = 640  # of an input that leaves its side open
TYPES: dict[str, type[Any]] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(uint8)": np.uint8,
}


def session(model: bytes | Path, threads: int) -> ort.InferenceSession:
    """An ONNX Runtime CPU session."""
    options = ort.SessionOptions()
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


def open_model(path: Path, engine: str, threads: int, side: int | None) -> Callable[[], object]:
    """Load the file and return one inference on a fixed random image; `side` is for inputs that leave theirs open.

    Raises InputError when the engine cannot load it or it takes anything but one image."""
    if not path.is_file():
        raise InputError(f"There is no ONNX file at {path}.")
    return (_openvino if engine == "openvino" else _onnxruntime)(path, threads, side)


def engine_version(engine: str) -> str:
    """The installed version. Raises InputError when the engine is not installed."""
    if engine == "onnxruntime":
        return str(ort.__version__)
    try:
        import openvino
    except ImportError:
        raise InputError("OpenVINO is not installed; pip install openvino, or leave out --engine openvino.") from None
    return str(openvino.__version__)


def _onnxruntime(path: Path, threads: int, side: int | None) -> Callable[[], object]:
    try:
        running = session(path, threads)
    except Exception:  # onnxruntime raises many kinds on malformed files
        raise InputError(f"{path} is not an ONNX file ONNX Runtime can run.") from None
    entries = running.get_inputs()
    image = _image(path, [e.shape for e in entries], [e.type for e in entries], side)
    feed = {entries[0].name: image}
    return lambda: running.run(None, feed)


def _openvino(path: Path, threads: int, side: int | None) -> Callable[[], object]:
    engine_version("openvino")
    import openvino

    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    try:
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
    except Exception:  # openvino raises many kinds on malformed files
        raise InputError(f"{path} is not an ONNX file OpenVINO can run.") from None
    names = {"u8": "tensor(uint8)", "f16": "tensor(float16)", "f32": "tensor(float)"}
    shapes = [[d.get_length() if d.is_static else None for d in entry.get_partial_shape()] for entry in compiled.inputs]
    kinds = [names.get(entry.get_element_type().get_type_name(), "other") for entry in compiled.inputs]
    image = _image(path, shapes, kinds, side)
    request = compiled.create_infer_request()
    return lambda: request.infer([image])


def check_image_input(path: Path, shapes: Sequence[Sequence[object]], types: Sequence[str]) -> None:
    """Raises InputError unless the inputs are one image (n, 3, height, width) of up to MAX_SIDE pixels."""
    if len(shapes) != 1 or len(shapes[0]) != 4 or types[0] not in TYPES:
        raise InputError(f"{path} does not take one image (n, 3, height, width) of float or bytes.")
    most = (64, 3, MAX_SIDE, MAX_SIDE)
    if any(isinstance(n, int) and not 1 <= n <= m for n, m in zip(shapes[0], most, strict=True)):
        raise InputError(f"{path} takes images of another size than any detector's: {list(shapes[0])}.")


def _image(path: Path, shapes: Sequence[Sequence[object]], types: Sequence[str], side: int | None) -> NDArray[Any]:
    """A random image for the one input; its open dimensions are one image, three channels, `side` pixels."""
    check_image_input(path, shapes, types)
    usual = (1, 3, side or SIDE, side or SIDE)
    shape = [given if isinstance(given, int) else other for given, other in zip(shapes[0], usual, strict=True)]
    return as_input(np.random.default_rng(0).random(shape, np.float32), TYPES[types[0]])
