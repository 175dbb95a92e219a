"""From a size to bits: which width every DSConv layer gets, so that the whole fits and the least is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx
import torch

from dsconvert.dsconv.tensor import DSTensor, block_count, used_block_size
from dsconvert.errors import InputError
from dsconvert.export.builder import OnnxBuilder
from dsconvert.export.compact import compact
from dsconvert.export.layouts import LAYOUT_OPSET, add_int8_weight
from dsconvert.export.onnx import export_quantized
from dsconvert.fit.allocate import Choice, allocate
from dsconvert.graph.integer import QConv, QParams
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.model import DSModel
from dsconvert.yolo.network import Head

WIDTHS = (2, 3, 4, 5, 6, 8)
UNIFORM_BITS = 4  # what is allocated by default: as many bytes as this many bits everywhere would take
Damage = Mapping[str, Mapping[int, float]]


def stored_bytes(shape: torch.Size, bits: int, block_size: int) -> int:
    """Bytes that a weight (cho, chi, kh, kw) adds to the packed file: VQK, KDS and the nodes that unpack them."""
    b = OnnxBuilder(LAYOUT_OPSET["packed"])
    name = "model.00.m.0.cv0"
    add_int8_weight(b, name, empty_weight(shape, bits, block_size), "packed")
    # constants and tables are shared by all layers
    nodes = [n for n in b.nodes if n.output[0].startswith(name)]
    tensors = [t for t in b.initializers.values() if t.name.startswith(name)]
    return compact(onnx.ModelProto(graph=onnx.GraphProto(node=nodes, initializer=tensors))).graph.ByteSize()


def empty_weight(shape: torch.Size, bits: int, block_size: int) -> DSTensor:
    """A weight of zeros of the given kind; at 8 bits plain int8, one block wide."""
    cho, chi, kh, kw = shape
    block = used_block_size(bits, chi, block_size)
    m = torch.ones(cho, block_count(chi, block), kh, kw, dtype=torch.int8)
    return DSTensor(torch.zeros(shape, dtype=torch.int8), m, None, torch.ones(cho), bits, block)


def choices(params: Mapping[str, ConvParams], damage: Damage, block_size: int) -> dict[str, list[Choice]]:
    """What the allocator may pick from, by convolution name."""
    return {
        name: [Choice(b, stored_bytes(params[name].weight.shape, b, block_size), d) for b, d in by_bits.items()]
        for name, by_bits in damage.items()
    }


def bits_like_uniform(params: Mapping[str, ConvParams], damage: Damage, block_size: int) -> dict[str, int]:
    """Bits by name within the bytes that `UNIFORM_BITS` in every layer would take."""
    budget = sum(stored_bytes(params[name].weight.shape, UNIFORM_BITS, block_size) for name in damage)
    return {name: c.bits for name, c in allocate(choices(params, damage, block_size), budget).items()}


def bits_for_file(
    params: Mapping[str, ConvParams], damage: Damage, block_size: int, target: int, file_size: Callable[..., int]
) -> dict[str, int]:
    """Bits by name so that `file_size(bits)` is at most `target` bytes.

    Raises InputError, saying how small it gets, when the target is out of reach."""
    options = choices(params, damage, block_size)
    smallest = {name: min(by_bits, key=lambda c: c.size).bits for name, by_bits in options.items()}
    floor = file_size(smallest)
    if floor > target:
        raise InputError(
            f"--target-size {target / 1e6:.2f}MB is out of reach: the smallest file is {floor / 1e6:.2f} MB."
        )
    budget = target - floor + sum(min(c.size for c in by_bits) for by_bits in options.values())
    while True:
        bits = {name: c.bits for name, c in allocate(options, budget).items()}
        excess = file_size(bits) - target  # lengths within lengths: a few bytes either way
        if excess <= 0 or bits == smallest:
            return bits
        budget = max(budget - excess, sum(min(c.size for c in by_bits) for by_bits in options.values()))


def packed_size(
    graph: Graph,
    params: Mapping[str, ConvParams],
    own: Mapping[str, QParams],
    head: Head,
    imgsz: int,
    bits: Mapping[str, int],
    block_size: int,
) -> int:
    """Most bytes of the packed ONNX file of a model with these bits (other layers int8), before it is fitted."""
    # how many bits the integer biases need is known after the fit only: here they get all 32
    convs = {
        name: QConv(empty_weight(p.weight.shape, bits.get(name, 8), block_size), torch.full_like(p.bias, 1e30).cpu())
        for name, p in params.items()
    }
    return compact(export_quantized(DSModel(graph, convs, own, head, imgsz, {}), "packed", imgsz)).ByteSize()
