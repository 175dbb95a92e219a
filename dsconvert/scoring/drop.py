"""Measure what a converted model loses against its float network before it is written, and how its scores shift."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.base.threads import in_order
from dsconvert.graph.ir import ConvParams
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import is_data_yaml, read_data_yaml
from dsconvert.photos.images import spread
from dsconvert.photos.labels import Labelled, LabelRules, label_files, read_labelled
from dsconvert.scoring.accuracy import OVERLAP, evaluate_predictors
from dsconvert.scoring.compare import ScoreShift, score_shift
from dsconvert.scoring.detect import Found
from dsconvert.scoring.predictors import float_predictor, model_predictor
from dsconvert.yolo.boxes import non_max_suppression
from dsconvert.yolo.classes import label_rules

SCORED = 8  # calibration images on which scores are compared
UNSURE = 0.05  # lower scores are ignored


def map_drop(
    model: DSModel, params: Mapping[str, ConvParams], paths: Sequence[Path], progress: Callable[[int, int], None],
    labels: Labelled | None = None,
) -> float:  # fmt: skip
    """Return the points of mAP50-95 that a model loses against its float network `params`, both run in torch.

    labels: the truth; None: what the float network finds with confidence.

    Raises InputError when there is nothing to find in the images.
    """
    true = {name: ConvParams(p.weight.cpu(), p.bias.cpu()) for name, p in params.items()}
    both = [float_predictor(model.graph, true, model.head), model_predictor(model)]
    before, after = evaluate_predictors(both, paths, model.imgsz, model.head.nc, labels or False, progress)
    return 100 * (before.map50_95 - after.map50_95)


def scores_on(
    model: DSModel, params: Mapping[str, ConvParams], image: Callable[[int], Tensor], count: int
) -> ScoreShift:  # fmt: skip
    """Compare the scores of a model and its float network `params` on SCORED of `count` images, evenly spread.

    image: returns an image (1, 3, h, w), 0..1, by its index.
    """
    true = {name: ConvParams(p.weight.cpu(), p.bias.cpu()) for name, p in params.items()}
    both = float_predictor(model.graph, true, model.head), model_predictor(model)

    def found(index: int) -> list[Found]:
        x = image(index).cpu().numpy()
        return [non_max_suppression(predict(x)[0], UNSURE, OVERLAP) for predict in both]

    looked = list(in_order(found, spread(range(count), SCORED)))
    return score_shift([a for a, _ in looked], [b for _, b in looked])


def labels_of(source: Path, paths: Sequence[Path], names: Sequence[str], strict: bool) -> Labelled | None:
    """Return the labels of images, or None if no image has any.

    source: where the images come from: a folder, a list or a data.yaml.
    names: the network's classes.

    Raises InputError for a data.yaml with another number of classes.
    """
    if not any(label_files(paths)):
        return None
    rules = LabelRules(len(names), strict=strict)
    if is_data_yaml(source):
        data = read_data_yaml(source)
        if len(data.names) != len(names):
            raise InputError(f"{source} has {len(data.names)} classes, the checkpoint has {len(names)}.")
        rules = label_rules(data, names, "the checkpoint", strict)
    return read_labelled(paths, rules)
