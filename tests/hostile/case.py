"""What every corpus is made of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """One file's bytes, and a regular expression for its refusal (None: it loads, and does no harm)."""

    name: str
    data: bytes
    words: str | None


REFUSED = "does not allow, so nothing was loaded"
PROTOCOL = "protocol"
DAMAGED = "damaged"
STRANGE = "not a PyTorch checkpoint"
EVIL_NAMES = ("\x1b[31mred\x1b]0;owned\x07", "<script>alert(1)</script>\r\n\u202egnp.exe")
