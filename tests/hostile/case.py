"""What every corpus is made of."""

from __future__ import annotations

from dataclasses import dataclass

import pytest


@dataclass(frozen=True)
class Case:
    """One file's bytes, and a regular expression for its refusal (None: it loads, and does no harm)."""

    name: str
    data: bytes
    words: str | None


REFUSED = "does not allow, so nothing was loaded"
PROTOCOL = "not pickled like a PyTorch checkpoint"
DAMAGED = "damaged"
STRANGE = "not a PyTorch checkpoint"
EVIL_NAMES = ("\x1b[31mred\x1b]0;owned\x07", "<script>alert(1)</script>\r\n\u202egnp.exe")


# Every sixth file is read by `make test`, all of them by `make test-all`.
SHARES = [pytest.param(6, id="every sixth"), pytest.param(1, id="all", marks=pytest.mark.long)]
