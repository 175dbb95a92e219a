"""The image as the file takes it: float32 or float16 in 0..1, or the raw bytes 0..255."""

from __future__ import annotations

from onnx import TensorProto

from dsconvert.base.builder import OnnxBuilder
from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import INPUT

INPUT_TYPES: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "uint8": TensorProto.UINT8,
}
BYTES = QParams.of_range(0.0, 1.0)  # the grid whose integers are the bytes themselves: scale 1/255, zero point 0


def add_real_image(b: OnnxBuilder, input_type: str) -> str:
    """The name of the image as float32 in 0..1, whatever its type in the file."""
    if input_type == "float32":
        return INPUT
    real = b.node("Cast", [INPUT], f"{INPUT}.real", to=TensorProto.FLOAT)
    # a division, as whoever feeds the float file does it: so both files see the same numbers to the last bit
    return b.node("Div", [real, b.scalar(255)], f"{INPUT}.unit") if input_type == "uint8" else real
