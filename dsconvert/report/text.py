"""Names from files (classes, layers, paths) as text that is safe to show."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

# control, format (bidirectional overrides among them), surrogate, private use, line and paragraph separators
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def plain(text: object, most: int = 80) -> str:
    """At most `most` characters, the middle cut out; everything invisible becomes U+FFFD.

    Not escaped for HTML: the template does that, and charts are XML made by a serialiser."""
    shown = "".join("\N{REPLACEMENT CHARACTER}" if _is_invisible(c) else c for c in str(text))
    if len(shown) <= most:
        return shown
    head = (most - 1) // 2
    return f"{shown[:head]}…{shown[len(shown) - (most - 1 - head) :]}"


def _is_invisible(c: str) -> bool:
    """U+FFFE and U+FFFF, and those like them in the other planes, are no characters, and XML knows them not."""
    return unicodedata.category(c) in INVISIBLE or ord(c) & 0xFFFE == 0xFFFE


def labels_of(paths: Sequence[Path]) -> list[str]:
    """A short name for every path: as many of its last parts as tell all apart."""
    depth = 1
    while depth < max((len(p.parts) for p in paths), default=0):
        if len({p.parts[-depth:] for p in paths}) == len(set(paths)):
            break
        depth += 1
    return [plain("/".join(p.parts[-depth:])) for p in paths]
