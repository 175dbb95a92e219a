"""Small YAML files from strangers: bounded before PyYAML makes anything of them."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dsconvert.base.errors import InputError
from dsconvert.base.textfile import NotText, decoded, read_text

MOST_BYTES = 64 << 10
MOST_DEPTH, MOST_PARTS = 10, 50_000  # of `load_plain`: ten thousand classes, in lists within lists
# in C where PyYAML was built with it: ten times as fast
_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_KNOWN, _MADE = [_TAG + kind for kind in ("null", "merge")], [_TAG + kind for kind in ("null", "str", "seq", "map")]


def read_small(source: Path | Traversable, name: str, what: str) -> str:
    """The text of a file that is called `name` and should be a `what`. Raises OSError when it cannot be read,
    InputError when it is too long or no text."""
    try:
        if isinstance(source, Path):
            return read_text(source, MOST_BYTES)
        return decoded(source.read_bytes())
    except NotText as error:
        raise InputError(f"{name} is not a readable YAML file: it {error}, so it is no {what}.") from None


def refuse_bombs(text: str, most_depth: int, refusal: str) -> None:
    """Raises InputError with this refusal for aliases (each stands for what was said before: a few lines of them grow
    to gigabytes) and deeper nesting (thousands of brackets take PyYAML minutes); yaml.YAMLError as PyYAML does."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > most_depth:
            raise InputError(refusal)


class _Plain(_FAST):
    """Lists, mappings, nothing (null) and text, as it is written: `no` is a class's name, and 1:30 no number of
    seconds. Merge keys (<<) are left where they are and so refused: 30 lines of them, copied out, fill any memory."""

    yaml_implicit_resolvers: ClassVar = {
        first: [(tag, form) for tag, form in resolvers if tag in _KNOWN]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    yaml_constructors: ClassVar = {
        tag: make for tag, make in yaml.SafeLoader.yaml_constructors.items() if tag is None or tag in _MADE
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Copy nothing."""


def load_plain(text: str) -> Any:
    """The YAML document: lists, mappings, None, and text even where YAML knows numbers. Aliases are shared, never
    copied. Raises many kinds of exceptions for what is no such document, has too many parts, or is nested too deep."""
    depth = 0
    for parts, event in enumerate(yaml.parse(text, _FAST)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH or parts > MOST_PARTS:
            raise ValueError("too much")
    return yaml.load(text, Loader=_Plain)
