"""Presets of families of networks by name: their input, and how their outputs become boxes."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

from dsconvert.base.errors import InputError, shown
from dsconvert.base.smallyaml import load_plain, read_small
from dsconvert.onnxfile.rules import RULES
from dsconvert.photos.form import PLAIN, InputForm

FILE = "inputs.yaml"
WHAT = "file of inputs"
INPUT_KEY = "dsconvert.input"  # key in an ONNX file's metadata
MOST_TEXT = 1000  # characters of its value
CHANNELS = ("rgb", "bgr")


@dataclass(frozen=True)
class Preset:
    """What the networks of a family have in common."""

    form: InputForm = PLAIN  # form of the input
    decode: str | None = None  # name in RULES of the rule that turns outputs into boxes; None: by the outputs' shapes

    def __post_init__(self) -> None:
        if self.decode is not None and self.decode not in RULES:
            raise InputError(f"decode is one of {', '.join(RULES)}, not {shown(self.decode)}.")


@cache
def presets() -> Mapping[str, Preset]:
    """Return the presets that come with dsconvert, by name."""
    text = read_small(resources.files("dsconvert.onnxfile") / FILE, FILE, WHAT)
    return {name: _preset(entry, f"{FILE}, {name}") for name, entry in _entries(text, FILE).items()}


def named_preset(given: str) -> Preset:
    """Return the preset of a name, or of a user's YAML file in the form of `inputs.yaml`.

    given: a name, `FILE:NAME`, or a file with a single entry.

    Raises InputError where there is none, or where the entry is not valid.
    """
    if given in presets():
        return presets()[given]
    path, name = _file_and_name(given)
    if path is None:
        raise InputError.naming(
            "{input} {!r} is neither one of {} nor a YAML file such as my.yaml:name.", given[:80], ", ".join(presets())
        )
    try:
        entries = _entries(read_small(path, str(path), WHAT), str(path))
    except OSError:
        raise InputError.naming("There is no file at {}, which {input} names.", path) from None
    names = [str(key)[:40] for key in entries]
    if name is None and len(names) != 1:
        raise InputError.naming("{} has {} entries; give {input} {}:NAME.", path, len(names), path)
    if name is not None and name not in names:
        raise InputError.naming("{} has no entry {!r}; it has {}.", path, name[:40], ", ".join(names[:10]) or "none")
    chosen = name or names[0]
    return _preset(entries[chosen], f"{path}, {chosen}")


def perhaps_named(given: str | None) -> Preset | None:
    """Return the preset as `named_preset` does, or None if none is given."""
    return None if given is None else named_preset(given)


def as_text(preset: Preset) -> str:
    """Return a preset as text for an ONNX file's metadata; `of_text` reads it."""
    form = preset.form
    said = {"channels": CHANNELS[form.bgr], "scale": form.scale, "mean": list(form.mean), "std": list(form.std),
            "fit": form.fit, "pad": form.pad, "decode": preset.decode}  # fmt: skip
    return json.dumps(said)


def of_text(text: str, path: Path) -> Preset:
    """Return the preset in an ONNX file's metadata. Raises InputError for any other text."""
    try:
        if len(text) > MOST_TEXT:
            raise ValueError
        return _preset(load_plain(text), str(path))
    except Exception:  # PyYAML raises many kinds
        raise InputError.naming(
            "The metadata of {} does not describe its input readably; give {input}.", path
        ) from None


def _file_and_name(given: str) -> tuple[Path | None, str | None]:
    """Split a text into a YAML file and the entry in it, if one is named; return None for text that names no YAML
    file.
    """
    before, colon, after = given.rpartition(":")
    if colon and _is_yaml(before):
        return Path(before), after
    return (Path(given), None) if _is_yaml(given) else (None, None)


def _is_yaml(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml"))


def _entries(text: str, source: str) -> dict[str, Any]:
    try:
        found = load_plain(text)
    except Exception:  # PyYAML raises many kinds
        raise InputError(f"{source} is not a readable YAML file.") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise InputError(f"{source} is not a list of inputs such as `mine: {{channels: bgr, scale: 1}}`.")
    return found


def _preset(entry: Any, where: str) -> Preset:
    """Return the preset that an entry of a file describes. `where` it stands is for messages."""
    if entry is not None and not isinstance(entry, dict):
        raise InputError(f"{where} is not a list of keys such as `channels: bgr`.")
    said: dict[str, Any] = {}
    for key, value in (entry or {}).items():
        reader = _READERS.get(key) if isinstance(key, str) else None
        if reader is None:
            raise InputError(f"{where} sets {shown(key)}, which is none of {', '.join(_READERS)}.")
        try:
            said |= reader(value)
        except (ValueError, TypeError, OverflowError):
            raise InputError(f"{where} sets {key} to {shown(value)}, which is not valid for it.") from None
    try:
        return Preset(decode=said.pop("decode", None), form=InputForm(**said))
    except InputError as error:
        raise InputError(f"{where}: {error.message}") from None


def _numbers(value: Any) -> tuple[float, ...]:
    return tuple(float(part) for part in (value if isinstance(value, list) else [value]))


def _is_bgr(value: Any) -> bool:
    if value not in CHANNELS:
        raise ValueError
    return bool(value == "bgr")


def _word(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError
    return value


# key -> how its value is read; `load_plain` leaves numbers as text
_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "channels": lambda value: {"bgr": _is_bgr(value)},
    "scale": lambda value: {"scale": int(value)},
    "mean": lambda value: {"mean": _numbers(value)},
    "std": lambda value: {"std": _numbers(value)},
    "fit": lambda value: {"fit": _word(value)},
    "pad": lambda value: {"pad": int(value)},
    "decode": lambda value: {"decode": None if value is None else _word(value)},
}
