"""Fits of a layer by name: the product's, those it is compared with, and those of `fits/NAME.py`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch
from torch import Tensor

from dsconvert import pipeline
from dsconvert.dsconv.tensor import DSTensor, Width
from dsconvert.errors import InputError
from dsconvert.fit.gptq import fit_layer, fit_weight_gptq, measure_moments
from dsconvert.fit.least_squares import fit_weight
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

# as `fit.gptq.fit_layer`, but never asked for grouped convolutions
Fit = Callable[[Node, Tensor, Width, Iterable[Seen], Tensor | None, int | None], DSTensor | QConv]

PRODUCT = "product"
HOME = Path("fits")  # where a fit of one's own is, in the current folder


def _plain(node: Node, weight: Tensor, width: Width, *rest: object) -> DSTensor:
    """Least squares on the weights alone."""
    return fit_weight(weight, *width)


def _symmetric(
    node: Node, weight: Tensor, width: Width, images: Iterable[Seen], channels: Tensor | None, photographs: int | None
) -> DSTensor:
    """GPTQ towards the float weight on the quantized network's inputs."""
    moments = measure_moments(node, weight.shape, images, photographs)
    moments = replace(moments, cross=weight.cpu().double().flatten(1) @ moments.hessian)
    return fit_weight_gptq(weight, moments, *width[:2], None, width.trellis)


def _unweighted(
    node: Node, weight: Tensor, width: Width, images: Iterable[Seen], channels: Tensor | None, photographs: int | None
) -> DSTensor:
    """Asymmetric GPTQ, every position counting the same."""
    even = (replace(seen, weights=torch.ones_like(seen.weights)) for seen in images)
    return fit_weight_gptq(
        weight, measure_moments(node, weight.shape, even, photographs), *width[:2], None, width.trellis
    )


def _alone(
    node: Node, weight: Tensor, width: Width, images: Iterable[Seen], channels: Tensor | None, photographs: int | None
) -> DSTensor | QConv:
    """The product's fit, every output channel on its own."""
    return fit_layer(node, weight, width, images, None, photographs)


FITS: Mapping[str, Fit] = {
    PRODUCT: fit_layer,
    "least-squares": _plain,
    "symmetric": _symmetric,
    "unweighted": _unweighted,
    "alone": _alone,
}


def named(name: str) -> Fit:
    """A fit of FITS, or the function `fit` in `fits/NAME.py`. Raises InputError where there is neither."""
    path = HOME / f"{name}.py"
    if name in FITS:
        return FITS[name]
    spec = spec_from_file_location(name, path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise InputError(f"There is no fit {name}: neither a file {path}, nor one of {', '.join(FITS)}.")
    made = module_from_spec(spec)
    spec.loader.exec_module(made)
    if not callable(getattr(made, "fit", None)):
        raise InputError(f"{path} has no function fit.")
    return made.fit


@contextmanager
def used(fit: Fit) -> Iterator[None]:
    """Let `quantize` fit layers by `fit` meanwhile; grouped convolutions as ever.

    The one place that changes the pipeline's namespace: to go once the pipeline takes a fit as an argument."""

    def one(
        node: Node, weight: Tensor, width: Width, images: Iterable[Seen], channels: Tensor | None, count: int | None
    ) -> DSTensor | QConv:
        chosen = fit_layer if node.attrs["groups"] > 1 else fit
        return chosen(node, weight, width, images, channels, count)

    original = pipeline.fit_layer
    pipeline.fit_layer = one  # type: ignore[assignment]
    try:
        yield
    finally:
        pipeline.fit_layer = original
