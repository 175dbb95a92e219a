"""--imgsz: one number for a square, else height and width, with an x, a comma or a space between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Sequence
from typing import Any

import click

from dsconvert.base.size import Size

LEAST = 32  # pixels of a width that stands as a word of its own: the number of a webcam is smaller


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
    """An option --imgsz, under `more` names too. `what` says of which images, and what is usual."""
    return click.option("--imgsz", *more, "imgsz", type=ImageSize(), metavar="PIXELS", help=f"{what}.", **settings)


class Sized(click.Command):
    """A command whose --imgsz may take two words, as YOLOv5's commands do: `--imgsz 384 640`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """As click does, after `joined`."""
        return super().parse_args(ctx, self.joined(args))

    def joined(self, args: Sequence[str]) -> list[str]:
        """The words with each size as one."""
        named = {n for p in self.params if p.name == "imgsz" for n in p.opts}
        return join_sizes(args, named, self.with_value())

    def with_value(self) -> set[str]:
        """All options that a value follows."""
        return {
            name
            for p in self.params
            if isinstance(p, click.Option) and not p.is_flag
            for name in (*p.opts, *p.secondary_opts)
        }


def join_sizes(args: Sequence[str], named: Collection[str], with_value: Collection[str]) -> list[str]:
    """`--imgsz 384 640` as `--imgsz 384x640`, where `named` are the names of that option.

    A second number belongs to it when it can be a width: at least LEAST, and no file of that name is there. So neither
    a webcam nor a file is taken for one."""
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
