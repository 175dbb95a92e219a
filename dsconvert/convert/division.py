"""Which photographs a conversion is fitted on, and which are held back to judge it by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconvert.photos.images import spread

HELD_BACK = 4  # with a target for the loss, every fourth photograph measures it and calibrates nothing
JUDGES = 32  # photographs at most that judge the brief fine-tune
EACH = 8  # every eighth photograph judges it, where there are none beyond those of the fit
FEWEST = 128  # photographs of which some are held back for that


@dataclass(frozen=True)
class Division:
    """Photographs by what they are for. None is for two things, but for what both kinds of judges share."""

    fit: tuple[Path, ...]  # the fit and the fine-tune learn from them
    target: tuple[Path, ...]  # a target for the loss is measured on them
    judges: tuple[Path, ...]  # they decide about the fine-tune; none: there is no fine-tune


def divided(available: Sequence[Path], samples: int, target: bool, finetune: bool) -> Division:
    """At most `samples` of the photographs, evenly spread, less those held back for a target or for the fine-tune.

    Photographs beyond the samples judge the fine-tune at no cost, and the target's do so too. Else every eighth is held
    back for it, and none of fewer than FEWEST, where a fit misses each."""
    taken = spread(available, samples)
    held = taken[HELD_BACK - 1 :: HELD_BACK] if target else []
    fit = _without(taken, held)
    if not finetune:
        return Division(tuple(fit), tuple(held), ())
    judges = held or _without(available, taken)
    if not held and len(judges) < JUDGES:
        judges = fit[EACH - 1 :: EACH] if len(fit) >= FEWEST else []
    judges = spread(judges, JUDGES) if judges else []
    return Division(tuple(_without(fit, judges)), tuple(held), tuple(judges))


def _without(paths: Sequence[Path], others: Sequence[Path]) -> list[Path]:
    gone = set(others)
    return [path for path in paths if path not in gone]
