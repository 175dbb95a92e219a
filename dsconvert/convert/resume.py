"""Keep the layers that a quantize has fitted, so that a stopped run can go on.

A key stands for all that decides the layers' bytes, except their widths. A run uses the file only if it has the same
key, and takes layers only up to the first with another width. So it ends in the same bytes as a run that was never
stopped.
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
    """Write the layers fitted so far, replacing earlier ones."""
    tensors: dict[str, Tensor] = {}
    for name, conv in convs.items():
        w = conv.weight
        tensors |= {f"{name}.stored": w.stored, f"{name}.m": w.m, f"{name}.cdsw": w.cds_w, f"{name}.cdsb": conv.bias}
    formats = {name: c.weight.format.spelled() for name, c in convs.items()}
    write_atomic(path, sealed(tensors, META, {"key": key, "layers": formats}), force=True)


def read_unfinished(path: Path, key: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, QConv]:
    """Return the kept layers by convolution name.

    key: of the present run.
    shapes: convolution name -> shape of its weight.

    Raises InputError when there are no layers, or they belong to another run or cannot be this network's.
    """
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
    """Raise ValueError for a layer of another shape or type, or with numbers that are not finite."""
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
    """Return the kept layers before the first that is missing or has another format than wanted.

    Later ones are useless, as each layer is fitted on the outputs of the layers before it.
    """
    taken: dict[str, QConv] = {}
    for name, format in wanted:
        conv = kept.get(name)
        if conv is None or conv.weight.format != format:
            break
        taken[name] = conv
    return taken
