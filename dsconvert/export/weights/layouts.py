"""The layouts: how an ONNX file spells DSConv weights and what stands around them. All but float hold the same int8
numbers, m * VQK.

OpenVINO folds constants of 4 bits and casts of them, but leaves INT8 and UINT8 constants as they are where a
multiplication or subtraction follows the cast, and then convolves in float. So UINT8 meets an addition or a table
first, and every layout becomes the same int8 convolution in both engines.
BitwiseAnd, BitShift and a QuantizeLinear of constants it does not fold at all.
"""

from __future__ import annotations

from dataclasses import dataclass

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.model.model import Converted


@dataclass(frozen=True)
class Layout:
    """All in which files differ; no other code knows a layout by its name."""

    name: str  # as the user says it, and in the file's metadata
    about: str  # in a few words, for the help of --layout
    opset: int = 21  # of ONNX; 21 is the first with INT4
    engines: tuple[str, ...] = ("ONNX Runtime", "OpenVINO")  # that run it: docs/compatibility.md has the same
    rewrites: int = 0  # the least opset of an ONNX file of any origin that can have its weights so; 0: none can
    activations: tuple[str, ...] = ("int8", "float")  # a model's, of which it can hold
    rounds_between: bool = True  # between a convolution and its activation, as everywhere
    merged: bool = False  # m * VQK itself is stored, one int8 tensor a layer
    blocked: bool = False  # free VQK of 4 bits are multiplied by a DequantizeLinear in blocks
    real: bool = False  # W' is made in float, for shifts that are real numbers
    joint: bool = False  # weights of many layers are decoded together, see `joint`
    bias_vector: bool = True  # all biases are one, see `biases`; else each layer stores its own
    quick: bool = False  # convolutions and maps are in the shapes that ONNX Runtime is fast at, see `quickform`
    fused: bool = False  # ONNX Runtime's own operators stand around the weights, channels last, see `fused`
    tables: bool = False  # activations are looked up by the operator of our own, see `onnxfile.operators`


_TABLE = (
    # VQK in its own number of bits, which nodes make int8 and ONNX Runtime folds once at load. Most layers are decoded
    # together (see `joint`), the others one by one, as their code spells them. Few nodes and few INT32 copies of a
    # weight: a fresh process pays for both when it loads the file.
    Layout(name="packed", about="smallest file", rewrites=21, joint=True, quick=True),
    # Packed, as ONNX Runtime would have made it at load.
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
    # for block scales. OpenVINO folds it; ONNX Runtime computes it anew in every inference. A short last block is
    # stored as a tensor of its own (OpenVINO refuses ragged blocks). Others are spelled as in packed: OpenVINO folds
    # those too, but a blocked DequantizeLinear of INT8 it leaves beside a float convolution.
    Layout(name="blocked", about="ONNX block scales", blocked=True),
    # Weights as in blocked. OpenVINO computes a convolution and its activation in one step, in float: nothing is
    # rounded between the two (see `graph.integer.real_between`).
    Layout(
        name="openvino",
        about="for OpenVINO, the fastest there",
        activations=("int8",),
        rounds_between=False,
        blocked=True,
    ),
    # Runs anywhere, file twice as big. Opset 13: per-channel DequantizeLinear; 7: broadcasting.
    Layout(name="int8", about="runs on old engines", opset=13, rewrites=7, merged=True, bias_vector=False),
    # The paper's real-valued shifts, in float (see `real`): the one layout that is not int8.
    Layout(name="float", about="for --kds float", activations=("float",), real=True),
)
LAYOUTS = {layout.name: layout for layout in _TABLE}
PACKED, REAL = LAYOUTS["packed"], LAYOUTS["float"]  # what is taken where nobody says: the second of real shifts


def layout_named(name: str) -> Layout:
    """The layout that a user calls so. Raises InputError for any other name."""
    if name not in LAYOUTS:
        raise InputError(f"{name!r} is not a layout; there are {', '.join(LAYOUTS)}.")
    return LAYOUTS[name]


def run_by(engine: str) -> list[str]:
    """Names of the layouts that an engine runs."""
    return [layout.name for layout in LAYOUTS.values() if engine in layout.engines]


def check_layout(model: Converted, layout: Layout) -> None:
    """Raises InputError when the layout cannot hold the model."""
    kind, how = ("int8", "with") if model.activations else ("float", "without")
    if kind not in layout.activations:
        raise InputError.naming(
            "{layout} {} has {} activations; quantize {} {activations} float to use it.", layout.name,
            layout.activations[0], how,
        )  # fmt: skip
    if model.has_real_alpha and not layout.real:
        raise InputError.naming(
            "This model's shifts are real numbers ({kds} float); use {layout} {}, not {}.", REAL.name, layout.name
        )


def add_int8_weight(b: OnnxBuilder, name: str, weight: DSTensor, layout: Layout) -> str:
    """Nodes and initializers for m * VQK; returns the name of an int8 value (cho, chi, kh, kw)."""
    if layout.merged or weight.is_plain_int8:
        return b.tensor(f"{name}.weight", weight.merged().numpy())
    return weight.format.code.spell(b, name, weight, layout.blocked)
