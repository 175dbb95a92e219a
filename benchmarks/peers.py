"""The other quantizers that dsconvert is compared with, each used as its documentation advises for YOLOv5.

    python benchmarks/peers.py FLOAT.onnx DATA IMGSZ SAMPLES TARGET.xml    prints the seconds that NNCF takes, as JSON

All of them get the images that dsconvert gets: letterboxed, decoded once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from fresh import last_json, output_of
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size, SizeLike
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.photos.images import read_image, spread

Images = Sequence[NDArray[np.float32]]


Call = Callable[[NDArray[np.float32]], NDArray[np.float32]]
MNN_BLOCK = 32
# MNN's converter as a library. Its command `mnnconvert` also installs a package of its maker and reports to it.
MNN_CONVERT = "import sys, _tools; _tools.mnnconvert(sys.argv)"


def decoded(data: Path, imgsz: SizeLike, samples: int, form: InputForm = PLAIN) -> list[NDArray[np.float32]]:
    """The calibration images that `quantize` takes by default, as the network takes them, each (1, 3, h, w)."""
    found = []
    for path in spread(calibration_images(data), samples):
        with suppress(InputError):  # a file that cannot be read is left out, as quantize does
            found.append(form.apply(read_image(path), *Size.of(imgsz).pair)[None])
    return found


class _Reader(CalibrationDataReader):
    """Feeds ONNX Runtime's calibration one image (1, 3, s, s) at a time."""

    def __init__(self, images: Images, name: str = "images") -> None:
        self.rest, self.name = iter(images), name

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self.rest, None)
        return None if image is None else {self.name: image}


def decode_nodes(model: onnx.ModelProto) -> list[str]:
    """Names of the nodes behind the last convolutions: Detect's decoding, which no quantizer should touch."""
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)

    def reaches_conv(node: onnx.NodeProto) -> bool:
        return any(n.op_type == "Conv" or reaches_conv(n) for out in node.output for n in readers.get(out, []))

    return [n.name for n in model.graph.node if n.op_type != "Conv" and not reaches_conv(n)]


def named(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with a name on every node, so that nodes can be excluded by it."""
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
    return model


def ort_static(float_model: Path, target: Path, images: Images, convs_only: bool, name: str = "images") -> None:
    """ONNX Runtime's static int8 (QDQ, weights per channel, MinMax): convolutions only, or all but the decoding. `name`
    is the input's."""
    prepared = target.with_suffix(".prep.onnx")
    onnx.save(named(onnx.load(float_model)), prepared)
    quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    model = named(onnx.load(prepared))
    onnx.save(model, prepared)
    quantize_static(
        str(prepared), str(target), _Reader(images, name), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv"] if convs_only else None, nodes_to_exclude=decode_nodes(model),
    )  # fmt: skip
    prepared.unlink()


def ultralytics_int8(float_model: Path, target: Path, images: Images) -> None:
    """Static int8 as Ultralytics' exporter makes it: ONNX Runtime's defaults (QDQ, MinMax, int8 activations, weights
    per tensor), on Conv, Gemm and MatMul, Detect's convolutions with them."""
    source = target.with_suffix(".src.onnx")
    onnx.save(named(onnx.load(float_model)), source)
    quantize_static(
        str(source), str(target), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=False,
        activation_type=QuantType.QInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv", "Gemm", "MatMul"],
    )  # fmt: skip
    source.unlink()


def ort_predictor(path: Path, exact: bool) -> Call:
    """ONNX Runtime on two terms: as it runs by default, or with the option that keeps CPUs without VNNI from
    saturating int8 products (slower there, no difference elsewhere)."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.x64quantprecision", "1" if exact else "0")
    running = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return lambda batch: running.run(None, {"images": batch})[0]


def nncf_int8(float_model: Path, target: Path, images: Images) -> None:
    """OpenVINO NNCF's post-training int8, mixed preset as for YOLO, the decoding left out; writes OpenVINO IR."""
    import nncf
    import openvino

    source = target.with_suffix(".src.onnx")
    graph = named(onnx.load(float_model))
    onnx.save(graph, source)
    model = openvino.Core().read_model(source)
    present = {op.get_friendly_name() for op in model.get_ops()}
    ignored = nncf.IgnoredScope(names=[n for n in decode_nodes(graph) if n in present])
    done = nncf.quantize(
        model, nncf.Dataset(list(images)), preset=nncf.QuantizationPreset.MIXED, ignored_scope=ignored,
        subset_size=len(images),
    )  # fmt: skip
    openvino.save_model(done, target)
    source.unlink()


def nncf_seconds(float_model: Path, data: Path, imgsz: int, samples: int, target: Path) -> float:
    """Seconds that NNCF takes in a fresh process, on images decoded before the clock starts."""
    arguments = [str(a) for a in (float_model, data, imgsz, samples, target)]
    return float(last_json([sys.executable, __file__, *arguments])["seconds"])


def openvino_model(path: Path, precision: str | None, threads: int | None = None) -> tuple[Any, str]:
    """A compiled file, and the type that what is float in it runs in: f32, say, or (None) what the engine chooses,
    bf16 on a CPU that has it. `threads`: for one image at a time."""
    import openvino

    settings: dict[str, Any] = {} if precision is None else {"INFERENCE_PRECISION_HINT": precision}
    if threads is not None:
        settings |= {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(path, "CPU", settings)
    used = compiled.get_property("INFERENCE_PRECISION_HINT")
    return compiled, {"float": "f32", "bfloat16": "bf16"}.get(name := used.get_type_name(), name)


def openvino_predictor(path: Path) -> Call:
    """Runs an OpenVINO IR as a predictor, what is float in it in f32."""
    compiled, _ = openvino_model(path, "f32")
    return lambda batch: compiled([batch])[0]


def mnn_convert(float_model: Path, target: Path, bits: int | None) -> None:
    """MNN's file; with `bits`, its weights have so many each, in blocks of 32 inputs, rounded by half-quadratic
    splitting (`--hqq`). It needs no images, and leaves layers of fewer inputs without blocks."""
    low = ["--weightQuantBits", str(bits), "--weightQuantBlock", str(MNN_BLOCK), "--hqq"] if bits else []
    files = ["-f", "ONNX", "--modelFile", str(float_model), "--MNNModel", str(target)]
    target.unlink(missing_ok=True)
    said = output_of([sys.executable, "-c", MNN_CONVERT, *files, *low])
    if not target.is_file():
        raise SystemExit(f"MNN made no file of {float_model}: {said}")


def mnn_predictor(path: Path, threads: int) -> Call:
    """Runs an MNN file as a predictor, as MNN does by default: weights become float32 when it is loaded."""
    from MNN import expr, nn

    module = nn.load_module_from_file(
        str(path), ["images"], ["output0"], thread_num=threads, precision_mode=expr.PrecisionMode.High,
        memory_mode=expr.MemoryMode.Normal,
    )  # fmt: skip

    def predict(batch: NDArray[np.float32]) -> NDArray[np.float32]:
        image = expr.const(np.ascontiguousarray(batch), list(batch.shape), expr.NCHW, expr.float)
        return np.array(module.forward([image])[0].read())

    return predict


def main() -> None:
    source, data, imgsz, samples, target = sys.argv[1:]
    import nncf
    import openvino  # noqa: F401 (importing is no part of the time)

    images = decoded(Path(data), int(imgsz), int(samples))
    began = time.perf_counter()
    nncf_int8(Path(source), Path(target), images)
    found = {"seconds": time.perf_counter() - began, "images": len(images), "version": nncf.__version__}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
