"""From a size to bits: which width every DSConv layer gets, so that the whole fits and the least is lost."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.errors import InputError
from dsconvert.export.onnx import export_quantized
from dsconvert.fit.allocate import Choice, allocate
from dsconvert.graph.integer import QConv, QParams
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.model import DSModel
from dsconvert.yolo.network import Head

WIDTHS = (2, 3, 4, 5, 6, 8)
UNIFORM_BITS = 4  # what is allocated by default: as many bytes as this many bits everywhere would take
KDS_BITS = 4
Damage = Mapping[str, Mapping[int, float]]


def stored_bytes(shape: torch.Size, bits: int, block_size: int) -> int:
    """Bytes of a weight (cho, chi, kh, kw) in the packed file: VQK, and below 8 bits its KDS."""
    cho, chi, kh, kw = shape
    kds = 0 if bits == 8 else cho * block_count(chi, block_size) * kh * kw * KDS_BITS
    return -(-(cho * chi * kh * kw * bits + kds) // 8)


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
    smallest = {name: min(c.bits for c in by_bits) for name, by_bits in options.items()}
    floor = file_size(smallest)
    if floor > target:
        raise InputError(
            f"--target-size {target / 1e6:.2f}MB is out of reach: the smallest file is {floor / 1e6:.2f} MB."
        )
    budget = target - floor + sum(min(c.size for c in by_bits) for by_bits in options.values())
    while True:
        bits = {name: c.bits for name, c in allocate(options, budget).items()}
        excess = file_size(bits) - target  # other widths need other unpacking nodes, so a few hundred bytes either way
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
    """Bytes of the packed ONNX file of a model with these bits (other layers int8), before it is fitted."""
    convs = {}
    for name, p in params.items():
        width = bits.get(name, 8)
        cho, chi, kh, kw = p.weight.shape
        block = block_size if width < 8 else chi
        vqk = torch.zeros(p.weight.shape, dtype=torch.int8)
        m = torch.ones(cho, block_count(chi, block), kh, kw, dtype=torch.int8)
        convs[name] = QConv(DSTensor(vqk, m, None, torch.ones(cho), width, block), p.bias.detach().cpu())
    return export_quantized(DSModel(graph, convs, own, head, imgsz, {}), "packed", imgsz).ByteSize()
