"""Integer weights as the real ones that operators read."""

from __future__ import annotations

import numpy as np

from dsconvert.base.builder import OnnxBuilder
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.export.weights.weights import Weights


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
