"""Convert trained YOLOv5 detectors to DSConv (arXiv 1901.01928) and export them as integer ONNX files.

The Python API is in `dsconvert.api`. Its names are offered here and loaded, with torch, when first used.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

from dsconvert.base.errors import CheckError, InputError
from dsconvert.base.version import VERSION as __version__

if TYPE_CHECKING:
    from dsconvert.api.models import Evaluation, EvaluationRow, FloatModel, QuantizedModel, evaluate, load, quantize
    from dsconvert.api.modules import ModulePlan, quantize_module
    from dsconvert.api.photos import (
        ComparedPhoto,
        Comparison,
        DetectedObject,
        DetectedPhoto,
        Detections,
        compare,
        detect,
    )
    from dsconvert.convert.onnx import OnnxPlan, quantize_onnx
    from dsconvert.photos.form import InputForm

__all__ = [
    "CheckError",
    "ComparedPhoto",
    "Comparison",
    "DetectedObject",
    "DetectedPhoto",
    "Detections",
    "Evaluation",
    "EvaluationRow",
    "FloatModel",
    "InputError",
    "InputForm",
    "ModulePlan",
    "OnnxPlan",
    "QuantizedModel",
    "__version__",
    "compare",
    "detect",
    "evaluate",
    "load",
    "quantize",
    "quantize_module",
    "quantize_onnx",
]

# OpenCV reads these at its first import, which comes later. A 100 kB file may declare an image of a billion pixels:
# OpenCV refuses images beyond 134 million (400 MB decoded). Our own errors report broken images and videos.
os.environ.setdefault("OPENCV_IO_MAX_IMAGE_PIXELS", str(1 << 27))
os.environ.setdefault("OPENCV_LOG_LEVEL", "SILENT")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # FFmpeg's AV_LOG_QUIET
# ONNX Runtime reads this at its import. Without it, version 1.32 writes an identifier of the machine below ~/.cache,
# and tells Microsoft which models are run.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


def __getattr__(name: str) -> Any:
    if name in ("ModulePlan", "quantize_module"):
        return getattr(importlib.import_module("dsconvert.api.modules"), name)
    if name in ("ComparedPhoto", "Comparison", "DetectedObject", "DetectedPhoto", "Detections", "compare", "detect"):
        return getattr(importlib.import_module("dsconvert.api.photos"), name)
    if name in ("OnnxPlan", "quantize_onnx"):
        return getattr(importlib.import_module("dsconvert.convert.onnx"), name)
    if name == "InputForm":
        return importlib.import_module("dsconvert.photos.form").InputForm
    if name in __all__:
        return getattr(importlib.import_module("dsconvert.api.models"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
