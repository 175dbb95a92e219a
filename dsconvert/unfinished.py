"""What a quantize that was stopped leaves behind: the layers it had fitted, and what they were fitted for.

The key stands for everything that decides the layers' bytes but their widths. A run goes on from the file only when its
own key is the same, and takes layers from it only up to the first of another width: so it ends in the same bytes as a
run that was never stopped.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import dsconvert
from dsconvert.dsconv.tensor import DSTensor, Width
from dsconvert.errors import InputError
from dsconvert.filekinds import check_ordinary
from dsconvert.files import write_atomic
from dsconvert.graph.integer import QConv
from dsconvert.seal import seal, unseal

NAME = "unfinished.safetensors"
META = "dsconvert.unfinished"
# what reading a safetensors file, and making something of it, may raise when it is damaged
DAMAGE = (
    SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def write_unfinished(path: Path, key: str, convs: Mapping[str, QConv]) -> None:
    """Keep what is fitted so far, replacing what was kept before."""
    tensors: dict[str, Tensor] = {}
    for name, conv in convs.items():
        w = conv.weight
        tensors |= {f"{name}.vqk": w.vqk, f"{name}.m": w.m, f"{name}.cdsw": w.cds_w, f"{name}.cdsb": conv.bias}
        for part, tensor in (("alpha", w.alpha), ("code", w.code)):
            if tensor is not None:
                tensors[f"{name}.{part}"] = tensor
    widths = {name: c.weight.width for name, c in convs.items()}
    write_atomic(path, sealed(tensors, META, {"key": key, "layers": widths}), force=True)


def sealed(tensors: Mapping[str, Tensor], meta: str, about: Mapping[str, Any]) -> bytes:
    """A safetensors file with JSON under `meta` that ends in a digest of everything (see `seal`)."""
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(kept, {meta: seal(about, {name: t.numpy() for name, t in kept.items()})})


def unsealed(stored: Any, meta: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The JSON and the tensors of an open file made of `sealed`. Raises ValueError or KeyError where they are not those
    that were written."""
    text = (stored.metadata() or {})[meta]
    tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    return unseal(text, {name: t.numpy() for name, t in tensors.items()}), tensors


@contextmanager
def resumed(path: Path, meta: str, key: str, deciding: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """What a stopped run left in a file made of `sealed`, while it is read: the JSON under `meta`, and the tensors.

    Raises InputError when there is no file, when its key is another, `deciding` being what the key stands for, and in
    place of whatever damage makes of the reading."""
    check_ordinary(path)
    try:
        with safe_open(path, framework="pt") as stored:
            about, tensors = unsealed(stored, meta)
        if about["key"] != key:
            raise InputError(f"{path} was left by a run with other {deciding}; it cannot be resumed with these.")
        yield about, tensors
    except FileNotFoundError:
        raise InputError(f"There is nothing to resume: {path} does not exist.") from None
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError.naming("{} is damaged; start again without {resume}.", path) from None


def read_unfinished(path: Path, key: str, shapes: Mapping[str, Sequence[int]]) -> dict[str, QConv]:
    """The layers kept, by convolution name; `shapes` are those of the network's weights. Raises InputError when there
    are none, or of another run than `key`, or they cannot be this network's."""
    deciding = "options, images, checkpoint, threads or version"
    with resumed(path, META, key, deciding) as (about, tensors):
        layers = {
            name: QConv(
                DSTensor(
                    tensors[f"{name}.vqk"], tensors[f"{name}.m"], tensors[f"{name}.cdsw"], int(bits), int(block),
                    tensors.get(f"{name}.alpha"), tensors[f"{name}.code"] if coded else None,
                ),
                tensors[f"{name}.cdsb"],
            )
            for name, (bits, block, coded) in about["layers"].items()
        }  # fmt: skip
        for name, conv in layers.items():
            _check(conv, shapes[name])
    return layers


def _check(conv: QConv, shape: Sequence[int]) -> None:
    """Raises ValueError for numbers of another kind, or of no use, or of another shape."""
    w = conv.weight
    reals = [w.cds_w, conv.bias, *([] if w.alpha is None else [w.alpha])]
    if tuple(w.vqk.shape) != tuple(shape) or tuple(conv.bias.shape) != (shape[0],):
        raise ValueError("shape")
    if w.vqk.dtype != torch.int8 or w.m.dtype != torch.int8 or any(r.dtype != torch.float32 for r in reals):
        raise ValueError("kinds of numbers")
    if not all(bool(torch.isfinite(r).all()) for r in reals):
        raise ValueError("numbers")


def run_key(*parts: Any) -> str:
    """A key from plain JSON values and uint8 image batches."""
    digest = hashlib.sha256()
    for part in parts:
        is_images = isinstance(part, Tensor)
        digest.update(part.numpy().tobytes() if is_images else json.dumps(part, sort_keys=True, default=str).encode())
    # sums run in another order on another number of threads
    digest.update(f"{torch.get_num_threads()} {dsconvert.__version__}".encode())
    return digest.hexdigest()


def usable(kept: Mapping[str, QConv], wanted: Sequence[tuple[str, Width]]) -> dict[str, QConv]:
    """Of the layers kept, those before the first that is missing or has another width than wanted: each layer is
    fitted on what the ones before it do."""
    taken: dict[str, QConv] = {}
    for name, width in wanted:
        conv = kept.get(name)
        if conv is None or conv.weight.width != width:
            break
        taken[name] = conv
    return taken
