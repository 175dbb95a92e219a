"""Fits of a layer by name: the product's, those it is compared with, and those of `fits/NAME.py`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.layer import GPTQ, Batches, Maker, fit_cds
from dsconvert.fit.moments import Moments
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

PRODUCT = "product"
HOME = Path("fits")  # where a fit of one's own is, in the current folder


class Nearest:
    """Least squares on the weight alone, with the shifts of `fit_cds`."""

    def layer(self, node: Node, weight: Tensor, format: WeightFormat, batches: Batches) -> QConv:
        return fit_cds(node, DSTensor.nearest(weight, format), batches())


class Symmetric(GPTQ):
    """GPTQ towards the float weight on the quantized network's inputs."""

    def moments(self, node: Node, weight: Tensor, images: Iterable[Seen]) -> Moments:
        found = super().moments(node, weight, images)
        return replace(found, cross=weight.cpu().double().flatten(1) @ found.hessian)


class Unweighted(GPTQ):
    """Asymmetric GPTQ, every position counting the same."""

    def moments(self, node: Node, weight: Tensor, images: Iterable[Seen]) -> Moments:
        even = (replace(seen, weights=torch.ones_like(seen.weights)) for seen in images)
        return super().moments(node, weight, even)


# all but the product's fit every output channel on its own
FITS: Mapping[str, Maker] = {
    PRODUCT: GPTQ,
    "least-squares": lambda channels, photographs: Nearest(),
    "symmetric": lambda channels, photographs: Symmetric({}, photographs),
    "unweighted": lambda channels, photographs: Unweighted({}, photographs),
    "alone": lambda channels, photographs: GPTQ({}, photographs),
}


def named(name: str) -> Maker:
    """A fit of FITS, or the class `Fit` in `fits/NAME.py`. Raises InputError where there is neither."""
    path = HOME / f"{name}.py"
    if name in FITS:
        return FITS[name]
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"There is no fit {name}: neither a file {path}, nor one of {', '.join(FITS)}.")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    found: Any = getattr(made, "Fit", None)
    if not callable(found):
        raise InputError(f"{path} has no class Fit.")
    made_by: Maker = found
    return made_by
