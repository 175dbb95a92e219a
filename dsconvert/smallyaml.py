"""Small YAML files from strangers: bounded before PyYAML makes anything of them."""

from __future__ import annotations

from importlib.resources.abc import Traversable
from pathlib import Path

import yaml

from dsconvert.errors import InputError

MOST_BYTES = 64 << 10


def read_small(source: Path | Traversable, name: str, what: str) -> str:
    """The text of a file that is called `name` and should be a `what`. Raises OSError when it cannot be read,
    InputError when it is too long or no text."""
    with source.open("rb") as stream:
        data = stream.read(MOST_BYTES + 1)
    if len(data) > MOST_BYTES:
        raise InputError(f"{name} is longer than {MOST_BYTES // 1024} kB, so it is no {what}.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise InputError(f"{name} is not a readable YAML file.") from None


def refuse_bombs(text: str, most_depth: int, refusal: str) -> None:
    """Raises InputError with this refusal for aliases (each stands for what was said before: a few lines of them grow
    to gigabytes) and deeper nesting (thousands of brackets take PyYAML minutes); yaml.YAMLError as PyYAML does."""
    depth = 0
    for event in yaml.parse(text, yaml.SafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or depth > most_depth:
            raise InputError(refusal)
