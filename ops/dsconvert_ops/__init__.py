"""The library with the operator that files of layout fast need:

options.register_custom_ops_library(dsconvert_ops.library())
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["library"]


def library() -> str:
    """The path of the shared library, as `onnxruntime.SessionOptions.register_custom_ops_library` takes it."""
    return str(next(Path(__file__).parent.glob("libdsconvert_ops.*")))
