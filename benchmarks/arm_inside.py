"""What `arm.py` runs on the emulated processor: every file of a folder once, its outputs beside it.

python arm_inside.py FOLDER [LIBRARY]     the operator library for this processor, where there is one
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort


def main() -> None:
    folder, library = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ""
    for file in sorted(folder.glob("*.onnx")):
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        if library:
            options.register_custom_ops_library(library)
        running = ort.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in running.get_outputs()]
        made = running.run(names, {"images": np.load(folder / f"{file.stem}.in.npy")})
        np.savez(folder / f"{file.stem}.arm.npz", **dict(zip(names, made, strict=True)))


if __name__ == "__main__":
    main()
