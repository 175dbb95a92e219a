"""How much a model that is not a file yet loses against its float network."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dsconvert.evaluate.accuracy import evaluate_predictors
from dsconvert.evaluate.predictors import float_predictor, model_predictor
from dsconvert.graph.ir import ConvParams
from dsconvert.model import DSModel
from dsconvert.yolo.images import label_path


def map_drop(
    model: DSModel, params: Mapping[str, ConvParams], paths: Sequence[Path], progress: Callable[[int, int], None]
) -> float:
    """Points of mAP50-95 that a model loses against its float network `params`, both run in torch, on the readable
    images: against their labels where there are any, else against what the float network finds with confidence.

    Raises InputError when there is nothing to find in them."""
    labelled = any(label_path(p).is_file() for p in paths)
    true = {name: ConvParams(p.weight.cpu(), p.bias.cpu()) for name, p in params.items()}
    both = [float_predictor(model.graph, true, model.head), model_predictor(model)]
    before, after = evaluate_predictors(both, paths, model.imgsz, model.head.nc, labelled, progress)
    return 100 * (before.map50_95 - after.map50_95)
