"""The converted model as a value: the result of the fit, which the model file stores and export reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsconvert.base.size import Size
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Graph
from dsconvert.yolo.network import Head


@dataclass(frozen=True)
class Converted:
    """A quantized network, whatever its outputs mean."""

    graph: Graph
    convs: Mapping[str, QConv]  # by convolution name
    activations: Mapping[str, QParams]  # by value name (`grid_of` completes them); empty where activations stay float

    @property
    def weight_count(self) -> int:
        """Number of convolution weights, without biases."""
        return sum(c.weight.vqk.numel() for c in self.convs.values())

    @property
    def weight_bits(self) -> float:
        """Mean stored bits per weight, with KDS."""
        total = sum(c.weight.weight_bits * c.weight.vqk.numel() for c in self.convs.values())
        return total / self.weight_count

    @property
    def has_real_alpha(self) -> bool:
        """Whether any weight has the paper's real KDS; such a model has no int8 form."""
        return any(c.weight.format.code.real for c in self.convs.values())


@dataclass(frozen=True)
class DSModel(Converted):
    """A quantized detector whose outputs dsconvert can decode."""

    head: Head
    imgsz: Size  # size of its calibration images
    provenance: Mapping[str, Any]  # how it was made (plain JSON values)


def is_dsconv(weight: DSTensor) -> bool:
    """Return True for a DSConv layer, False for plain per-channel int8."""
    return not weight.is_plain_int8


def damage_by_bits(damage: Mapping[str, float], weight: DSTensor) -> dict[str, float]:
    """Return a layer's expected damage by bits, at the weight's block size.

    damage: the layer's provenance, "bits/block size" -> damage. A key may also be bits alone, which stand for any
        block.
    weight: the layer's weight. For plain int8 the largest block size is taken.

    Raises ValueError for other keys.
    """
    found = [(*key.partition("/")[::2], value) for key, value in damage.items()]
    sizes = {int(size) for bits, size, _ in found if size and int(bits) < 8}
    block = weight.block_size if is_dsconv(weight) else max(sizes, default=0)
    return {bits: value for bits, size, value in found if not size or int(bits) == 8 or int(size) == block}
