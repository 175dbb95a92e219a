"""The converted model as a value: what fitting makes, what the model file holds, what export reads."""

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
    activations: Mapping[str, QParams]  # by value name (`grid_of` completes them); empty when activations stay float

    @property
    def weight_count(self) -> int:
        """Number of convolution weights, biases not counted."""
        return sum(c.weight.vqk.numel() for c in self.convs.values())

    @property
    def weight_bits(self) -> float:
        """Mean stored bits per weight, KDS included."""
        total = sum(c.weight.weight_bits * c.weight.vqk.numel() for c in self.convs.values())
        return total / self.weight_count

    @property
    def has_real_alpha(self) -> bool:
        """True when any weight's shifts are the paper's real numbers; such a model has no int8 form."""
        return any(c.weight.format.code.real for c in self.convs.values())


@dataclass(frozen=True)
class DSModel(Converted):
    """A quantized detector of a family whose decoding is known."""

    head: Head
    imgsz: Size  # calibrated at
    provenance: Mapping[str, Any]  # where it came from (plain JSON values)


def is_dsconv(weight: DSTensor) -> bool:
    """True when the layer is DSConv, False when it is plain int8 per channel."""
    return not weight.is_plain_int8


def damage_by_bits(damage: Mapping[str, float], weight: DSTensor) -> dict[str, float]:
    """A layer's provenance, "bits/block size" -> damage, as bits -> damage at the weight's block size (for plain int8
    the largest there is). Raises ValueError when a key is neither that nor bits alone, which stand for any block."""
    found = [(*key.partition("/")[::2], value) for key, value in damage.items()]
    sizes = {int(size) for bits, size, _ in found if size and int(bits) < 8}
    block = weight.block_size if is_dsconv(weight) else max(sizes, default=0)
    return {bits: value for bits, size, value in found if not size or int(bits) == 8 or int(size) == block}
