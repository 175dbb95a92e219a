"""From a size to widths: the bits and the block size of every DSConv layer, so that the whole fits and the least is
lost."""

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
BLOCK_SIZES = (16, 32)  # tried where the user names none
UNIFORM = WeightFormat(4, 32, FREE)  # what is allocated by default: as many bytes as this everywhere would take
TRIES = 8  # files that are looked at for one of a given size
FULL = 0.002  # what may be left of it
Damage = Mapping[str, Mapping[WeightFormat, float]]
Formats = Mapping[str, WeightFormat]


@lru_cache(4096)
def stored_bytes(shape: torch.Size, format: WeightFormat) -> int:
    """Bytes that a weight (cho, chi, kh, kw) adds to the packed file: VQK, KDS and the nodes that unpack them, if it is
    unpacked by itself. Of those unpacked together nodes are fewer bytes; what it counts for must not hang on others."""
    b = OnnxBuilder(PACKED.opset)
    name = "model.00.m.0.cv0"
    add_int8_weight(b, name, empty_weight(shape, format), PACKED)
    # constants and tables are shared by all layers
    nodes = [n for n in b.nodes if n.output[0].startswith(name)]
    tensors = [t for t in b.initializers.values() if t.name.startswith(name)]
    return compact(onnx.ModelProto(graph=onnx.GraphProto(node=nodes, initializer=tensors))).graph.ByteSize()


def empty_weight(shape: torch.Size, format: WeightFormat) -> DSTensor:
    """A weight of the given format that says nothing."""
    cho, chi, kh, kw = shape
    m = torch.ones(cho, block_count(chi, format.block_size), kh, kw, dtype=torch.int8)
    return DSTensor(torch.zeros(shape, dtype=format.code.stored_as), m, torch.ones(cho), format)


def of_every_layer(params: Mapping[str, ConvParams], formats: Formats) -> dict[str, WeightFormat]:
    """These formats, and plain int8 for all other convolutions."""
    return {name: formats.get(name, usual_format(8, p.weight.shape[1], 0)) for name, p in params.items()}


def choices(params: Mapping[str, ConvParams], damage: Damage) -> dict[str, list[Choice]]:
    """What the allocator may pick from, by convolution name."""
    return {
        name: [Choice(f, stored_bytes(params[name].weight.shape, f), d) for f, d in by_format.items()]
        for name, by_format in damage.items()
    }


def formats_like_uniform(params: Mapping[str, ConvParams], damage: Damage) -> dict[str, WeightFormat]:
    """Formats by name within the bytes that `UNIFORM` in every layer would take."""
    budget = sum(stored_bytes(params[name].weight.shape, UNIFORM) for name in damage)
    return {name: c.format for name, c in allocate(choices(params, damage), budget).items()}


def formats_for_file(
    params: Mapping[str, ConvParams], damage: Damage, target: int, file_size: Callable[[Formats], int]
) -> dict[str, WeightFormat]:
    """Formats by name so that `file_size(formats)` is at most `target` bytes.

    Raises InputError, saying how small it gets, when the target is out of reach."""
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
            # Every budget from `counted` on gives these formats again, so the next one lies below it. It lies further
            # below at every miss, or a file that is a few bytes too large would use up all tries.
            over, budget = counted, counted + room * 2**misses
            misses += 1
        else:
            unchanged, fits, best = formats == best, budget, formats
            if room <= FULL * target or (unchanged and math.isinf(over)):
                break
            budget += room  # right where layers are as many bytes as counted; else between what fits and what does not
        if not fits < budget < over:
            budget = int(fits + over) // 2
        if over - fits <= FULL * target:
            break
    return best


def unfitted(params: Mapping[str, ConvParams], formats: Formats) -> dict[str, QConv]:
    """Convolutions that take the most bytes which fitted ones of these formats, and int8 ones besides, can take."""
    # how many bits the integer biases need is known after the fit only: here they get all 32
    return {
        name: QConv(empty_weight(params[name].weight.shape, format), torch.full_like(params[name].bias, 1e30).cpu())
        for name, format in of_every_layer(params, formats).items()
    }


def judged_formats(
    params: Mapping[str, ConvParams], chosen: Sequence[str], block_size: int | None
) -> dict[str, list[WeightFormat]]:
    """What each chosen layer can be stored in, with blocks of that size or, without one, of all that are tried."""
    sizes = [block_size] if block_size else BLOCK_SIZES
    return {name: formats_of(params[name].weight.shape[1], BITS, sizes) for name in chosen}


def formats_as_asked(
    params: Mapping[str, ConvParams], damage: Damage, chosen: Sequence[str], bits: int | None, block_size: int | None,
    target: int | None, file_size: Callable[[Formats], int],
) -> dict[str, WeightFormat]:  # fmt: skip
    """A format for every chosen layer: that of so many bits, if any; else by damage, in a file of `target` bytes or, if
    none is given, in the bytes of `UNIFORM`."""
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
    """Most bytes of the packed ONNX file of a model with these formats (other layers int8), before it is fitted."""
    convs = unfitted(params, formats)
    return compact(export_quantized(DSModel(graph, convs, own, head, imgsz, {}), PACKED, imgsz)).ByteSize()
