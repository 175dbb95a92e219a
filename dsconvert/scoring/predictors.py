"""Networks in torch as predictors: from a batch of images to decoded boxes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.graph.integer import real_params, run_integer
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.model.model import DSModel
from dsconvert.onnxfile.bounds import Bounds
from dsconvert.photos.form import PLAIN, InputForm
from dsconvert.scoring.accuracy import Predictor
from dsconvert.scoring.masks import MaskPredictor
from dsconvert.yolo.decode import decode
from dsconvert.yolo.network import Head


@dataclass(frozen=True)
class BoundedPredictor:
    """A predictor from a stranger's file."""

    run: Predictor
    bounds: Bounds  # of the file
    form: InputForm = PLAIN  # of the images that it takes

    def __call__(self, batch: NDArray[np.float32]) -> NDArray[np.float32]:
        return self.run(batch)


def float_predictor(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, device: str = "cpu", bounds: Bounds | None = None
) -> Predictor:
    """Return the network in float as a predictor.

    params: weights, on the device.
    bounds: of the file that the network comes from, if any.
    """
    return _predictor(lambda x: run_float(graph, params, x), head, device, bounds)


def model_predictor(model: DSModel, device: str = "cpu", bounds: Bounds | None = None) -> Predictor:
    """Return a converted model as a predictor, in its own arithmetic: integers, or float if its activations are
    float.
    """
    if model.activations:
        run = partial(run_integer, model.graph, model.convs, model.activations)
        return _predictor(run, model.head, device, bounds)
    params = {n: ConvParams(p.weight.to(device), p.bias.to(device)) for n, p in real_params(model.convs).items()}
    return float_predictor(model.graph, params, model.head, device, bounds)


def _predictor(raw: Callable[[Tensor], list[Tensor]], head: Head, device: str, bounds: Bounds | None) -> Predictor:
    def within(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        maps = [t.cpu() for t in raw(torch.from_numpy(batch).to(device))]
        return decode(maps, head).numpy(), maps[-1].numpy()

    def run(batch: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return bounds.later(lambda: within(batch), batch.nbytes) if bounds else within(batch)

    return MaskPredictor(run, head.nc) if head.nm else lambda batch: run(batch)[0]
