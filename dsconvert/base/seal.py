"""A digest inside a safetensors file's own JSON, of that JSON and all tensors.

It finds a flipped bit that leaves plausible numbers when the file is read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST = "digest"


class NotAsWritten(ValueError):
    """The content is not what was sealed."""

    def __init__(self) -> None:
        super().__init__("its content does not match its checksum")


def seal(about: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return plain JSON values as text that ends in the digest."""
    text = json.dumps(about, separators=(",", ":"))
    return _ended(text, digest(text, tensors))


def unseal(text: str, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """Return the values that were sealed with these tensors.

    Raises NotAsWritten for other tensors or changed text, and ValueError or KeyError for text that was never sealed.
    """
    about: dict[str, Any] = json.loads(text)
    given = about.pop(DIGEST)
    # compare the text itself: 1e-05 and 1E-05 are the same in JSON, but one bit apart
    plain = text.removesuffix(_ended("}", str(given))) + "}"
    if len(plain) > len(text) or given != digest(plain, tensors):
        raise NotAsWritten
    return about


def digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Return the SHA-256 of a text, and of the tensors' names, types, shapes and numbers."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        t = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {t.dtype} {tensors[name].shape}".encode("utf-8", "surrogatepass"))
        found.update(t.data.cast("B") if t.size else b"")
    return found.hexdigest()


def _ended(text: str, given: str) -> str:
    return f'{text[:-1]},"{DIGEST}":"{given}"}}'
