"""Height and width as one value."""

from __future__ import annotations

import re

import pytest

from dsconvert.base.errors import InputError
from dsconvert.base.size import Size


def test_a_number_is_a_square_and_a_pair_is_height_and_width():
    assert Size.of(640) == Size.of((640, 640)) == Size.of([640, 640]) == Size(640, 640)
    assert Size.of((384, 640)) == Size(height=384, width=640)
    assert Size.of(Size(3, 4)) == Size(3, 4)
    assert Size.perhaps(None) is None


@pytest.mark.parametrize("given", [True, 1.5, "640", (640,), (1, 2, 3), (1, "2"), (True, 2), 0, (64, 0), -64, None, {}])
def test_anything_else_is_refused(given):
    with pytest.raises(InputError, match="nor a height and width"):
        Size.of(given)


@pytest.mark.parametrize("text", ["384x640", "384X640", "384,640", " 384, 640 ", "384 640"])
def test_texts_are_read(text):
    assert Size.read(text) == Size(384, 640)
    assert Size.read("640") == Size(640, 640)


@pytest.mark.parametrize("text", ["", "x", "-64", "64.5", "64x", "64px", "1x2x3", "1 2 3", "9" * 10])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        Size.read(text)


def test_it_is_shown_and_written_as_one_number_where_it_is_a_square():
    assert (str(Size(640, 640)), str(Size(384, 640))) == ("640", "384x640")
    assert (Size(640, 640).json, Size(384, 640).json) == (640, [384, 640])


def test_it_fits_a_stride_where_both_sides_do():
    assert Size(384, 640).fits(32)
    assert not Size(384, 640).fits(128 + 64)
    assert not Size(384, 650).fits(32)
    assert not Size(0, 640).fits(32)
    assert not Size(384, 640).fits(32, most=639)
    assert Size(384, 640).over(32) == Size(12, 20)
    assert Size(384, 640).within(320) == Size(320, 320)
    assert Size(192, 640).within(320) == Size(192, 320)
