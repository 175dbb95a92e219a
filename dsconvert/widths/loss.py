"""Find the smallest file that loses at most a given number of points of mAP50-95.

Every try fits a model and measures its loss, which takes a minute or two. So there are few tries, and each is placed by
the one before: over the useful range the loss is proportional to the expected damage (docs/method.md).
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
CAUTION = 0.9  # share of the damage that proportionality would allow
STRIDE = 4.0  # largest factor between the damages of two successive tries
Model = TypeVar("Model")


@dataclass(frozen=True)
class Tried(Generic[Model]):
    """One fitted model.

    formats: of its layers.
    damage: their expected damage.
    loss: measured, in points of mAP50-95.
    """

    formats: Formats
    damage: float
    loss: float
    model: Model


def expected(damage: Damage, formats: Formats) -> float:
    """Return the expected damage of all formats together."""
    return sum(damage[name][format] for name, format in formats.items())


def formats_for_damage(params: Mapping[str, ConvParams], damage: Damage, most: float) -> Formats:
    """Return the smallest formats with an expected damage of at most `most`, or the least damaging ones if there are
    none.
    """
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
    """Return the smallest of some tried models that lose at most `most` points of mAP50-95.

    attempt: fits a model in the given formats, and returns it with its loss.

    Raises InputError when even the finest formats lose more.
    """
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
    """Return the damage to try next: in proportion to the last loss, within the bounds known so far."""
    share = CAUTION * most / max(last.loss, 1e-6)
    wanted = last.damage * min(max(share, 1 / STRIDE), STRIDE)
    best, worst = max((t.damage for t in good), default=0.0), min((t.damage for t in bad), default=float("inf"))
    return wanted if best < wanted < worst else (best * worst) ** 0.5 if best and bad else min(wanted, worst / 2)
