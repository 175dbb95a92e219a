"""Make names from files (classes, layers, paths) safe to show on the page."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from pathlib import Path

# control, format (bidirectional overrides among them), surrogate, private use, line and paragraph separators
INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Co", "Zl", "Zp"})


def plain(text: object, most: int = 80) -> str:
    """Return at most `most` characters, cut in the middle if needed, with every invisible character as U+FFFD.

    HTML is not escaped here: the template escapes text, and charts are XML from a serialiser.
    """
    shown = "".join("\N{REPLACEMENT CHARACTER}" if _is_invisible(c) else c for c in str(text))
    if len(shown) <= most:
        return shown
    head = (most - 1) // 2
    return f"{shown[:head]}…{shown[len(shown) - (most - 1 - head) :]}"


def _is_invisible(c: str) -> bool:
    """Return whether a character is invisible, or one such as U+FFFE and U+FFFF that XML does not allow."""
    return unicodedata.category(c) in INVISIBLE or ord(c) & 0xFFFE == 0xFFFE


def labels_of(paths: Sequence[Path]) -> list[str]:
    """Return a short name for every path: as many of its last parts as are needed to tell all paths apart."""
    depth = 1
    while depth < max((len(p.parts) for p in paths), default=0):
        if len({p.parts[-depth:] for p in paths}) == len(set(paths)):
            break
        depth += 1
    return [plain("/".join(p.parts[-depth:])) for p in paths]
