"""Divide the photographs: some to fit a conversion on, the others held back to judge it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dsconvert.photos.images import spread

HELD_BACK = 4  # with a target for the loss, every fourth photograph measures the loss and calibrates nothing
JUDGES = 32  # most photographs that judge the brief fine-tune
EACH = 8  # every eighth photograph judges the fine-tune, if the fit would use all photographs
FEWEST = 128  # with fewer photographs than this, none are held back for the fine-tune


@dataclass(frozen=True)
class Division:
    """The photographs by purpose. Only photographs of `target` may also judge the fine-tune."""

    fit: tuple[Path, ...]  # the fit and the fine-tune learn from these
    target: tuple[Path, ...]  # the target for the loss is measured on these
    judges: tuple[Path, ...]  # these decide about the fine-tune; without any there is none


def divided(available: Sequence[Path], samples: int, target: bool, finetune: bool) -> Division:
    """Divide at most `samples` photographs, evenly spread over all that are given.

    Photographs beyond the samples cost nothing, so they judge the fine-tune, and so do photographs of a target.
    Otherwise every eighth photograph of the fit is held back for it. With fewer than FEWEST photographs none is,
    because the fit needs all.

    target: whether the loss is to be measured.
    finetune: whether there is a fine-tune.
    """
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
