"""What a quantize that was stopped leaves behind: the layers it had fitted, and what they were fitted for.

The key stands for everything that decides the layers' bytes but their widths. A run goes on from the file only when its
own key is the same, and takes layers from it only up to the first of another width: so it ends in the same bytes as a
run that was never stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from dsconvert.base.files import write_atomic
from dsconvert.base.sealed import resumed, sealed
from dsconvert.dsconv.codes import format_of
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.graph.integer import QConv

NAME = "unfinished.safetensors"
META = "dsconvert.convert.resume"


def write_unfinished(path: Path, key: str, convs: Mapping[str, QConv]) -> None:
    """Keep what is fitted so far, replacing what was kept before."""
    tensors: dict[str, Tensor] = {}
    for name, conv in convs.items():
        w = conv.weight
        tensors |= {f"{name}.stored": w.stored, f"{name}.m": w.m, f"{name}.cdsw": w.cds_w, f"{name}.cdsb": conv.bias}
    formats = {name: c.weight.format.spelled() for name, c in convs.items()}
    write_atomic(path, sealed(tensors, META, {"key": key, "layers": formats}), force=True)


def read_unfinished(path: Path, key: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, QConv]:
    """The layers kept, by convolution name; `shapes` are those of the network's weights. Raises InputError when there
    are none, or of another run than `key`, or they cannot be this network's."""
    deciding = "options, images, checkpoint, threads or version"
    with resumed(path, META, key, deciding) as (about, tensors):
        layers = {
            name: QConv(
                DSTensor(
                    tensors[f"{name}.stored"], tensors[f"{name}.m"], tensors[f"{name}.cdsw"],
                    format_of(int(bits), int(block), code),
                ),
                tensors[f"{name}.cdsb"],
            )
            for name, (bits, block, code) in about["layers"].items()
        }  # fmt: skip
        for name, conv in layers.items():
            _check(conv, shapes[name])
    return layers


def _check(conv: QConv, shape: Sequence[int]) -> None:
    """Raises ValueError for numbers of another kind, or of no use, or of another shape."""
    w = conv.weight
    reals = [w.cds_w, conv.bias, *([w.m] if w.format.code.real else [])]
    if tuple(w.vqk.shape) != tuple(shape) or tuple(conv.bias.shape) != (shape[0],):
        raise ValueError("shape")
    integers = w.m.dtype == torch.int8 or w.format.code.real
    if w.vqk.dtype != torch.int8 or not integers or any(r.dtype != torch.float32 for r in reals):
        raise ValueError("kinds of numbers")
    if not all(bool(torch.isfinite(r).all()) for r in reals):
        raise ValueError("numbers")


def usable(kept: Mapping[str, QConv], wanted: Sequence[tuple[str, WeightFormat]]) -> dict[str, QConv]:
    """Of the layers kept, those before the first that is missing or has another format than wanted: each layer is
    fitted on what the ones before it do."""
    taken: dict[str, QConv] = {}
    for name, format in wanted:
        conv = kept.get(name)
        if conv is None or conv.weight.format != format:
            break
        taken[name] = conv
    return taken
