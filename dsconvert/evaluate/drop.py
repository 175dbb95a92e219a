"""How much a model that is not a file yet loses against its float network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dsconvert.evaluate.accuracy import evaluate_predictors
from dsconvert.graph.integer import real_params, run_integer
from dsconvert.graph.ir import ConvParams
from dsconvert.graph.run import run_float
from dsconvert.model import DSModel
from dsconvert.yolo.decode import decode
from dsconvert.yolo.images import label_path

Array = NDArray[np.float32]


def map_drop(
    model: DSModel, params: Mapping[str, ConvParams], paths: Sequence[Path], progress: Callable[[int, int], None]
) -> float:
    """Points of mAP50-95 that a model loses against its float network `params`, both run in torch, on the readable
    images: against their labels where there are any, else against what the float network finds with confidence.

    Raises InputError when there is nothing to find in them."""
    labelled = any(label_path(p).is_file() for p in paths)
    true = {name: ConvParams(p.weight.cpu(), p.bias.cpu()) for name, p in params.items()}
    fitted = real_params(model.convs)

    def reference(batch: Array) -> Array:
        return decode(run_float(model.graph, true, torch.from_numpy(batch)), model.head).numpy()

    def converted(batch: Array) -> Array:
        x = torch.from_numpy(batch)
        if model.activations:
            raw = run_integer(model.graph, model.convs, model.activations, x)
        else:
            raw = run_float(model.graph, fitted, x)
        return decode(raw, model.head).numpy()

    before, after = evaluate_predictors([reference, converted], paths, model.imgsz, model.head.nc, labelled, progress)
    return 100 * (before.map50_95 - after.map50_95)
