"""Read what an ONNX file says about itself in text: its class names and its non-maximum suppression.

Both are in Python's notation. A stranger's text could keep Python's parser busy for ever, so it is read item by item,
each a name or a number.
"""

from __future__ import annotations

import ast
import re
from pathlib import Path

from dsconvert.base.errors import InputError, printable
from dsconvert.export.ends.nms import Nms

NMS_KEY = "dsconvert.nms"
MAX_NAMES = 1 << 20  # characters; enough for ten thousand class names
MAX_CLASSES, MAX_NMS = 10000, 200
_TEXT = r"[uU]?(?:'(?:[^'\\\n]|\\.)*'|\"(?:[^\"\\\n]|\\.)*\")"
_VALUE = rf"(?P<value>{_TEXT}|-?[0-9][0-9_.eE+-]{{0,30}}|None|True|False)"
_ITEM = re.compile(rf"\s*(?:(?P<key>-?[0-9]{{1,15}})\s*:\s*)?{_VALUE}\s*(?P<more>,|\Z)")
_ENDS = {"{": "}", "[": "]", "(": ")"}


def class_names(text: str, path: Path) -> tuple[str, ...]:
    """Return the names in YOLOv5's metadata, a dictionary or a list; empty if there are none or the text is something
    else.
    """
    refused = InputError(f"The metadata of {path} names no readable classes.")
    if len(text) > MAX_NAMES:
        raise refused
    text = text.strip()
    if not text or re.fullmatch(_VALUE, text):
        return ()
    if _ENDS.get(text[0]) != text[-1] or len(text) < 2:
        raise refused
    inner, at = text[1:-1].strip(), 0
    found: dict[int, str] = {}
    while at < len(inner):
        item = _ITEM.match(inner, at)
        if item is None or (item["key"] is None) == (text[0] == "{") or len(found) == MAX_CLASSES:
            raise refused
        try:
            value = ast.literal_eval(item["value"].lstrip("uU"))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise refused from None
        found[int(item["key"]) if item["key"] else len(found)] = printable(str(value), 200)
        at = item.end()
    numbers = range(len(found))
    return tuple(found[i] for i in numbers) if found.keys() == {*numbers} else tuple(found.values())


def suppression(text: str, path: Path) -> Nms | None:
    """Return the limits of a file that ends with non-maximum suppression, from its metadata; None for other files."""
    try:
        if len(text) > MAX_NMS:
            raise ValueError
        limits = Nms(**ast.literal_eval(text)) if text else None
        if limits and not isinstance(limits.most, int):
            raise ValueError
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise InputError(f"The metadata of {path} does not describe its non-maximum suppression readably.") from None
    return limits
