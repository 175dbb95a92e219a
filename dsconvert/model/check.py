"""Whether a model read from a file can be run at all: its numbers usable, its layers fitting each other.

A model file may come from a stranger. What passes here fails in none of the later stages, and asks for no more memory
than a network of its size needs."""

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
MAX_VALUES = 1 << 29  # of one tensor: the largest of a yolov5x6 at 4096 pixels has 335 million
# Beyond these, products of a few of them leave float32. Fits end between 1e-30 (CDSw of a channel without weights, see
# `QConv.with_room`) and some thousands, grids between 4e-9 (`QParams.of_range`) and 60000 / 255.
LEAST_CDS, LEAST_GRID, MOST = 1e-30, 1e-12, 1e12


@dataclass(frozen=True)
class Tensor:
    """One kind of tensor in a model file: its numbers' type, shape and range (both ends belong to it)."""

    dtype: str
    shape: tuple[int, ...]
    low: float
    high: float

    def check(self, name: str, value: NDArray[Any]) -> None:
        """Raises ValueError saying what of it is wrong."""
        if value.dtype != np.dtype(self.dtype):
            raise ValueError(f"{name} holds {value.dtype} numbers, not {self.dtype}")
        if value.shape != self.shape:
            raise ValueError(f"{name} has shape {value.shape}, not {self.shape}")
        if not bool(np.isfinite(value).all()):
            raise ValueError(f"{name} holds numbers that are not finite")
        if value.size and not self.low <= float(value.min()) <= float(value.max()) <= self.high:
            raise ValueError(f"{name} holds numbers outside {self.low:g} to {self.high:g}")


def tensors_of(shape: Shape, format: WeightFormat) -> dict[str, Tensor]:
    """All that a model file holds of one convolution, by the last part of the tensor's name."""
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
        # in float32 LEAST_CDS is a little above what it says
        "cdsw": Tensor("float32", (cho,), LEAST_CDS, MOST),
        "cdsb": Tensor("float32", (cho,), -MOST, MOST),
    }


def _bytes(bits: int) -> int:
    return -(-bits // 8)


def check_model(model: DSModel) -> None:
    """Raises ValueError saying what of the model cannot be used."""
    _check_head(model.head, model.imgsz)
    if len(model.graph.nodes) > MAX_NODES:
        raise ValueError("too many nodes")
    for node in model.graph.nodes:
        check_node(node)
    if model.activations and model.has_real_alpha:
        raise ValueError("real shifts have no int8 activations")
    if model.activations:
        if missing := gridded(model.graph) - set(model.activations):  # a layout alone may leave some out
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
    """Raises ValueError for a grid that cannot be computed with."""
    if not LEAST_GRID <= grid.scale <= MOST or not 0 <= grid.zero_point <= 255:
        raise ValueError(f"grid of {name}")


def largest_sum(model: Converted) -> tuple[str, int] | None:
    """The first layer whose accumulator could leave int32, and how far its sums reach; None where there is none."""
    if not model.activations:
        return None
    grids = grid_of(model.graph, model.activations)
    for node in model.graph.convs():
        bound = int(model.convs[node.name].largest_sum(grids[node.inputs[0]].scale).max())
        if bound >= 1 << 31:
            return display_name(node), bound
    return None


def _check_shapes(model: DSModel) -> None:
    """Every layer takes what the one before it gives, and the outputs are the head's maps."""
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
    """Of what is read back from it: texts, options, and the damage by layer and bits."""
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
