"""Safetensors files of our own that are read back later, and refused where they are not as they were written."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.base.filekinds import check_ordinary
from dsconvert.base.seal import seal, unseal
from dsconvert.base.version import VERSION

# what reading a safetensors file, and making something of it, may raise when it is damaged
DAMAGE = (
    SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


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


def run_key(*parts: Any) -> str:
    """A key from plain JSON values and uint8 image batches."""
    digest = hashlib.sha256()
    for part in parts:
        is_images = isinstance(part, Tensor)
        digest.update(part.numpy().tobytes() if is_images else json.dumps(part, sort_keys=True, default=str).encode())
    # sums run in another order on another number of threads
    digest.update(f"{torch.get_num_threads()} {VERSION}".encode())
    return digest.hexdigest()
