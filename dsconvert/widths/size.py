"""Choose bits and block size of every DSConv layer, so that the file has a given size and the damage is least."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache

import onnx
import torch

from dsconvert.base.builder import OnnxBuilder
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.dsconv.codes import FREE, usual_format
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor, block_count
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import PACKED, add_int8_weight
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.measure.damage import formats_of
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.compact import compact
from dsconvert.widths.allocate import Choice, allocate
from dsconvert.yolo.network import Head

BITS = (1, 2, 3, 4, 5, 6, 8)
BLOCK_SIZES = (16, 32)  # block sizes to choose from if the user names none
UNIFORM = WeightFormat(4, 32, FREE)  # the default budget is the size of this format in every layer
TRIES = 8  # most files that are built to find one of a given size
FULL = 0.002  # share of the target size that may stay unused
Damage = Mapping[str, Mapping[WeightFormat, float]]
Formats = Mapping[str, WeightFormat]


@lru_cache(4096)
def stored_bytes(shape: torch.Size, format: WeightFormat) -> int:
    """Return the bytes that a weight adds to the packed file: VQK, m and the nodes that decode them.

    The weight is counted as decoded by itself. Together with other layers it needs fewer bytes for nodes. But then the
    size of one layer would depend on the formats of others, and the allocation needs independent sizes.

    shape: (cho, chi, kh, kw).
    """
    b = OnnxBuilder(PACKED.opset)
    name = "model.00.m.0.cv0"
    add_int8_weight(b, name, empty_weight(shape, format), PACKED)
    # constants and tables are shared by all layers, so they are not counted
    nodes = [n for n in b.nodes if n.output[0].startswith(name)]
    tensors = [t for t in b.initializers.values() if t.name.startswith(name)]
    return compact(onnx.ModelProto(graph=onnx.GraphProto(node=nodes, initializer=tensors))).graph.ByteSize()


def empty_weight(shape: torch.Size, format: WeightFormat) -> DSTensor:
    """Return a weight of the given format with all bits 0, for measuring sizes."""
    cho, chi, kh, kw = shape
    m = torch.ones(cho, block_count(chi, format.block_size), kh, kw, dtype=torch.int8)
    return DSTensor(torch.zeros(shape, dtype=format.code.stored_as), m, torch.ones(cho), format)


def of_every_layer(params: Mapping[str, ConvParams], formats: Formats) -> dict[str, WeightFormat]:
    """Add plain int8 for every convolution that has no format yet."""
    return {name: formats.get(name, usual_format(8, p.weight.shape[1], 0)) for name, p in params.items()}


def choices(params: Mapping[str, ConvParams], damage: Damage) -> dict[str, list[Choice]]:
    """Return what the allocation may choose from, by convolution name."""
    return {
        name: [Choice(f, stored_bytes(params[name].weight.shape, f), d) for f, d in by_format.items()]
        for name, by_format in damage.items()
    }


def formats_like_uniform(params: Mapping[str, ConvParams], damage: Damage) -> dict[str, WeightFormat]:
    """Return formats by convolution name that take at most the bytes of `UNIFORM` in every layer.

    A layer that has no format so small counts with the bytes of its smallest.
    """
    options = choices(params, damage)
    uniform = {name: stored_bytes(params[name].weight.shape, UNIFORM) for name in damage}
    budget = sum(max(uniform[name], min(c.size for c in some)) for name, some in options.items())
    return {name: c.format for name, c in allocate(options, budget).items()}


def formats_for_file(
    params: Mapping[str, ConvParams], damage: Damage, target: int, file_size: Callable[[Formats], int]
) -> dict[str, WeightFormat]:
    """Return formats by convolution name so that `file_size(formats)` is at most `target` bytes.

    Raises InputError, with the smallest possible size, when the target is out of reach.
    """
    options = choices(params, damage)
    least = {name: min(some, key=lambda c: c.size) for name, some in options.items()}
    smallest = {name: c.format for name, c in least.items()}
    floor = file_size(smallest)
    if floor > target:
        raise InputError.naming(
            "{target_size} {:.2f}MB is out of reach: the smallest file is {:.2f} MB.", target / 1e6, floor / 1e6
        )
    least_bytes = sum(c.size for c in least.values())
    fits, over, best = least_bytes, math.inf, smallest
    budget, misses = target - floor + least_bytes, 0
    for _ in range(TRIES):
        chosen = allocate(options, budget)
        formats = {name: c.format for name, c in chosen.items()}
        counted = sum(c.size for c in chosen.values())
        room = target - file_size(formats)
        if room < 0:
            # Every budget from `counted` up gives the same formats, so try a smaller one. Go further down at every
            # miss: otherwise a file that is a few bytes too large could use up all tries.
            over, budget = counted, counted + room * 2**misses
            misses += 1
        else:
            unchanged, fits, best = formats == best, budget, formats
            if room <= FULL * target or (unchanged and math.isinf(over)):
                break
            budget += room  # exact if layers take as many bytes as counted; otherwise the next line halves the interval
        if not fits < budget < over:
            budget = int(fits + over) // 2
        if over - fits <= FULL * target:
            break
    return best


def unfitted(params: Mapping[str, ConvParams], formats: Formats) -> dict[str, QConv]:
    """Return convolutions of the largest size that fitted ones in these formats can have; other layers are int8."""
    # The number of bits of the integer biases is known only after the fit, so all get 32 bits here.
    return {
        name: QConv(empty_weight(params[name].weight.shape, format), torch.full_like(params[name].bias, 1e30).cpu())
        for name, format in of_every_layer(params, formats).items()
    }


def judged_formats(
    params: Mapping[str, ConvParams], chosen: Sequence[str], block_size: int | None, bits: Sequence[int] = BITS
) -> dict[str, list[WeightFormat]]:
    """Return the formats that each chosen layer can be stored in.

    block_size: the only block size; None: all of BLOCK_SIZES.
    bits: to choose from.
    """
    sizes = [block_size] if block_size else BLOCK_SIZES
    return {name: formats_of(params[name].weight.shape[1], bits, sizes) for name in chosen}


def formats_as_asked(
    params: Mapping[str, ConvParams], damage: Damage, chosen: Sequence[str], bits: int | None, block_size: int | None,
    target: int | None, file_size: Callable[[Formats], int],
) -> dict[str, WeightFormat]:  # fmt: skip
    """Return a format for every chosen layer.

    bits: if given, all layers get so many bits. Otherwise formats are allocated by damage.
    block_size: if given, all layers get blocks of this size.
    target: largest packed file in bytes; None: the bytes of `UNIFORM` in every layer.
    file_size: formats -> bytes of the packed file.
    """
    if bits is not None:
        block = block_size or min(BLOCK_SIZES)
        return {name: usual_format(bits, params[name].weight.shape[1], block) for name in chosen}
    if target is None:
        return formats_like_uniform(params, damage)
    return formats_for_file(params, damage, target, file_size)


def packed_size(
    graph: Graph,
    params: Mapping[str, ConvParams],
    own: Mapping[str, QParams],
    head: Head,
    imgsz: Size,
    formats: Formats,
) -> int:
    """Return the most bytes that the packed ONNX file of a model in these formats can have, before the model is
    fitted.
    """
    convs = unfitted(params, formats)
    return compact(export_quantized(DSModel(graph, convs, own, head, imgsz, {}), PACKED, imgsz)).ByteSize()
