"""Whether a model read from a file can be run at all: its numbers usable, its layers fitting each other.

A model file may come from a stranger. What passes here fails in none of the later stages, and asks for no more memory
than a network of its size needs."""

from __future__ import annotations

import math

import torch

from dsconvert.graph.integer import QParams, grid_of
from dsconvert.graph.shapes import check_node, value_shapes
from dsconvert.model import DSModel, damage_by_bits
from dsconvert.yolo.layers import MAX_MASKS
from dsconvert.yolo.network import MAX_ANCHOR, MAX_STRIDE, Head

MAX_NODES, MAX_SIDE = 5000, 4096
MAX_VALUES = 1 << 29  # of one tensor: the largest of a yolov5x6 at 4096 pixels has 335 million


def check_model(model: DSModel) -> None:
    """Raises ValueError saying what of the model cannot be used."""
    _check_head(model.head, model.imgsz)
    if len(model.graph.nodes) > MAX_NODES:
        raise ValueError("too many nodes")
    for node in model.graph.nodes:
        check_node(node)
    for name, conv in model.convs.items():
        for part, value in (("CDSw", conv.weight.cds_w), ("CDSb", conv.bias)):
            if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{part} of {name} holds what is no finite float32 number")
    if model.activations:
        for name, grid in grid_of(model.graph, model.activations).items():
            check_grid(name, grid)
    _check_shapes(model)
    _check_provenance(model)


def _check_head(head: Head, imgsz: int) -> None:
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
    if not head.stride <= imgsz <= MAX_SIDE or any(imgsz % s for s in head.strides):
        raise ValueError("image size")


def check_grid(name: str, grid: QParams) -> None:
    """Raises ValueError for a grid that cannot be computed with."""
    if not 1e-30 < grid.scale < 1e30 or not 0 <= grid.zero_point <= 255:
        raise ValueError(f"grid of {name}")


def _check_shapes(model: DSModel) -> None:
    """Every layer takes what the one before it gives, and the outputs are the head's maps."""
    graph, head, side = model.graph, model.head, model.imgsz
    shapes = value_shapes(graph, {n: tuple(c.weight.vqk.shape) for n, c in model.convs.items()}, (3, side, side))
    for name, shape in shapes.items():
        if math.prod(shape) > MAX_VALUES:
            raise ValueError(f"{name} is too large")
    count = len(graph.outputs) - bool(head.nm)
    channels = [sum(head.parts)] if count == len(head.strides) else head.parts
    wanted = [(head.na * c, side // s, side // s) for s in head.strides for c in channels]
    if head.nm:
        wanted.append((head.nm, 2 * side // head.strides[0], 2 * side // head.strides[0]))
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
