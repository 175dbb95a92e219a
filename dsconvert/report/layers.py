"""Figures of every layer (bits, error of weights and activations, share of the damage) and histograms of its values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dsconvert.base.errors import InputError
from dsconvert.convert.record import layer_table
from dsconvert.dsconv.tensor import DSTensor, expand_blocks
from dsconvert.graph.ir import ConvParams
from dsconvert.model.model import DSModel

BINS = 120
MARGIN = 0.15  # share of the grid's extent that is drawn beyond each end; values farther out count in the last bins
BASE_BITS = "4"  # damage is shown relative to this width in every layer
Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Layer:
    """One convolution.

    weight_db, activation_db: signal-to-noise ratios in dB; the latter is None where activations stay float.
    sensitivity, damage: expected damage at 4 bits and at the layer's bits, in per cent of 4 bits in every layer; None
        where widths were not allocated.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    bits: int
    block_size: int | None
    stored_bytes: int
    float32_bytes: int
    weight_db: float
    activation_db: float | None
    sensitivity: float | None
    damage: float | None


@dataclass(frozen=True)
class WeightView:
    """A layer's weights in steps of their own block, W / (CDSw m).

    low, high: the range of VQK.
    edges, counts: histogram of the float weights.
    levels, level_counts: the integers (VQK) that they became, and how many of each.
    outside: share of the float weights beyond the grid.
    """

    name: str
    bits: int
    low: int
    high: int
    edges: NDArray[np.float64]
    counts: Counts
    levels: Counts
    level_counts: Counts
    outside: float


@dataclass(frozen=True)
class ActivationView:
    """The float values that a layer passes on.

    edges, counts: their histogram.
    low, high, step: their grid of 256 levels.
    outside: share of the values beyond the grid.
    db: signal-to-quantization-noise ratio.
    """

    name: str
    edges: NDArray[np.float64]
    counts: Counts
    low: float
    high: float
    step: float
    outside: float
    db: float


def sqnr_db(signal: float, noise: float) -> float:
    """Return the signal-to-noise ratio in decibels; 200 if there is no noise or no signal."""
    if noise <= 0 or signal <= 0:
        return 200.0
    return min(200.0, 10 * math.log10(signal / noise))


def check_same_network(params: Mapping[str, ConvParams], model: DSModel, source: object) -> None:
    """Raise InputError unless the float network `params` has the converted model's convolutions."""
    shapes = {name: tuple(p.weight.shape) for name, p in params.items()}
    if shapes != {name: tuple(c.weight.vqk.shape) for name, c in model.convs.items()}:
        raise InputError.naming(
            "{} is not the network that the model was converted from; give {float} its checkpoint.", source
        )


def layer_rows(
    model: DSModel,
    params: Mapping[str, ConvParams],
    recorded_db: Mapping[str, float],
    activation_db: Mapping[str, float],
) -> list[Layer]:
    """Return one row for each convolution, in the order of the network.

    recorded_db: weight errors noted by the fit, by displayed name; missing ones are computed.
    activation_db: by convolution name.

    Raises InputError when the damage table is malformed.
    """
    table = layer_table(model)
    shares = _shares(table)
    rows = []
    for node, row in zip(model.graph.convs(), table, strict=True):
        weight, fitted = params[node.name].weight.double(), model.convs[node.name].weight.weight().double()
        measured = sqnr_db(float(weight.square().sum()), float((weight - fitted).square().sum()))
        sensitivity, damage = shares.get(row["name"], (None, None))
        rows.append(
            Layer(
                row["name"], tuple(row["shape"]), row["kind"], row["bits"], row["block_size"], row["bytes"],
                row["float32_bytes"], recorded_db.get(row["name"], measured), activation_db.get(node.name),
                sensitivity, damage,
            )
        )  # fmt: skip
    return rows


def _shares(table: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return by layer name the damage at 4 bits and at the layer's bits, in per cent of 4 bits in every layer."""
    try:
        known = {
            row["name"]: (float(row["damage"][BASE_BITS]), float(row["damage"][str(row["bits"])]))
            for row in table
            if row["damage"]
        }
    except (KeyError, TypeError, ValueError):
        raise InputError("The model file is damaged: its table of expected damage cannot be read.") from None
    total = sum(base for base, _ in known.values())
    if not known or not math.isfinite(total) or total <= 0:
        return {}
    return {name: (100 * base / total, 100 * own / total) for name, (base, own) in known.items()}


def worst_first(rows: Sequence[Layer]) -> list[Layer]:
    """Sort the layers by falling damage, or by weight noise if there are no figures of damage."""
    return sorted(rows, key=lambda r: (-(r.damage or 0.0), r.weight_db))


def weight_view(name: str, weight: torch.Tensor, fitted: DSTensor) -> WeightView:
    """Return the histogram of one layer's weights, float (cho, chi, kh, kw) and fitted.

    Channels with CDSw 0 are left out.
    """
    chi, low, high = weight.shape[1], *fitted.format.limits
    alive = fitted.cds_w != 0
    m = expand_blocks(fitted.m.double(), chi, fitted.block_size)[alive]
    steps = (weight.double()[alive] / fitted.cds_w.double()[alive, None, None, None]) / m
    levels, level_counts = np.unique(fitted.vqk[alive].numpy(), return_counts=True)
    edges = _level_edges(low, high)
    counts, _ = np.histogram(steps.flatten().numpy().clip(edges[0], edges[-1]), edges)
    outside = float(((steps < low - 0.5) | (steps > high + 0.5)).double().mean()) if steps.numel() else 0.0
    return WeightView(name, fitted.bits, low, high, edges, counts, levels.astype(np.int64), level_counts, outside)


def _level_edges(low: int, high: int) -> NDArray[np.float64]:
    """Return edges of bins around the levels low..high and a margin.

    A bin holds whole levels, or is an odd fraction of one. So each level lies in the middle of a bin, and no bin gets
    more levels than another.
    """
    share = max(1, BINS // (2 * (high - low + 1)))  # bins a level
    share += 1 - share % 2
    width = 1 / share if high - low < BINS else math.ceil((high - low + 1) / BINS)
    beyond = math.ceil(MARGIN * (high - low) / width)
    inner = math.ceil((high - low + 1) / width)
    return low - 0.5 + width * np.arange(-beyond, inner + beyond + 1, dtype=np.float64)


def histogram(values: NDArray[np.floating[Any]], low: float, high: float) -> tuple[Counts, NDArray[np.float64]]:
    """Return counts between BINS + 1 edges over a grid and its margins."""
    margin = MARGIN * (high - low)
    edges = np.linspace(low - margin, high + margin, BINS + 1)
    counts, _ = np.histogram(values.clip(edges[0], edges[-1]), edges)
    return counts, edges
