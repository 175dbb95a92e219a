"""Accuracy, size and latency of models; what is inside knows nothing of how they were made.

Called, `dsconvert.evaluate(models, data, imgsz=None, samples=None)` is `dsconvert.api.evaluate`.
"""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """This package as a function. Python binds a package's name in its parent when anything inside is imported, so
    `dsconvert.evaluate` is this module whatever else is assigned there; hence it must be the thing that is called."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        from dsconvert.api import evaluate  # not at import: api is above this package

        return evaluate(*args, **options)


sys.modules[__name__].__class__ = _Callable
