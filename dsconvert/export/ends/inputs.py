"""The types in which a file takes its image: float32 or float16 in 0..1, or bytes 0..255."""

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
BYTES = QParams.of_range(0.0, 1.0)  # on this grid (scale 1/255, zero point 0) the integers are the bytes


def add_real_image(b: OnnxBuilder, input_type: str) -> str:
    """Return the name of the image as float32 in 0..1, whatever its type in the file."""
    if input_type == "float32":
        return INPUT
    real = b.node("Cast", [INPUT], f"{INPUT}.real", to=TensorProto.FLOAT)
    # Users divide by 255 before they feed the float file. A division here gives the same numbers to the last bit; a
    # multiplication by 1/255 would not.
    return b.node("Div", [real, b.scalar(255)], f"{INPUT}.unit") if input_type == "uint8" else real
