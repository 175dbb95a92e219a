"""The charts: each function turns figures into inline SVG. Text from files passes through `text.plain`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter
from numpy.typing import NDArray

from dsconvert.report.layers import ActivationView, Layer, WeightView
from dsconvert.report.svg import ALARM, CONVERTED, FLOAT, LINE, MUTED, PEERS, new_figure, styled, to_svg
from dsconvert.report.text import plain
from dsconvert.scoring.curves import RECALLS, ClassCurve

ROW = 38  # pixels of one labelled bar
COLUMN, LEAST_WIDTH = 16, 640  # pixels of one layer, and the least width of the chart of layers
SMALL = (320, 210)  # pixels of a histogram
DASHES: dict[str, Any] = {CONVERTED: "-", FLOAT: (0, (5, 2))}  # line styles; other models get dashes
FEW_LEVELS = 33  # up to so many levels, each level of a grid is drawn


def colour_of(role: str, index: int) -> str:
    """Return the colour of a model: float, converted, or the peer of this index."""
    return {"float": FLOAT, "converted": CONVERTED}.get(role) or PEERS[index % len(PEERS)]


def bars(labels: Sequence[str], values: Sequence[float], colours: Sequence[str], shown: Sequence[str], name: str,
         alt: str) -> str:  # fmt: skip
    """Draw one labelled bar for each model; `shown` are the values as text."""
    with styled():
        figure = new_figure(320, ROW * len(labels) + 8)
        ax = figure.subplots()
        at = np.arange(len(labels))
        ax.barh(at, values, height=0.34, color=list(colours))
        top = max([v for v in values if math.isfinite(v)], default=0.0) or 1.0
        for y, label, text in zip(at, labels, shown, strict=True):
            ax.text(0, y - 0.26, plain(label, 34), ha="left", va="bottom", fontsize=11)
            ax.text(top, y - 0.26, text, ha="right", va="bottom", fontsize=12, fontweight="bold")
        ax.set(xlim=(0, top), ylim=(len(labels) - 0.7, -0.95))
        ax.axis("off")
        return to_svg(figure, name, alt)


def layer_chart(layers: Sequence[Layer], name: str, alt: str) -> str:
    """Draw bits, errors and damage of every layer, in the order of the network."""
    harmful = any(r.damage is not None for r in layers)
    with styled():
        width = max(LEAST_WIDTH, 72 + COLUMN * len(layers))
        figure = new_figure(width, 470 if harmful else 350)
        axes = figure.subplots(3 if harmful else 2, 1, sharex=True)
        at = np.arange(len(layers))
        axes[0].bar(at, [r.bits for r in layers], width=0.72, color=CONVERTED)
        axes[0].set(ylabel="bits", yticks=[0, 2, 4, 6, 8], ylim=(0, 8.4))
        axes[1].plot(at, [r.weight_db for r in layers], color=CONVERTED, marker="o", markersize=4, linewidth=1.2)
        noted = [(x, r.activation_db) for x, r in zip(at, layers, strict=True) if r.activation_db is not None]
        if noted:
            axes[1].plot(*zip(*noted, strict=True), color=PEERS[0], marker="s", markersize=3.5, linewidth=1.2)
        axes[1].set(ylabel="SQNR, dB")
        if harmful:
            _harm_bars(axes[2], layers)
        for ax in axes:
            ax.grid(axis="y")
            ax.tick_params(length=0)
            ax.margins(x=0.6 / len(layers))
            ax.yaxis.set_label_coords(-46 / width, 0.5)
        axes[-1].set_xticks(at, [plain(r.name.removeprefix("model."), 16) for r in layers], rotation=90, fontsize=9.5)
        return to_svg(figure, name, alt)


def _harm_bars(ax: Axes, layers: Sequence[Layer]) -> None:
    """Draw damage on a logarithmic scale: a mark for 4 bits, a bar for the bits that the layer has."""
    least = 1e-2
    for x, r in enumerate(layers):
        if r.damage is None or r.sensitivity is None:
            continue
        ax.bar(x, max(r.damage, least) - least, width=0.72, color=CONVERTED, bottom=least)
        ax.hlines(max(r.sensitivity, least), x - 0.42, x + 0.42, color=ALARM, linewidth=2)
    ax.set(ylabel="damage, %", yscale="log", ylim=(least, None))
    ax.yaxis.set_major_formatter(FuncFormatter(_short))
    ax.minorticks_off()


def weight_chart(view: WeightView, name: str, alt: str) -> str:
    """Draw float weights as a filled histogram, the grid as lines, and the integers they became as stems."""
    with styled():
        figure = new_figure(*SMALL)
        ax = figure.subplots()
        low, high = view.low, view.high
        few = high - low < FEW_LEVELS
        _grid_lines(ax, np.arange(low, high + 1) if few else np.array([low, high]))
        ax.stairs(_density(view.counts, view.edges), view.edges, fill=True, color=FLOAT, alpha=0.55)
        if few:
            ax.vlines(
                view.levels, 0, view.level_counts / max(1, view.level_counts.sum()), color=CONVERTED, linewidth=2.4
            )
        else:
            fitted, _ = np.histogram(view.levels, view.edges, weights=view.level_counts)
            ax.stairs(_density(fitted, view.edges), view.edges, color=CONVERTED, linewidth=1.4)
        ax.set(xlabel="weight / (CDSw m)", xlim=(view.edges[0], view.edges[-1]), ylim=(0, None), yticks=[])
        ax.spines["left"].set_visible(False)
        ax.set_xticks([low, 0, high])
        return to_svg(figure, name, alt)


def _density(counts: NDArray[Any], edges: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the share of counts per unit of width."""
    return np.asarray(counts / max(1, counts.sum()) / (edges[1] - edges[0]))


