"""Stand-ins for a training tree's modules, importable for a while."""

from __future__ import annotations

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def importable(common: str, yolo: str) -> Iterator[tuple[types.ModuleType, types.ModuleType]]:
    """The modules `models.common` and `models.yolo` made of these sources, importable meanwhile; yields both."""
    names = ("models", "models.common", "models.yolo")
    before = {name: sys.modules.get(name) for name in names}
    made = {name: types.ModuleType(name) for name in names}
    sys.modules.update(made)
    made["models"].common, made["models"].yolo = made["models.common"], made["models.yolo"]
    try:
        exec(common, made["models.common"].__dict__)
        exec(yolo, made["models.yolo"].__dict__)
        yield made["models.common"], made["models.yolo"]
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module
