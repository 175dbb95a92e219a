"""What is written by hand on a page that a script writes: between two marks, and kept when it is written again."""

from __future__ import annotations

from pathlib import Path

MARK = "<!-- notes -->"


def kept(page: Path) -> list[str]:
    """The page's notes with their marks, as lines; none where the page has no two marks."""
    parts = page.read_text().split(MARK) if page.exists() else []
    return [f"{MARK}{parts[1]}{MARK}", ""] if len(parts) >= 3 else []
