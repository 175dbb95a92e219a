"""Read small YAML files from strangers, within bounds that are checked before PyYAML builds anything."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, ClassVar

import yaml

from dsconvert.base.errors import InputError
from dsconvert.base.textfile import NotText, decoded, read_text

MOST_BYTES = 64 << 10
MOST_DEPTH, MOST_PARTS = 10, 50_000  # for `load_plain`: ten thousand classes, in nested lists
# PyYAML's C version, if it was built: ten times as fast
_FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TAG = "tag:yaml.org,2002:"
_KNOWN, _MADE = [_TAG + kind for kind in ("null", "merge")], [_TAG + kind for kind in ("null", "str", "seq", "map")]


def read_small(source: Path | Traversable, name: str, what: str) -> str:
    """Return the text of a file.

    name: of the file in messages.
    what: it should be, in messages.

    Raises OSError when it cannot be read, and InputError when it is too long or not text.
    """
    try:
        if isinstance(source, Path):
            return read_text(source, MOST_BYTES)
        return decoded(source.read_bytes())
    except NotText as error:
        raise InputError(f"{name} is not a readable YAML file: it {error}, so it is not a {what}.") from None


def refuse_bombs(text: str, most_depth: int, refusal: str) -> None:
    """Raise InputError with this refusal for aliases and deep nesting, and yaml.YAMLError as PyYAML does.

    A few lines of aliases grow to gigabytes, and thousands of brackets take PyYAML minutes.
    """
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > most_depth:
            raise InputError(refusal)


class _Plain(_FAST):
    """Loads lists, mappings, null and plain text: `no` is a class's name, and 1:30 is not a number of seconds.

    Merge keys (<<) are not resolved, and so are refused later: 30 lines of them, copied out, fill any memory.
    """

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
    """Return the YAML document as lists, mappings, None and text; numbers stay text.

    Aliases are shared, never copied.

    Raises many kinds of exceptions for invalid documents, too many parts, and deep nesting.
    """
    depth = 0
    for parts, event in enumerate(yaml.parse(text, _FAST)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH or parts > MOST_PARTS:
            raise ValueError("too much")
    return yaml.load(text, Loader=_Plain)
