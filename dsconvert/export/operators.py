"""Write an integer weight as the float weight that an ONNX operator reads."""

from __future__ import annotations

import numpy as np

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.weights.weights import Weights


def real_weight(
    b: OnnxBuilder, name: str, weight: DSTensor, weights: Weights, more: int = 0, fill: int = 0
) -> tuple[str, str]:
    """Write a weight and its DequantizeLinear; return the names of the float weight and of CDSw.

    more, fill: how many output and input channels of zeros to add. The zeros are made at load; only the scales of the
        additional output channels are stored.
    """
    cds = b.tensor(f"{name}.cds", np.append(weight.cds_w.numpy(), np.ones(more)).astype(np.float32))
    integers = weights.add(name, weight)
    if more or fill:
        integers = b.node("Pad", [integers, b.shape(*[0] * 4, more, fill, 0, 0)], f"{name}.all")
    return b.node("DequantizeLinear", [integers, cds], f"{name}.w", axis=0), cds
