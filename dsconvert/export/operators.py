"""The network's operations in ONNX, on float maps, or on uint8 ones where they only move values."""

from __future__ import annotations

import numpy as np

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.weights import Weights
from dsconvert.graph.ir import Node
from dsconvert.model import display_name


def add_conv(b: OnnxBuilder, node: Node, inputs: list[str]) -> str:
    """A convolution of inputs x, weight and bias."""
    a = node.attrs
    given = {
        "strides": [a["stride"]] * 2, "pads": [a["padding"]] * 4, "dilations": [a["dilation"]] * 2,
        "group": a["groups"],
    }  # fmt: skip
    usual = {"strides": [1, 1], "pads": [0] * 4, "dilations": [1, 1], "group": 1}
    attributes = {key: value for key, value in given.items() if value != usual[key]}
    return b.node("Conv", inputs, node.name, name=display_name(node), **attributes)


def real_weight(
    b: OnnxBuilder, name: str, weight: DSTensor, weights: Weights, more: int = 0, fill: int = 0
) -> tuple[str, str]:
    """The dequantized weight's name, and that of CDSw, with `more` output and `fill` input channels of zeros: their
    scales are stored, their weights made at load."""
    cds = b.tensor(f"{name}.cds", np.append(weight.cds_w.numpy(), np.ones(more)).astype(np.float32))
    integers = weights.add(name, weight)
    if more or fill:
        integers = b.node("Pad", [integers, b.shape(*[0] * 4, more, fill, 0, 0)], f"{name}.all")
    return b.node("DequantizeLinear", [integers, cds], f"{name}.w", axis=0), cds


def _activation(b: OnnxBuilder, kind: str, x: str, output: str) -> str:
    if kind == "ReLU":
        return b.node("Relu", [x], output)
    if kind == "LeakyReLU":
        return b.node("LeakyRelu", [x], output, alpha=0.1)
    if kind == "SiLU":
        return b.node("Mul", [x, b.node("Sigmoid", [x], f"{output}.s")], output)
    # x * relu6(x + 3) / 6, spelled out: HardSwish itself needs opset 14
    gate = b.node("HardSigmoid", [x], f"{output}.s", alpha=1 / 6, beta=0.5)
    return b.node("Mul", [x, gate], output)


def add_float(b: OnnxBuilder, node: Node, inputs: list[str], output: str) -> str:
    """Any op but a convolution, on float or (where it only moves values) uint8 inputs."""
    a = node.attrs
    if node.op == "act":
        return _activation(b, a["kind"], inputs[0], output)
    if node.op == "add":
        return b.node("Add", inputs, output)
    if node.op == "concat":
        return b.node("Concat", inputs, output, axis=1)
    if node.op == "maxpool":
        return b.node(
            "MaxPool", inputs, output, kernel_shape=[a["kernel"]] * 2, strides=[a["stride"]] * 2,
            pads=[a["padding"]] * 4,
        )  # fmt: skip
    if node.op == "upsample":
        scales = b.constant(np.array([1, 1, a["scale"], a["scale"]], np.float32))
        return b.node(
            "Resize", [inputs[0], "", scales], output, mode="nearest", nearest_mode="floor",
            coordinate_transformation_mode="asymmetric",
        )  # fmt: skip
    if node.op == "space_to_depth":
        return _space_to_depth(b, inputs[0], output)
    raise ValueError(f"unknown op {node.op}")


def _space_to_depth(b: OnnxBuilder, x: str, output: str) -> str:
    """The Focus slices: four strided slices joined along the channels."""
    parts = []
    for column in (0, 1):
        for row in (0, 1):
            ends, axes, steps = b.shape(1 << 30, 1 << 30), b.shape(2, 3), b.shape(2, 2)
            starts = b.shape(row, column)
            parts.append(b.node("Slice", [x, starts, ends, axes, steps], f"{output}.{column}{row}"))
    return b.node("Concat", parts, output, axis=1)
