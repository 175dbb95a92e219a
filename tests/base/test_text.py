"""Hostile names on their way to a terminal, and parameters in the words of each face."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path
from string import Formatter

import pytest
from hypothesis import given
from hypothesis import strategies as st

import dsconvert
from dsconvert.base.errors import InputError
from dsconvert.base.text import Sentence, in_words, printable
from dsconvert.commands.cli import cli
from dsconvert.commands.shared import option


def named_in(path: Path) -> set[str]:
    """The parameters in the sentences of a file."""
    calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call) and n.args]
    made = [c.args[0] for c in calls if getattr(c.func, "attr", getattr(c.func, "id", "")) in ("naming", "Sentence")]
    texts = [n.value for words in made for n in ast.walk(words) if isinstance(n, ast.Constant)]
    return {name for text in texts for _, name, _, _ in Formatter().parse(str(text)) if name}


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("person", "person"),
        ("Hélène 猫", "Hélène 猫"),
        ("\x1b[31mred\x1b[0m", r"\x1b[31mred\x1b[0m"),
        ("two\nlines\r\t", r"two\x0alines\x0d\x09"),
        ("\x9b2J", r"\x9b2J"),  # the one-byte form of ESC [
        ("\u202egnp.exe", r"\u202egnp.exe"),  # turns the writing direction
        ("\udc80", r"\udc80"),  # a file name that is not UTF-8
        ("\U000e0041", r"\U000e0041"),  # an invisible tag
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text, shown):
    assert printable(text) == shown


def test_ascii_only_escapes_the_rest_too():
    assert printable("Hélène", ascii_only=True) == r"H\xe9l\xe8ne"


@given(st.text(), st.integers(0, 20), st.booleans())
def test_always_one_printable_line_of_bounded_length(text, most, ascii_only):
    shown = printable(text, most, ascii_only)
    assert shown.isprintable()
    assert len(shown) <= most
    assert shown.isascii() or not ascii_only
    whole = printable(text, ascii_only=ascii_only)
    assert shown == whole or shown.endswith("..."[:most])


def test_a_text_that_fits_is_left_whole_and_a_longer_one_ends_in_dots():
    assert printable("abcdef", 6) == "abcdef"
    assert printable("abcdefg", 6) == "abc..."


def test_a_sentence_names_parameters_in_the_words_of_who_says_it():
    inner = Sentence("leave out {bits} {}", 3)
    sentence = Sentence("{} is not {:.1f}; {}, or {imgsz}.", "{imgsz} of {}", 2, inner)
    assert sentence == "{imgsz} of {} is not 2.0; leave out bits 3, or imgsz."
    said = "{imgsz} of {} is not 2.0; leave out <bits> 3, or <imgsz>."
    assert in_words(sentence, "<{}>".format) == said
    error = pickle.loads(pickle.dumps(InputError(sentence)))  # as between processes
    assert (str(error), error.said("<{}>".format)) == (sentence, said)
    assert in_words("any {text}", "<{}>".format) == "any {text}"
    assert InputError.naming("{}\x1b {imgsz}", "a").said(str) == r"a\x1b imgsz"


def test_every_parameter_that_a_sentence_names_is_an_option():
    options = {o for c in cli.commands.values() for p in c.params for o in p.opts}
    named = {name for path in Path(dsconvert.__file__).parent.rglob("*.py") for name in named_in(path)}
    assert {"imgsz", "images", "force=True", "target_map_drop"} <= named
    assert {option(name) for name in named} <= options
