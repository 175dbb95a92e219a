"""The layouts: the ways in which an ONNX file writes DSConv weights.

All but `float` give the same int8 numbers, m VQK.

OpenVINO folds 4-bit constants and casts of them. INT8 and UINT8 constants it leaves as they are if a multiplication or
subtraction follows the cast, and then it convolves in float. So an addition or a table follows a UINT8 constant first.
OpenVINO does not fold BitwiseAnd, BitShift and a QuantizeLinear of constants at all. With these rules, every layout
becomes the same int8 convolution in both engines.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.model.model import Converted
from dsconvert.onnxfile.operators import need_operators


@dataclass(frozen=True)
class Layout:
    """Everything in which files differ; no other code knows a layout by its name."""

    name: str  # the value of --layout, and in the file's metadata
    about: str  # a few words for the help of --layout
    opset: int = 21  # of ONNX; 21 is the first with INT4
    engines: tuple[str, ...] = ("ONNX Runtime", "OpenVINO")  # that run it; docs/compatibility.md has the same list
    rewrites: int = 0  # lowest opset of a foreign ONNX file that can be rewritten in this layout; 0: none can
    activations: tuple[str, ...] = ("int8", "float")  # kinds of a model's activations that it supports
    rounds_between: bool = True  # values are rounded to a grid between a convolution and its activation
    merged: bool = False  # the product m VQK is stored, as one int8 tensor for each layer
    blocked: bool = False  # a blocked DequantizeLinear multiplies 4-bit VQK that have no trellis code by m
    real: bool = False  # W' is computed in float, for group scales that are real numbers
    joint: bool = False  # weights of many layers are decoded together, see `joint`
    bias_vector: bool = True  # one vector holds the biases of all layers, see `biases`; else each layer has its own
    lean: bool = False  # for small networks: CDSw and biases are half floats, see `halves`; names and sizes are short
    quick: bool = False  # convolutions and maps have shapes that ONNX Runtime computes fast, see `quickform`
    fused: bool = False  # ONNX Runtime's own operators stand around the weights, channels last, see `fused`
    tables: bool = False  # activations are looked up by the operator of our own, see `onnxfile.operators`


_TABLE = (
    # VQK are stored in their own number of bits. Nodes decode them to int8, and ONNX Runtime folds these once at load.
    # Most layers are decoded together (see `joint`), the others one by one, by the nodes of their code. There are few
    # nodes and few INT32 copies of a weight, as both cost time and memory at load.
    Layout(name="packed", about="smallest file", rewrites=21, joint=True, quick=True),
    # Layout packed after the optimisations that ONNX Runtime would make at load.
    Layout(
        name="fused",
        about="with ONNX Runtime's own operators, loads faster",
        engines=("ONNX Runtime",),
        activations=("int8",),
        joint=True,
        quick=True,
        fused=True,
    ),
    # Fused, and every activation is one pass over its map, by an operator that ONNX Runtime has not got.
    Layout(
        name="fast",
        about="with an operator of dsconvert-ops, which it needs, the fastest in ONNX Runtime",
        engines=("ONNX Runtime",),
        activations=("int8",),
        joint=True,
        quick=True,
        fused=True,
        tables=True,
    ),
    # 4-bit VQK that are free -> DequantizeLinear in blocks of channels, its scale m -> Cast INT8: the operator ONNX has
    # for block scales. OpenVINO folds it; ONNX Runtime computes it again in every inference. A short last block is
    # stored as a tensor of its own, as OpenVINO refuses ragged blocks. Other weights are written as in packed, which
    # OpenVINO folds too. A blocked DequantizeLinear of INT8 it would not fold, and would convolve in float.
    Layout(name="blocked", about="ONNX block scales", blocked=True),
    # Weights are written as in blocked. OpenVINO computes a convolution and its activation in one step, in float, so
    # nothing is rounded between the two (see `graph.integer.real_between`).
    Layout(
        name="openvino",
        about="for OpenVINO, the fastest there",
        activations=("int8",),
        rounds_between=False,
        blocked=True,
    ),
    # This file runs anywhere and is twice as large. Opset 13 has per-channel DequantizeLinear, opset 7 broadcasting.
    Layout(name="int8", about="runs on old engines", opset=13, rewrites=7, merged=True, bias_vector=False),
    # The paper's real-valued group scales, in float (see `real`). Only this layout is not int8.
    Layout(name="float", about="for --kds float", activations=("float",), real=True),
)
LAYOUTS = {layout.name: layout for layout in _TABLE}
PACKED, REAL = LAYOUTS["packed"], LAYOUTS["float"]  # the defaults for integer and for real group scales


def layout_named(name: str) -> Layout:
    """Return the layout of that name.

    Raises InputError for any other name.
    """
    if name not in LAYOUTS:
        raise InputError(f"{name!r} is not a layout; there are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def run_by(engine: str) -> list[str]:
    """Return the names of the layouts that an engine runs."""
    return [layout.name for layout in LAYOUTS.values() if engine in layout.engines]


def check_layout(model: Converted, layout: Layout) -> None:
    """Raise InputError if the layout cannot hold the model."""
    kind, how = ("int8", "with") if model.activations else ("float", "without")
    if kind not in layout.activations:
        raise InputError.naming(
            "{layout} {} has {} activations; quantize {} {activations} float to use it.", layout.name,
            layout.activations[0], how,
        )  # fmt: skip
    if model.has_real_alpha and not layout.real:
        raise InputError.naming(
            "This model's group scales are real numbers ({kds} float); use {layout} {}, not {}.", REAL.name, layout.name
        )


def check_library(layout: Layout) -> None:
    """Raise InputError if the layout needs the library of operators, and it is not installed."""
    if layout.tables:
        need_operators(f"Layout {layout.name}")


def add_int8_weight(b: OnnxBuilder, name: str, weight: DSTensor, layout: Layout) -> str:
    """Add nodes and initializers for m VQK; returns the name of the int8 value (cho, chi, kh, kw)."""
    if layout.merged or weight.is_plain_int8:
        return b.tensor(f"{name}.weight", weight.merged().numpy())
    return weight.format.code.spell(b, name, weight, layout.blocked)
