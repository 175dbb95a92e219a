"""An ONNX file in an engine: loaded with a number of threads, fed, run. No torch here: peak memory is measured
in processes that import this module and nothing heavier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

ENGINES = ("onnxruntime", "openvino")
SIDE = 640  # of an input that leaves its side open


def session(model: bytes | Path, threads: int) -> ort.InferenceSession:
    """An ONNX Runtime CPU session."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # idle threads of one session would otherwise spin on into the next one's turn
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return ort.InferenceSession(
        str(model) if isinstance(model, Path) else model, options, providers=["CPUExecutionProvider"]
    )


def as_input(batch: NDArray[np.float32], kind: type[Any]) -> NDArray[Any]:
    """Images in 0..1 as the numbers a file takes: bytes 0..255 for np.uint8, else the same in another float type."""
    return np.rint(batch * 255).astype(np.uint8) if kind is np.uint8 else batch.astype(kind)


def input_kind(type_name: str) -> type[Any]:
    """`tensor(uint8)` -> np.uint8; float16 likewise; everything else counts as float32."""
    return {"tensor(uint8)": np.uint8, "tensor(float16)": np.float16}.get(type_name, np.float32)
