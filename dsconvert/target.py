"""From a tolerable loss to widths: the smallest file whose measured loss is at most that.

Every try fits a model and measures it, which takes a minute or two, so each try is placed by what the one before
showed: over the useful range the loss grows in proportion to the expected damage (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsconvert.budget import Damage, Widths, choices, widths_like_uniform
from dsconvert.errors import InputError
from dsconvert.fit.allocate import allocate
from dsconvert.graph.ir import ConvParams

TRIES = 4
CAUTION = 0.9  # of the damage that proportion allows
STRIDE = 4.0  # most that one try's damage differs from the last one's
Model = TypeVar("Model")


@dataclass(frozen=True)
class Tried(Generic[Model]):
    """One fitted model: its widths, their expected damage, the loss measured (points of mAP50-95)."""

    widths: Widths
    damage: float
    loss: float
    model: Model


def expected(damage: Damage, widths: Widths) -> float:
    """Damage of these widths together."""
    return sum(damage[name][width] for name, width in widths.items())


def widths_for_damage(params: Mapping[str, ConvParams], damage: Damage, most: float) -> Widths:
    """The smallest widths whose expected damage is at most `most`; the least damage there is, if that is more."""
    options = choices(params, damage)
    low = sum(min(c.size for c in by_width) for by_width in options.values())
    high = sum(max(c.size for c in by_width) for by_width in options.values())
    best = {name: min(by_width, key=lambda c: c.damage).width for name, by_width in options.items()}
    step = max((high - low) // 256, 1)
    while high - low > step:
        middle = (low + high) // 2
        widths = {name: c.width for name, c in allocate(options, middle).items()}
        if expected(damage, widths) <= most:
            best, high = widths, middle
        else:
            low = middle
    return best


def smallest_within(
    params: Mapping[str, ConvParams],
    damage: Damage,
    most: float,
    attempt: Callable[[Widths], tuple[Model, float]],
) -> Tried[Model]:
    """The model of least size among the tried ones that lose at most `most` points. `attempt` fits widths and gives
    the model and its loss. Raises InputError when the finest widths lose more."""
    good: list[Tried[Model]] = []
    bad: list[Tried[Model]] = []
    widths: Widths = widths_like_uniform(params, damage)
    for _ in range(TRIES):
        model, loss = attempt(widths)
        tried = Tried(widths, expected(damage, widths), loss, model)
        (good if loss <= most else bad).append(tried)
        widths = widths_for_damage(params, damage, _next(tried, good, bad, most))
        if any(widths == t.widths for t in (*good, *bad)):
            break
    if good:
        return max(good, key=lambda t: t.damage)
    finest = widths_for_damage(params, damage, 0.0)
    model, loss = attempt(finest)
    if loss > most:
        raise InputError.naming(
            "{target_map_drop} {:g} is out of reach: with every layer at its finest, {:.2f} points are lost.",
            most, loss,
        )  # fmt: skip
    return Tried(finest, expected(damage, finest), loss, model)


def _next(last: Tried[Model], good: list[Tried[Model]], bad: list[Tried[Model]], most: float) -> float:
    """The damage to try: in proportion to the last loss, and between what was good and what was bad."""
    share = CAUTION * most / max(last.loss, 1e-6)
    wanted = last.damage * min(max(share, 1 / STRIDE), STRIDE)
    best, worst = max((t.damage for t in good), default=0.0), min((t.damage for t in bad), default=float("inf"))
    return wanted if best < wanted < worst else (best * worst) ** 0.5 if best and bad else min(wanted, worst / 2)
