"""Text of unknown origin made safe to show: names in a checkpoint and files in a folder may hold anything."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter


class Sentence(str):
    """Words that name parameters: in `Sentence("{imgsz} {} is too large.", 9000)`, {imgsz} is one and {} a value.

    As a text it has the names that they have in Python; `in_words` puts another face's words in their place."""

    template: str
    values: tuple[object, ...]

    def __new__(cls, template: str, *values: object) -> Sentence:
        made = super().__new__(cls, _filled(template, values, str))
        made.template, made.values = template, values
        return made

    def __reduce__(self) -> tuple[type[Sentence], tuple[object, ...]]:
        return Sentence, (self.template, *self.values)


def in_words(text: str, words: Callable[[str], str]) -> str:
    """The text; of a Sentence with the words that are given for the names of its parameters."""
    return _filled(text.template, text.values, words) if isinstance(text, Sentence) else text


def _filled(template: str, values: tuple[object, ...], words: Callable[[str], str]) -> str:
    names = {name: words(name) for _, name, _, _ in Formatter().parse(template) if name}
    return template.format(*(in_words(v, words) if isinstance(v, str) else v for v in values), **names)


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
