"""Choose how many bits each layer gets: the least total damage within a budget of bytes, by dynamic programming."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dsconvert.dsconv.format import WeightFormat

STATES = 1 << 17  # budgets that are told apart; up to that many bytes the result is exact to the byte


@dataclass(frozen=True)
class Choice:
    """One way to store a layer."""

    format: WeightFormat
    size: int  # bytes in the file
    damage: float  # expected, see `measure.damage`


def allocate(options: Mapping[str, Sequence[Choice]], budget: int) -> dict[str, Choice]:
    """Choose one way for each layer so that the sum of damages is least and the sizes add up to at most `budget` bytes.

    This is the multiple-choice knapsack problem, solved exactly. Sizes are rounded up to units of ceil(budget / STATES)
    bytes.

    Raises ValueError when even the smallest choices do not fit.
    """
    unit = max(1, -(-budget // STATES))
    room = budget // unit
    best = np.zeros(room + 1)  # best[r]: least damage of the layers so far within r units
    picks: list[np.ndarray] = []
    for choices in options.values():
        least, pick = np.full(room + 1, np.inf), np.zeros(room + 1, np.uint8)
        for i, c in enumerate(choices):
            size = -(-c.size // unit)
            if size <= room:
                total = best[: room + 1 - size] + c.damage
                better = total < least[size:]
                least[size:][better] = total[better]
                pick[size:][better] = i
        picks.append(pick)
        best = least
    if not np.isfinite(best[room]):
        smallest = sum(min(c.size for c in choices) for choices in options.values())
        raise ValueError(f"the layers need at least {smallest} bytes, {budget} are allowed")
    # go back through the layers: each choice tells how much room the layers before it had
    chosen: dict[str, Choice] = {}
    for (name, choices), pick in zip(reversed(list(options.items())), reversed(picks), strict=True):
        chosen[name] = choices[int(pick[room])]
        room -= -(-chosen[name].size // unit)
    return {name: chosen[name] for name in options}
