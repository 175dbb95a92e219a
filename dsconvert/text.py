"""Text of unknown origin made safe to show: names in a checkpoint and files in a folder may hold anything."""

from __future__ import annotations


def printable(text: object, most: int | None = None, ascii_only: bool = False) -> str:
    r"""The text on one line, with no character that commands a terminal.

    What Unicode calls unprintable (escapes, line breaks, marks that turn the writing direction), and with
    `ascii_only` all that is not ASCII, appears as a backslash escape, \x1b for one. Longer texts than `most`
    characters end in three dots."""
    parts: list[str] = []
    room = most
    for character in str(text):
        shown = character if character.isprintable() and (character.isascii() or not ascii_only) else _escape(character)
        if room is not None:
            room -= len(shown)
            if room < 0:
                return _cut("".join(parts), most or 0)
        parts.append(shown)
    return "".join(parts)


def _escape(character: str) -> str:
    return (
        character.encode("ascii", "backslashreplace").decode() if ord(character) > 127 else f"\\x{ord(character):02x}"
    )


def _cut(text: str, most: int) -> str:
    return text[: max(0, most - 3)] + "..."[:most]
