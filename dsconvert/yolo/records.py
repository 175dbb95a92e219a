"""Find the network in an opened checkpoint: its place among the file's other content, its modules and its tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dsconvert.base.errors import InputError, printable, shown
from dsconvert.yolo.archive import PARAMETER, TENSOR, WRAPPERS, Record
from dsconvert.yolo.families import WAY, refuse_state_dict

MAX_MODULES, MAX_DEPTH = 10000, 12  # a yolov5x6 has about 1200 modules, nested 6 deep
MAX_NAME = 200
TAKE = "take the best.pt or last.pt that YOLOv5's train.py wrote"
_DETECTS = ("models.yolo.Detect", "models.yolo.IDetect", "models.yolo.Segment")


def model_record(content: Any, path: Path) -> Record:
    """Return the pickled model, without DataParallel around it: `ema`, or else `model`, or the file's only content.

    Raises InputError that says what the file holds instead.
    """
    if not isinstance(content, Mapping):
        record = _unwrapped(content)
        if record is not None and record.kind.startswith("models.yolo."):
            return record
        what, do = _described(content), f"{TAKE}, or {WAY}" if hasattr(record or content, "_modules") else TAKE
        raise InputError(f"{path} holds {what}, not a YOLOv5 checkpoint dictionary with a network in it; {do}.")
    for key in ("ema", "model"):
        record = _unwrapped(content.get(key))
        if record is not None and record.kind.startswith("models.yolo."):
            return record
    weights = [value for value in (content, *content.values()) if _is_state_dict(value)]
    if weights:
        refuse_state_dict([name for value in weights for name in value if isinstance(name, str)], path)
        raise InputError(
            f"{path} holds a plain state dict: weights, without the network that they belong to; {TAKE}, or load them "
            "into their network and save torch.save({'model': model}, 'best.pt')."
        )
    others = [record for key in ("ema", "model") if isinstance(record := content.get(key), Record)]
    if others and _children(others[0]):
        kind = printable(others[0].kind.rpartition(".")[2], 80)
        raise InputError(f"{path} holds a {kind} instead of a YOLOv5 or YOLOv7 model; {WAY}.")
    optimizer = " but an optimizer's state" if content.get("optimizer") else ""
    keys = [printable(key, 40) for key in list(content)[:5] if isinstance(key, str)]
    listed = f" (it holds {', '.join(keys)})" if keys and not optimizer else ""
    raise InputError(f"{path} holds no model{optimizer}{listed}, so it is not a YOLOv5 checkpoint; {TAKE}.")


def _described(value: Any) -> str:
    """Describe the content of a file that holds no dictionary."""
    if is_tensor(value):
        return "a tensor"
    if isinstance(value, Record):
        record = _unwrapped(value) or value
        kind = printable(record.kind.rpartition(".")[2], 80)
        return (
            f"a whole network saved by torch.save ({kind})" if hasattr(record, "_modules") else f"one object ({kind})"
        )
    known = {list: "a list", tuple: "a tuple", str: "text", int: "a number", float: "a number", type(None): "nothing"}
    return known.get(type(value), "something else")


def _unwrapped(value: Any) -> Record | None:
    """Return a network without DataParallel around it."""
    for _ in range(MAX_DEPTH):
        if not isinstance(value, Record) or value.kind not in WRAPPERS:
            break
        value = _children(value).get("module")
    return value if isinstance(value, Record) and not is_tensor(value) else None


def is_tensor(value: Any) -> bool:
    return isinstance(value, Record) and value.kind in (TENSOR, PARAMETER)


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is tensors by name; if names have dots, a few other values may be among them."""
    if not isinstance(value, Mapping) or not value:
        return False
    named = sum(is_tensor(v) and isinstance(k, str) and "." in k for k, v in value.items())
    return all(map(is_tensor, value.values())) or 2 * named >= len(value)


def check_numbers(detect: Record, nc: int, path: Path) -> None:
    """Raise InputError if Detect gives more numbers for a box than YOLOv5's does; forks keep YOLOv5's class names."""
    given = getattr(detect, "no", None)
    if detect.kind == "models.yolo.Segment" or type(given) is not int or given <= nc + 5:
        return
    more = given - nc - 5
    what = {10: "five key points, as yolov5-face", 180: "an angle, as YOLOv5 for oriented boxes (OBB)",
            15: "five key points", 34: "key points, as YOLOv5 pose", 51: "key points, as YOLOv5 pose"}  # fmt: skip
    said = f" ({what[more]})" if more in what else ""
    raise InputError(
        f"{path} is a fork of YOLOv5 whose Detect layer gives {shown(given)} numbers a box where {nc} classes need "
        f"{nc + 5}{said}; {WAY}."
    )


def _children(record: Any) -> dict[str, Any]:
    children = getattr(record, "_modules", {}) if isinstance(record, Record) else {}
    return children if isinstance(children, dict) else {}


def walk(record: Record) -> Iterator[tuple[str, Record]]:
    """Yield the modules by dotted prefix, parents first.

    Raises InputError if a file nests them without end: a few bytes can make a module its own child.
    """
    waiting, count = [("", record, 0)], 0
    while waiting:
        prefix, module, depth = waiting.pop()
        count += 1
        if depth > MAX_DEPTH or count > MAX_MODULES:
            raise InputError("The checkpoint nests its modules deeper than any YOLOv5 network.")
        yield prefix, module
        children = [(n, c) for n, c in _children(module).items() if isinstance(c, Record) and isinstance(n, str)]
        if len(children) + count > MAX_MODULES:
            raise InputError("The checkpoint has more modules than any YOLOv5 network.")
        waiting.extend((f"{prefix}{n[:MAX_NAME]}.", c, depth + 1) for n, c in reversed(children))


def stored(modules: Mapping[str, Record]) -> Iterator[tuple[str, Any]]:
    """Yield stored parameters and buffers by dotted name, as a state dict would have them."""
    for prefix, module in modules.items():
        for store in ("_parameters", "_buffers"):
            held = getattr(module, store, {})
            for name, value in held.items() if isinstance(held, dict) else ():
                if is_tensor(value):
                    yield f"{prefix}{str(name)[:MAX_NAME]}" if isinstance(name, str) else prefix, value


def last_layer(record: Record) -> Record:
    layers = _children(record).get("model")
    last = list(_children(layers).values())[-1:] if isinstance(layers, Record) else []
    if not last or not isinstance(last[0], Record) or last[0].kind not in _DETECTS:
        raise InputError(f"The checkpoint's last layer is not Detect, so this is not a detection model; {WAY}.")
    return last[0]
