"""Write safetensors files that are read back later, and refuse changed ones."""

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

# what reading a damaged safetensors file, and using its content, may raise
DAMAGE = (
    SafetensorError, OSError, KeyError, TypeError, ValueError, AttributeError, ArithmeticError, RecursionError,
)  # fmt: skip


def sealed(tensors: Mapping[str, Tensor], meta: str, about: Mapping[str, Any]) -> bytes:
    """Return a safetensors file with JSON under `meta` that ends in a digest of everything (see `seal`)."""
    kept = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    return save(kept, {meta: seal(about, {name: t.numpy() for name, t in kept.items()})})


def unsealed(stored: Any, meta: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the JSON and the tensors of an open file from `sealed`.

    Raises ValueError or KeyError if they were changed.
    """
    text = (stored.metadata() or {})[meta]
    tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 (no mapping)
    return unseal(text, {name: t.numpy() for name, t in tensors.items()}), tensors


@contextmanager
def resumed(path: Path, meta: str, key: str, deciding: str) -> Iterator[tuple[dict[str, Any], dict[str, Tensor]]]:
    """Yield the JSON under `meta` and the tensors that a stopped run left in a file from `sealed`.

    key: of the present run.
    deciding: what the key stands for, in messages.

    Raises InputError when there is no file, when its key differs, and for any error that damage causes in the block.
    """
    check_ordinary(path)
    try:
        with safe_open(path, framework="pt") as stored:
            about, tensors = unsealed(stored, meta)
        if about["key"] != key:
            raise InputError(f"{path} was left by a run with other {deciding}; start again without resuming.")
        yield about, tensors
    except FileNotFoundError:
        raise InputError(f"There is nothing to resume: {path} does not exist.") from None
    except DAMAGE as error:
        if isinstance(error, InputError):
            raise
        raise InputError.naming("{} is damaged; start again without {resume}.", path) from None


def run_key(*parts: Any) -> str:
    """Return a key from plain JSON values and uint8 image batches."""
    digest = hashlib.sha256()
    for part in parts:
        is_images = isinstance(part, Tensor)
        digest.update(part.numpy().tobytes() if is_images else json.dumps(part, sort_keys=True, default=str).encode())
    # with another number of threads, sums are added in another order
    digest.update(f"{torch.get_num_threads()} {VERSION}".encode())
    return digest.hexdigest()