def activation_chart(view: ActivationView, name: str, alt: str) -> str:
    """Draw float values with logarithmic counts, the grid's ends, and a mark at every sixteenth level."""
    with styled():
        figure = new_figure(*SMALL)
        ax = figure.subplots()
        _grid_lines(ax, np.array([view.low, view.high]))
        counts = view.counts.astype(float)
        ax.stairs(np.where(counts > 0, counts, 0.5), view.edges, baseline=0.5, fill=True, color=FLOAT, alpha=0.55)
        for start, stop in ((view.edges[0], view.low), (view.high, view.edges[-1])):
            ax.axvspan(start, stop, color=ALARM, alpha=0.14)
        ticks = view.low + view.step * np.arange(0, 256, 16)
        ax.plot(ticks, np.full(len(ticks), 0.03), transform=ax.get_xaxis_transform(), linestyle="none", marker="|",
                markersize=7, markeredgewidth=1.4, color=CONVERTED)  # fmt: skip
        ax.set(xlabel="value", yscale="log", xlim=(view.edges[0], view.edges[-1]), ylim=(0.5, None))
        ax.yaxis.set_major_formatter(FuncFormatter(_short))
        ax.minorticks_off()
        return to_svg(figure, name, alt)


def _grid_lines(ax: Axes, at: NDArray[Any]) -> None:
    for x in at:
        ax.axvline(x, color=LINE, linewidth=1, zorder=0)


def pr_chart(curves: Sequence[tuple[str, ClassCurve | None]], name: str, alt: str) -> str:
    """Draw precision against recall at IoU 0.50, one line for each (colour, curve)."""
    with styled():
        figure = new_figure(180, 175)
        ax = figure.subplots()
        recall = np.linspace(0, 1, RECALLS)
        for colour, curve in reversed(curves):  # the models that matter most are drawn last, on top
            if curve is not None:
                style = DASHES.get(colour, "--")
                ax.plot(recall, curve.precision, color=colour, linewidth=1.8, linestyle=style)
        ax.set(xlim=(0, 1.01), ylim=(0, 1.03), xlabel="recall", ylabel="precision")
        ax.set_xticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        ax.grid()
        ax.tick_params(length=0)
        return to_svg(figure, name, alt)


def finetune_chart(looks: Sequence[tuple[float, float]], name: str, alt: str) -> str:
    """Draw the error of the held-back images over the steps of the brief fine-tune."""
    with styled():
        figure = new_figure(360, 220)
        ax = figure.subplots()
        ax.plot(*zip(*looks, strict=True), color=CONVERTED, linewidth=1.6, marker="o" if len(looks) < 30 else None)
        ax.set(xlabel="step", ylabel="error", ylim=(0, None))
        ax.grid(axis="y", color=LINE)
        ax.tick_params(length=0, colors=MUTED)
        return to_svg(figure, name, alt)


def _short(value: float, _: object = None) -> str:
    """Return a number for a logarithmic axis: 0.01, 1, 100, 10k."""
    return f"{value / 1000:g}k" if value >= 10000 else f"{value:g}"
