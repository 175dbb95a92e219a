"""Read options of quantize from a YAML file: a recipe that comes with dsconvert, or a file of the user's."""

from __future__ import annotations

from collections.abc import Collection
from importlib import resources
from pathlib import Path

import yaml

from dsconvert.base.errors import InputError
from dsconvert.base.smallyaml import read_small, refuse_bombs

NULL = "tag:yaml.org,2002:null"
MOST_DEPTH = 2  # levels of nesting that are read: the file, and a value that its key's error message can name
RECIPES = resources.files("dsconvert") / "recipes"  # in the repository: calib/recipes


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with dsconvert."""
    return sorted(p.name.removesuffix(".yaml") for p in RECIPES.iterdir() if p.name.endswith(".yaml"))


def read_config(given: str, allowed: Collection[str]) -> dict[str, str]:
    """Return values by option name (`block-size`), as they would stand on the command line, without empty ones.

    given: the name of a recipe, or the path of a YAML file.
    allowed: the options that may be set. `calib` is relative to the file.

    Raises InputError, naming the key that is wrong, for anything else.
    """
    if given in recipe_names():
        return _options((RECIPES / f"{given}.yaml").read_text(encoding="utf-8"), given, allowed)
    path = Path(given)
    try:
        text = read_small(path, given, "configuration file")
    except OSError:
        known = ", ".join(recipe_names())
        raise InputError(f"There is no file at {given}, nor a recipe of that name; the recipes are {known}.") from None
    options = _options(text, given, allowed)
    if "calib" in options:
        options["calib"] = str(path.parent / options["calib"])
    return options


def _options(text: str, source: str, allowed: Collection[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for key, value in _entries(text, source):
        name = key.replace("_", "-")
        if name not in allowed:
            raise InputError(f"{source} sets {key}, which is not an option; options are {', '.join(sorted(allowed))}.")
        if name in found:
            raise InputError(f"{source} sets {name} twice.")
        if not isinstance(value, yaml.ScalarNode):
            raise InputError(f"{source} sets {name} to something that is neither a number nor a word.")
        found[name] = "" if value.tag == NULL else value.value
    return {name: text for name, text in found.items() if text}


def _entries(text: str, source: str) -> list[tuple[str, yaml.Node]]:
    """Return the keys and values of the one mapping in the text, unparsed and with repeated keys."""
    try:
        refuse_bombs(text, MOST_DEPTH, f"{source} uses YAML aliases or nested lists, which no option needs.")
        root = yaml.compose(text, yaml.SafeLoader)
    except yaml.YAMLError:
        raise InputError(f"{source} is not a readable YAML file.") from None
    if root is None:
        return []
    if not isinstance(root, yaml.MappingNode) or not all(isinstance(k, yaml.ScalarNode) for k, _ in root.value):
        raise InputError(f"{source} is not a list of options such as `bits: 4`.")
    return [(key.value, value) for key, value in root.value]
