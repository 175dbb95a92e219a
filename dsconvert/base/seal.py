"""A digest in a safetensors file's own JSON, of that JSON and of all its tensors: a flipped bit that leaves plausible
numbers is found when the file is read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

DIGEST = "digest"


class NotAsWritten(ValueError):
    """What was read is not what was sealed."""

    def __init__(self) -> None:
        super().__init__("its content is not what its checksum was made of")


def seal(about: Mapping[str, Any], tensors: Mapping[str, NDArray[Any]]) -> str:
    """Plain JSON values as text that ends in the digest."""
    text = json.dumps(about, separators=(",", ":"))
    return _ended(text, digest(text, tensors))


def unseal(text: str, tensors: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
    """The values that were sealed with these tensors. Raises NotAsWritten for other tensors, or any other text, and
    ValueError or KeyError for one that was never sealed."""
    about: dict[str, Any] = json.loads(text)
    given = about.pop(DIGEST)
    # the text as it is: 1e-05 is 1E-05 in JSON, and one bit away
    plain = text.removesuffix(_ended("}", str(given))) + "}"
    if len(plain) > len(text) or given != digest(plain, tensors):
        raise NotAsWritten
    return about


def digest(text: str, tensors: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of a text, and of the tensors' names, kinds, shapes and numbers."""
    found = hashlib.sha256(text.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        t = np.ascontiguousarray(tensors[name])
        found.update(f"{name} {t.dtype} {tensors[name].shape}".encode("utf-8", "surrogatepass"))
        found.update(t.data.cast("B") if t.size else b"")
    return found.hexdigest()


def _ended(text: str, given: str) -> str:
    return f'{text[:-1]},"{DIGEST}":"{given}"}}'
