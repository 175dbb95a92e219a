"""Check that a model read from a file can be run: its numbers are usable and its layers fit together.

A model file may come from a stranger. A model that passes fails in no later stage, and needs no more memory than a
network of its size should.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dsconvert.base.size import Size
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import block_count
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import grid_of, gridded
from dsconvert.graph.ir import display_name
from dsconvert.graph.shapes import check_node, value_shapes
from dsconvert.model.model import Converted, DSModel, damage_by_bits
from dsconvert.yolo.layers import MAX_MASKS
from dsconvert.yolo.network import MAX_ANCHOR, MAX_STRIDE, Head

Shape = tuple[int, int, int, int]  # of a weight: cho, chi, kh, kw
MAX_NODES, MAX_SIDE = 5000, 4096
MAX_VALUES = 1 << 29  # numbers in one tensor: the largest of a yolov5x6 at 4096 pixels has 335 million
# Beyond these bounds, products of a few numbers leave float32. Fitted CDSw lie between 1e-30 (a channel without
# weights, see `QConv.with_room`) and some thousands, scales of grids between 4e-9 (`QParams.of_range`) and 60000 / 255.
LEAST_CDS, LEAST_GRID, MOST = 1e-30, 1e-12, 1e12


@dataclass(frozen=True)
class Tensor:
    """What a tensor of a model file must be: type, shape, and range with both ends included."""

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float

    def check(self, name: str, value: NDArray[Any]) -> None:
        """Raise ValueError, saying what is wrong, for any other array."""
        if value.dtype != np.dtype(self.dtype):
            raise ValueError(f"{name} holds {value.dtype} numbers, not {self.dtype}")
        if value.shape != self.shape:
            raise ValueError(f"{name} has shape {value.shape}, not {self.shape}")
        if not bool(np.isfinite(value).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
        if value.size and not self.low <= float(value.min()) <= float(value.max()) <= self.high:
            raise ValueError(f"{name} holds numbers outside {self.low:g} to {self.high:g}")


def tensors_of(shape: Shape, format: WeightFormat) -> dict[str, Tensor]:
    """Return the tensors that a model file holds for one convolution, by the last part of their names."""
    cho, chi, kh, kw = shape
    blocks = (cho, block_count(chi, format.block_size), kh, kw)
    shifts: dict[str, Tensor] = {}
    if format.code.real:
        shifts = {"alpha": Tensor("float32", blocks, -MOST, MOST)}
    elif not format.is_plain:
        shifts = {"kds": Tensor("uint8", (_bytes(math.prod(blocks) * format.kds_bits),), 0, 255)}
    return {
        format.code.part: Tensor("uint8", (_bytes(math.prod(shape) * format.bits),), 0, 255),
        **shifts,
        # in float32, LEAST_CDS is slightly larger than the constant
        "cdsw": Tensor("float32", (cho,), LEAST_CDS, MOST),
        "cdsb": Tensor("float32", (cho,), -MOST, MOST),
    }


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def check_model(model: DSModel) -> None:
    """Raise ValueError, saying what is wrong, for a model that cannot be used."""
    _check_head(model.head, model.imgsz)
    if len(model.graph.nodes) > MAX_NODES:
        raise ValueError("too many nodes")
    for node in model.graph.nodes:
        check_node(node)
    if model.activations and model.has_real_alpha:
        raise ValueError("real shifts have no int8 activations")
    if model.activations:
        if missing := gridded(model.graph) - set(model.activations):  # only an export layout may leave grids out
            raise ValueError(f"no grid of {min(missing)}")
        for name, grid in grid_of(model.graph, model.activations).items():
            check_grid(name, grid)
    else:
        for name, conv in model.convs.items():
            if not float(conv.weight.weight().abs().max()) <= MOST:
                raise ValueError(f"weights of {name} beyond {MOST:g}")
    _check_shapes(model)
    if found := largest_sum(model):
        raise ValueError(f"the sums of layer {found[0]} can reach {found[1]}, beyond 32-bit integers")
    _check_provenance(model)


def _check_head(head: Head, imgsz: Size) -> None:
    if not 1 <= head.nc <= 10000 or not all(len(n) <= 200 for n in head.names):
        raise ValueError("class names")
    if not isinstance(head.class_untrained, bool) or (head.class_untrained and head.nc > 1):
        raise ValueError("untrained class")
    if not 0 <= head.nm <= MAX_MASKS:
        raise ValueError("mask coefficients")
    if not head.strides or not all(1 <= s <= MAX_STRIDE for s in head.strides):
        raise ValueError("strides")
    if len(head.anchors) != len(head.strides) or not 1 <= head.na <= 100 or {len(a) for a in head.anchors} != {head.na}:
        raise ValueError("number of anchors")
    if not all(0 < size <= MAX_ANCHOR for level in head.anchors for anchor in level for size in anchor):
        raise ValueError("anchors")
    if not all(imgsz.fits(s, MAX_SIDE) for s in (head.stride, *head.strides)):
        raise ValueError("image size")


def check_grid(name: str, grid: QParams) -> None:
    """Raise ValueError for a grid that cannot be computed with."""
    if not LEAST_GRID <= grid.scale <= MOST or not 0 <= grid.zero_point <= 255:
        raise ValueError(f"grid of {name}")


def largest_sum(model: Converted) -> tuple[str, int] | None:
    """Return the first layer whose accumulator could leave int32, and its largest sum; None if there is no such
    layer.
    """
    if not model.activations:
        return None
    grids = grid_of(model.graph, model.activations)
    for node in model.graph.convs():
        bound = int(model.convs[node.name].largest_sum(grids[node.inputs[0]].scale).max())
        if bound >= 1 << 31:
            return display_name(node), bound
    return None


def _check_shapes(model: DSModel) -> None:
    """Raise ValueError unless every layer fits its inputs, and the outputs are the head's maps."""
    graph, head, size = model.graph, model.head, model.imgsz
    shapes = value_shapes(graph, {n: tuple(c.weight.vqk.shape) for n, c in model.convs.items()}, size.image)
    for name, shape in shapes.items():
        if math.prod(shape) > MAX_VALUES:
            raise ValueError(f"{name} is too large")
    count = len(graph.outputs) - bool(head.nm)
    channels = [sum(head.parts)] if count == len(head.strides) else head.parts
    wanted = [(head.na * c, *size.over(s).pair) for s in head.strides for c in channels]
    if head.nm:
        wanted.append((head.nm, 2 * size.height // head.strides[0], 2 * size.width // head.strides[0]))
    if [shapes[name] for name in graph.outputs] != wanted:
        raise ValueError("its outputs are not the maps of its head")


def _check_provenance(model: DSModel) -> None:
    """Raise ValueError for provenance that later code cannot read: texts, options, and damage by layer and bits."""
    provenance = model.provenance
    for key, kind in {"source": str, "command": str, "options": dict, "damage": dict}.items():
        if not isinstance(provenance.get(key, kind()), kind):
            raise ValueError(f"provenance {key}")
    calib = provenance.get("options", {}).get("calib")
    if calib is not None and not isinstance(calib, str):
        raise ValueError("provenance calib")
    for name, by_bits in provenance.get("damage", {}).items():
        if name not in model.convs or not isinstance(by_bits, dict):
            raise ValueError("provenance damage")
        weight = model.convs[name].weight
        if not {"4", str(weight.bits)} <= set(damage_by_bits(by_bits, weight)):
            raise ValueError("provenance damage")
        if not all(isinstance(d, (int, float)) and math.isfinite(d) and d >= 0 for d in by_bits.values()):
            raise ValueError("provenance damage")
