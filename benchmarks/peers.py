"""The int8 quantizers dsconvert is compared with, each used as its documentation advises for YOLOv5."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantFormat, QuantType, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process

Images = Sequence[NDArray[np.float32]]


class _Reader(CalibrationDataReader):
    """Feeds ONNX Runtime's calibration one image (1, 3, s, s) at a time."""

    def __init__(self, images: Images) -> None:
        self.rest = iter(images)

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        image = next(self.rest, None)
        return None if image is None else {"images": image}


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


def ort_static(float_model: Path, target: Path, images: Images, convs_only: bool) -> None:
    """ONNX Runtime's static int8 (QDQ, weights per channel, MinMax): convolutions only, or all but the decoding."""
    prepared = target.with_suffix(".prep.onnx")
    onnx.save(named(onnx.load(float_model)), prepared)
    quant_pre_process(str(prepared), str(prepared), skip_symbolic_shape=True)
    model = named(onnx.load(prepared))
    onnx.save(model, prepared)
    quantize_static(
        str(prepared), str(target), _Reader(images), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8, calibrate_method=CalibrationMethod.MinMax,
        op_types_to_quantize=["Conv"] if convs_only else None, nodes_to_exclude=decode_nodes(model),
    )  # fmt: skip
    prepared.unlink()


def ort_predictor(path: Path, exact: bool) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
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


def openvino_predictor(path: Path) -> Callable[[NDArray[np.float32]], NDArray[np.float32]]:
    """Runs an OpenVINO IR as a predictor."""
    import openvino

    compiled = openvino.Core().compile_model(path, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return lambda batch: compiled([batch])[0]
