"""Small files: CDSw and biases as half floats.

In a network of few weights, the numbers of its channels take a tenth of the file: 7 bytes for each CDSw and its bias.
Half floats take 4. They have 11 significant bits, so a number moves by at most one part in 2048. The model is rounded
before it is written, so the file holds its numbers exactly.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from dsconvert.base.builder import OnnxBuilder
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv, grid_of
from dsconvert.model.model import Converted

LARGEST = 15  # exponent of the largest number: half floats end at 65504
SMALLEST = 2.0**-14  # of half floats with all 11 bits
# a channel that is smaller than the layer's largest by this factor vanishes when both are rounded to one grid: it stays
# within a sixteenth of a step
LOST = 2.0**12
SCALES = ".cds"  # names of the initializers CDSw end so


def in_halves(model: Converted) -> Converted | None:
    """Return the model with every CDSw and every bias rounded to a half float times a power of two of the whole file.

    The result is None where channels differ too much for that.
    """
    scales = [conv.weight.cds_w for conv in model.convs.values()]
    up = _up(scales)
    if any(float(some.min()) * up < SMALLEST and float(some.max()) * up < LOST * SMALLEST for some in scales):
        return None
    grids = grid_of(model.graph, model.activations)
    return replace(
        model, convs={n.name: _rounded(model.convs[n.name], grids[n.inputs[0]], up) for n in model.graph.convs()}
    )


def _rounded(conv: QConv, source: QParams, up: float) -> QConv:
    """Return a convolution that reads integers on the grid `source`, with CDSw a half float divided by `up`."""
    cds_w = (conv.weight.cds_w * up).clamp_min(SMALLEST).half().float() / up
    made = replace(conv, weight=replace(conv.weight, cds_w=cds_w))
    integers = torch.from_numpy(significant(made.bias_int(source.scale).numpy()))
    return replace(made, bias=(integers * made.unit(source.scale).double()).float())


def significant(integers: NDArray[np.int32]) -> NDArray[np.float64]:
    """Round integers to those with 11 significant bits."""
    down = _down(integers)
    made: NDArray[np.float64] = (integers * down).astype(np.float16).astype(np.float64) / down
    return made


def add_integers(b: OnnxBuilder, name: str, integers: NDArray[np.int64]) -> str:
    """Store integers with 11 significant bits as half floats; return the name of their INT32 value."""
    down = _down(integers)
    stored = b.tensor(f"{name}halves", (integers * down).astype(np.float16))
    value = _times(b, stored, f"{name}real", 1 / down)
    return b.node("Cast", [value], f"{name}0", to=TensorProto.INT32)


def join_scales(b: OnnxBuilder) -> None:
    """Store every CDSw of a file in one vector of half floats, and add the nodes that take it apart, before all others.

    The model must have been rounded by `in_halves`.
    """
    found = {name: numpy_helper.to_array(t) for name, t in b.initializers.items() if name.endswith(SCALES)}
    if not found:
        return
    up = _up(torch.tensor(scales) for scales in found.values())
    for name in found:
        del b.initializers[name]
    before, b.nodes = b.nodes, []
    stored = b.tensor("scale.halves", (np.concatenate(list(found.values())) * up).astype(np.float16))
    sizes = b.shape(*(len(scales) for scales in found.values()))
    whole = _times(b, stored, "scale.real", 1 / up)
    b.nodes.append(helper.make_node("Split", [whole, sizes], list(found), axis=0))
    b.nodes += before


def _times(b: OnnxBuilder, stored: str, name: str, factor: float) -> str:
    """Return the name of a half float vector's numbers times a factor, float32."""
    return b.node("Mul", [b.node("Cast", [stored], f"{name}.1", to=TensorProto.FLOAT), b.scalar(factor)], name)


def _down(integers: NDArray[Any]) -> float:
    """Return the power of two that integers are multiplied by: 1, unless the largest is beyond a half float."""
    return 2.0 ** min(0, _exponent(float(np.abs(integers).max(initial=1))))


def _up(scales: Iterable[Tensor]) -> float:
    """Return the power of two that all CDSw of a file are multiplied by. Padding channels have a CDSw of 1."""
    return 2.0 ** _exponent(max(1.0, *(float(some.max()) for some in scales)))


def _exponent(largest: float) -> int:
    """Return the power of two that brings the largest number below 2^LARGEST, and above half of that."""
    return LARGEST - math.frexp(largest)[1]
