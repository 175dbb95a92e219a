"""Choose layers by a YOLOv5 model yaml: its DSConv2D_C3 rows say which C3 blocks become DSConv."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from dsconvert.base.errors import InputError, printable
from dsconvert.base.smallyaml import read_small, refuse_bombs
from dsconvert.yolo.network import MAX_LAYERS, VARIANTS

OURS = resources.files("dsconvert") / "yolo" / "cfg"
MOST_DEPTH = 6  # levels of nesting: file, backbone, row, args, and a list in them


def cfg_names() -> list[str]:
    """Return the names of the model yamls that come with dsconvert."""
    return sorted(p.name for p in OURS.iterdir() if p.name.endswith(".yaml"))


def read_rows(path: Path) -> list[str]:
    """Return the module names of a model yaml's rows, backbone first.

    A name that comes with dsconvert stands for its file, unless the working folder has one of that name. Raises
    InputError for anything that is not a model yaml.
    """
    source: Any = OURS / path.name if not path.exists() and str(path) in cfg_names() else path
    try:
        text = read_small(source, str(path), "model yaml")
    except OSError:
        known = ", ".join(cfg_names())
        raise InputError(f"There is no readable model yaml at {path}; dsconvert brings {known}.") from None
    try:
        refuse_bombs(text, MOST_DEPTH, f"{path} uses YAML aliases or deeply nested lists, which no model yaml needs.")
        content = yaml.safe_load(text)
    except InputError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, RecursionError):
        raise InputError(f"{path} is not a readable YAML file.") from None
    parts: list[Any] = [content.get(key) for key in ("backbone", "head")] if isinstance(content, dict) else []
    if not parts or not all(isinstance(part, list) and part for part in parts):
        raise InputError(f"{path} is not a model yaml: it needs a backbone and a head, each a list of rows.")
    rows = [row for part in parts for row in part]
    if len(rows) > MAX_LAYERS:
        raise InputError(f"{path} has more than {MAX_LAYERS} layers.")
    for index, row in enumerate(rows):
        if not isinstance(row, list) or len(row) != 4 or not isinstance(row[2], str):
            raise InputError(f"Layer {index} of {path} is not [from, number, module, args].")
    return [row[2] for row in rows]


def chosen_blocks(path: Path, kinds: list[str]) -> str:
    """Return the DSConv2D_C3 layers of a model yaml, in the form of `blocks`, for a checkpoint with layers of `kinds`.

    Raises InputError when the two are not the same network, or no row is a DSConv2D_C3.
    """
    rows = read_rows(path)
    if len(rows) != len(kinds):
        raise InputError(f"{path} has {len(rows)} layers, the checkpoint {len(kinds)}: it is not of this model.")
    for index, (row, kind) in enumerate(zip(rows, kinds, strict=True)):
        if VARIANTS.get(row, row).rsplit(".", 1)[-1] != kind:
            raise InputError(f"Layer {index} is {printable(row, 40)} in {path}, but {kind} in the checkpoint.")
        if row in VARIANTS and row != "DSConv2D_C3":
            raise InputError(f"Layer {index} of {path} is {row}; dsconvert converts the blocks named DSConv2D_C3.")
    found = [str(index) for index, row in enumerate(rows) if row == "DSConv2D_C3"]
    if not found:
        raise InputError(f"{path} names no DSConv2D_C3 layer, so there is nothing to convert.")
    return ",".join(found)
