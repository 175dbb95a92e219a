"""From a tolerable loss to formats: the smallest file whose measured loss is at most that.

Every try fits a model and measures it, which takes a minute or two, so each try is placed by what the one before
showed: over the useful range the loss grows in proportion to the expected damage (docs/method.md).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from dsconvert.base.errors import InputError
from dsconvert.graph.ir import ConvParams
from dsconvert.widths.allocate import allocate
from dsconvert.widths.size import Damage, Formats, choices, formats_like_uniform

TRIES = 4
CAUTION = 0.9  # of the damage that proportion allows
STRIDE = 4.0  # most that one try's damage differs from the last one's
Model = TypeVar("Model")


@dataclass(frozen=True)
class Tried(Generic[Model]):
    """One fitted model: its formats, their expected damage, the loss measured (points of mAP50-95)."""

    formats: Formats
    damage: float
    loss: float
    model: Model


def expected(damage: Damage, formats: Formats) -> float:
    """Damage of these formats together."""
    return sum(damage[name][format] for name, format in formats.items())


def formats_for_damage(params: Mapping[str, ConvParams], damage: Damage, most: float) -> Formats:
    """The smallest formats whose expected damage is at most `most`; the least damage there is, if that is more."""
    options = choices(params, damage)
    low = sum(min(c.size for c in some) for some in options.values())
    high = sum(max(c.size for c in some) for some in options.values())
    best = {name: min(some, key=lambda c: c.damage).format for name, some in options.items()}
    step = max((high - low) // 256, 1)
    while high - low > step:
        middle = (low + high) // 2
        formats = {name: c.format for name, c in allocate(options, middle).items()}
        if expected(damage, formats) <= most:
            best, high = formats, middle
        else:
            low = middle
    return best


def smallest_within(
    params: Mapping[str, ConvParams],
    damage: Damage,
    most: float,
    attempt: Callable[[Formats], tuple[Model, float]],
) -> Tried[Model]:
    """The model of least size among the tried ones that lose at most `most` points. `attempt` fits formats and gives
    the model and its loss. Raises InputError when the finest formats lose more."""
    good: list[Tried[Model]] = []
    bad: list[Tried[Model]] = []
    formats: Formats = formats_like_uniform(params, damage)
    for _ in range(TRIES):
        model, loss = attempt(formats)
        tried = Tried(formats, expected(damage, formats), loss, model)
        (good if loss <= most else bad).append(tried)
        formats = formats_for_damage(params, damage, _next(tried, good, bad, most))
        if any(formats == t.formats for t in (*good, *bad)):
            break
    if good:
        return max(good, key=lambda t: t.damage)
    finest = formats_for_damage(params, damage, 0.0)
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
