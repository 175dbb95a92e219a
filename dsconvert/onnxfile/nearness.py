"""How far a converted file's outputs are from the float file's: the last look before it is written."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import torch

from dsconvert.base.errors import CheckError
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.source import Array, Source

# Of an output's variance. A file that finds the same objects is off by some hundredths; one that finds others by more
# than its variance.
FAR_OFF = 0.5


def how_far_off(source: Source, made: onnx.ModelProto, images: Sequence[Array]) -> str | None:
    """A sentence about the output that is farthest off on images as the file takes them, if it is far off; else None.

    Outputs whose shapes depend on the objects found say nothing here. Raises CheckError where the converted file gives
    no numbers though the float file does."""
    threads = torch.get_num_threads()
    before, behind = (session(m.SerializeToString(), threads) for m in (source.model, made))
    worst: tuple[float, str] = (0.0, "")
    names = [value.name for value in source.model.graph.output]
    squares = {name: np.zeros(2) for name in names}
    for image in images:
        wanted, found = (one.run(names, {source.image.name: image}) for one in (before, behind))
        for name, a, b in zip(names, wanted, found, strict=True):
            if not isinstance(a, np.ndarray) or a.shape != b.shape or a.dtype != np.float32 or not np.isfinite(a).all():
                continue
            if not np.isfinite(b).all():
                raise CheckError(f"The converted file's output {name} is no number on an image; please report it.")
            difference, spread = a.astype(np.float64) - b, a - a.mean(dtype=np.float64)
            squares[name] += np.square(difference).sum(), np.square(spread).sum()
    for name, (off, spread) in squares.items():
        worst = max(worst, (float(off / max(spread, 1e-30)), name))
    if worst[0] < FAR_OFF:
        return None
    return (
        f"On calibration images, output {worst[1]} is off by {100 * worst[0]:.0f} % of its variance. Look at the "
        "result with dsconvert compare; more photographs or 8 bits may help."
    )
