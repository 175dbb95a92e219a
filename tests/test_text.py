"""Hostile names on their way to a terminal."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsconvert.text import printable


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
