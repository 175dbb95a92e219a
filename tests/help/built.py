"""The optional operator library, as tests see it: they skip, saying so, where it is not built."""

from __future__ import annotations

import pytest

from dsconvert.export.weights.layouts import LAYOUTS
from dsconvert.onnxfile.operators import library

needs_ops = pytest.mark.skipif(library() is None, reason="dsconvert-ops is not installed: make ops")
HERE = [name for name, layout in LAYOUTS.items() if library() or not layout.tables]  # layouts that can be had here
