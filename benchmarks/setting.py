"""What `speed.py` measures, where it keeps the files it makes, and how thorough it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from peers import decoded, mnn_convert, nncf_int8, ort_static, ultralytics_int8

from dsconvert.convert.exporting import onnx_bytes
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import save_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.yolo.checkpoint import load_checkpoint

MNN_BITS = {"mnn32": None, "mnn4": 4, "mnn3": 3}  # None: float32
ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Bench:
    """The settings. `turns`: of everything that takes seconds or minutes; `runs`, `loads`, `starts`: of the rest."""

    checkpoint: Path
    data: Path
    work: Path
    imgsz: int
    samples: int
    threads: int
    turns: int
    runs: int
    loads: int
    load_files: tuple[str, ...]
    starts: int
    before: Path | None
    many: tuple[int, ...]
    memory_samples: int
    neighbours: tuple[int, ...]
    busy_samples: int
    most_busy: float
    model: Path | None
    growth_imgsz: int
    growth_images: tuple[int, ...]
    growth_samples: int
    growth_sizes: tuple[str, ...]

    def say(self, text: str) -> None:
        """Progress, on stdout."""
        print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)

    @property
    def options(self) -> QuantizeOptions:
        """The product as it comes."""
        return QuantizeOptions(calib=self.data, imgsz=self.imgsz, samples=self.samples)

    def images(self) -> list[NDArray[np.float32]]:
        """The calibration images, decoded: the same for everybody."""
        return decoded(self.data, self.imgsz, self.samples)

    def converted(self) -> Path:
        """The default model, quantized unless there is one."""
        path = self.model or self.work / "default" / "model.safetensors"
        if not path.exists():
            self.say("quantizing with the defaults")
            save_quantized(quantize(load_checkpoint(self.checkpoint), self.options), path.parent, force=True)
        return path

    def file(self, name: str) -> Path:
        """The file of a model by its short name, made unless it is there."""
        kind = "xml" if name == "nncf" else "mnn" if name in MNN_BITS else "onnx"
        path = self.work / f"{name}.{kind}"
        if path.exists():
            return path
        self.say(f"making {path.name}")
        if name == "nncf":
            nncf_int8(self.file("float32"), path, self.images())
        elif name == "ultralytics":
            ultralytics_int8(self.file("float32"), path, self.images())
        elif name in MNN_BITS:
            mnn_convert(self.file("float32"), path, MNN_BITS[name])
        elif name.startswith("ort-"):
            ort_static(self.file("float32"), path, self.images(), convs_only=name == "ort-convs")
        else:
            source = self.checkpoint if name == "float32" else self.converted()
            path.write_bytes(onnx_bytes(source, layout_named("packed" if name == "float32" else name), self.imgsz))
        return path
