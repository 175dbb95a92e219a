"""Make text of unknown origin safe to show: names in checkpoints and folders may hold anything."""

from __future__ import annotations

from collections.abc import Callable
from string import Formatter


class Sentence(str):
    """A sentence that names parameters: in `Sentence("{imgsz} {} is too large.", 9000)`, {imgsz} is one and {} a value.

    As text it has the parameters' names in Python. `in_words` replaces them by other words, such as options.
    """

    template: str
    values: tuple[object, ...]

    def __new__(cls, template: str, *values: object) -> Sentence:
        made = super().__new__(cls, _filled(template, values, str))
        made.template, made.values = template, values
        return made

    def __reduce__(self) -> tuple[type[Sentence], tuple[object, ...]]:
        return Sentence, (self.template, *self.values)


def in_words(text: str, words: Callable[[str], str]) -> str:
    """Return the text, with `words(name)` for each parameter that a Sentence names."""
    return _filled(text.template, text.values, words) if isinstance(text, Sentence) else text


def _filled(template: str, values: tuple[object, ...], words: Callable[[str], str]) -> str:
    names = {name: words(name) for _, name, _, _ in Formatter().parse(template) if name}
    return template.format(*(in_words(v, words) if isinstance(v, str) else v for v in values), **names)


def printable(text: object, most: int | None = None, ascii_only: bool = False) -> str:
    r"""Return the text on one line, without characters that control a terminal.

    Characters that Unicode calls unprintable (escapes, line breaks, marks of writing direction), and with `ascii_only`
    all that are not ASCII, become backslash escapes such as \x1b. Text longer than `most` characters ends in three
    dots.
    """
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
