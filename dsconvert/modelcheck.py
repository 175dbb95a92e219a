"""Whether a model read from a file can be run at all: its numbers usable, its layers fitting each other.

A model file may come from a stranger. What passes here fails in none of the later stages, and asks for no more memory
than a network of its size needs; the network is run once for that, without memory (torch's meta device)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsconvert.graph.integer import QParams, grid_of
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.run import ACTIVATIONS, run_float
from dsconvert.model import DSModel, damage_by_bits
from dsconvert.yolo.network import MAX_ANCHOR, MAX_POOL, MAX_STRIDE, Head

MAX_NODES, MAX_SIDE = 5000, 4096
MAX_VALUES = 1 << 29  # of one tensor: the largest of a yolov5x6 at 4096 pixels has 335 million

# What each operation's attributes may be: least and most. Other attributes are an error, too.
_CONV = {"stride": (1, 64), "padding": (0, 256), "dilation": (1, 64), "groups": (1, 1 << 16)}
_POOL = {"kernel": (1, MAX_POOL), "stride": (1, 64), "padding": (0, MAX_POOL)}
_RANGES: dict[str, dict[str, tuple[int, int]]] = {"conv": _CONV, "maxpool": _POOL, "upsample": {"scale": (1, 16)}}
_INPUTS = {"add": (2, 2), "concat": (1, 1000)}  # of the others one


def check_model(model: DSModel) -> None:
    """Raises ValueError saying what of the model cannot be used."""
    _check_head(model.head, model.imgsz)
    if len(model.graph.nodes) > MAX_NODES:
        raise ValueError("too many nodes")
    for node in model.graph.nodes:
        _check_node(node)
    for name, conv in model.convs.items():
        for part, value in (("CDSw", conv.weight.cds_w), ("CDSb", conv.bias)):
            if value.dtype != torch.float32 or not bool(torch.isfinite(value).all()):
                raise ValueError(f"{part} of {name} holds what is no finite float32 number")
    if model.activations:
        for name, grid in grid_of(model.graph, model.activations).items():
            _check_grid(name, grid)
    _check_shapes(model.graph, model)
    _check_provenance(model)


def _check_head(head: Head, imgsz: int) -> None:
    if not 1 <= head.nc <= 10000 or not all(len(n) <= 200 for n in head.names):
        raise ValueError("class names")
    if not head.strides or not all(1 <= s <= MAX_STRIDE for s in head.strides):
        raise ValueError("strides")
    if len(head.anchors) != len(head.strides) or not 1 <= head.na <= 100 or {len(a) for a in head.anchors} != {head.na}:
        raise ValueError("number of anchors")
    if not all(0 < size <= MAX_ANCHOR for level in head.anchors for anchor in level for size in anchor):
        raise ValueError("anchors")
    if not head.stride <= imgsz <= MAX_SIDE or any(imgsz % s for s in head.strides):
        raise ValueError("image size")


def _check_node(node: Node) -> None:
    if not isinstance(node.name, str) or not 0 < len(node.name) <= 200 or not node.name.isprintable():
        raise ValueError("a node's name")
    least, most = _INPUTS.get(node.op, (1, 1))
    if not least <= len(node.inputs) <= most:
        raise ValueError(f"inputs of {node.name}")
    if node.op == "act":
        if set(node.attrs) != {"kind"} or node.attrs["kind"] not in ACTIVATIONS:
            raise ValueError(f"activation {node.name}")
        return
    ranges = _RANGES.get(node.op, {})
    if set(node.attrs) != set(ranges):
        raise ValueError(f"attributes of {node.name}")
    for key, (low, high) in ranges.items():
        if type(node.attrs[key]) is not int or not low <= node.attrs[key] <= high:
            raise ValueError(f"{key} of {node.name}")


def _check_grid(name: str, grid: QParams) -> None:
    if not 1e-30 < grid.scale < 1e30 or not 0 <= grid.zero_point <= 255:
        raise ValueError(f"grid of {name}")


def _check_shapes(graph: Graph, model: DSModel) -> None:
    """Every layer takes what the one before it gives, and the outputs are the head's maps."""

    def measure(name: str, value: Tensor) -> None:
        if value.numel() > MAX_VALUES:
            raise ValueError(f"{name} is too large")

    meta = torch.device("meta")
    params = {
        name: ConvParams(torch.empty(c.weight.vqk.shape, device=meta), torch.empty(c.bias.shape, device=meta))
        for name, c in model.convs.items()
    }
    try:
        maps = run_float(graph, params, torch.empty(1, 3, model.imgsz, model.imgsz, device=meta), measure)
    except (RuntimeError, TypeError, IndexError, ArithmeticError):
        raise ValueError("its layers do not fit each other") from None
    head = model.head
    channels = [head.na * (head.nc + 5)] if len(maps) == len(head.strides) else [head.na * 4, head.na * (head.nc + 1)]
    wanted = [(1, c, model.imgsz // s, model.imgsz // s) for s in head.strides for c in channels]
    if [tuple(m.shape) for m in maps] != wanted:
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
