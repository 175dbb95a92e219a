"""The option --imgsz: one number for a square, else height and width, separated by an x, a comma or a space."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import click

from dsconvert.base.size import Size

LEAST = 32  # least pixels of a width that is a word of its own; a webcam's number is smaller


class ImageSize(click.ParamType):
    """A `Size`: 640, 384x640 or 384,640."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Size:
        try:
            found = value if isinstance(value, Size) else Size.read(str(value))
        except ValueError:
            found = Size(0, 0)
        if min(found.pair) < 1:
            self.fail(f"{value!r} is not a size such as 640, or 384x640 (height and width).", param, ctx)
        return found


def imgsz(what: str, *more: str, **settings: Any) -> Callable[[Any], Any]:
    """Return an option --imgsz, with `more` names. `what` says which images, and the default."""
    return click.option("--imgsz", *more, "imgsz", type=ImageSize(), metavar="PIXELS", help=f"{what}.", **settings)


class Sized(click.Command):
    """A command whose --imgsz may take two words, as in YOLOv5's commands: `--imgsz 384 640`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, after `joined`."""
        return super().parse_args(ctx, self.joined(args))

    def joined(self, args: Sequence[str]) -> list[str]:
        """Return the words with each size as one word."""
        named = {n for p in self.params if p.name == "imgsz" for n in p.opts}
        return join_sizes(args, named, self.with_value())

    def with_value(self) -> set[str]:
        """Return all options that take a value."""
        return {
            name
            for p in self.params
            if isinstance(p, click.Option) and not p.is_flag
            for name in (*p.opts, *p.secondary_opts)
        }


def join_sizes(args: Sequence[str], named: Collection[str], with_value: Collection[str]) -> list[str]:
    """Rewrite `--imgsz 384 640` as `--imgsz 384x640`, for all names of that option.

    A second number is taken if it can be a width: it is at least LEAST, and no file has that name. So a webcam or a
    file is never taken for a width.
    """
    found: list[str] = []
    rest = list(args)
    while rest:
        word = rest.pop(0)
        found.append(word)
        if word == "--":
            return found + rest
        if word not in with_value or not rest:
            continue
        found.append(rest.pop(0))
        if word in named and rest and found[-1].isdecimal() and _is_width(rest[0]):
            found[-1] += f"x{rest.pop(0)}"
    return found


def _is_width(word: str) -> bool:
    return word.isdecimal() and int(word) >= LEAST and not os.path.lexists(word)
