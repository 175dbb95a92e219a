"""Compare the class names of a data set with a model's: the same, in another order, or different ones."""

from __future__ import annotations

import re
from collections.abc import Sequence

from dsconvert.base.notes import note
from dsconvert.photos.dataset import DataYaml
from dsconvert.photos.labels import LabelRules

MOST_SHOWN = 40  # characters of a name


def label_rules(data: DataYaml, names: Sequence[str], whose: str, strict: bool = False) -> LabelRules:
    """Return how the data set's labels are read for a model.

    names: the model's classes; empty if unknown.
    whose: the model's name in warnings.

    If both name the same classes in another order, labels get the model's numbers, with a warning. There is also a
    warning if the names differ.
    """
    renumber = None
    if names and data.named and len(names) == len(data.names) and not (_are_numbers(names) or _are_numbers(data.names)):
        ours, theirs = [_plain(n) for n in names], [_plain(n) for n in data.names]
        if ours != theirs and set(ours) == set(theirs) and len(set(ours)) == len(ours):
            renumber = tuple(ours.index(name) for name in theirs)
            note(f"{data.path} names the classes in another order than {whose}; its labels are matched by name.")
        elif ours != theirs:
            i = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
            note(
                f"{data.path} names other classes than {whose}, class {i} {data.names[i][:MOST_SHOWN]} instead of "
                f"{names[i][:MOST_SHOWN]}; class numbers are compared."
            )
    return LabelRules(len(data.names), renumber, data.key_points, strict)


def other_order(names: Sequence[str], others: Sequence[str]) -> bool:
    """Return whether both name the same classes in another order."""
    ours, theirs = [_plain(n) for n in names], [_plain(n) for n in others]
    return ours != theirs and sorted(ours) == sorted(theirs)


def _plain(name: str) -> str:
    """Return a name without what people write differently: case, spaces, hyphens, underscores."""
    return re.sub(r"[\s_-]+", " ", name).strip().casefold()


def _are_numbers(names: Sequence[str]) -> bool:
    """Return whether names only count, as in a checkpoint without names: 0, 1, ... or class0, class1, ..."""
    return all(re.fullmatch(rf"(class)?[ _]?0*{i}", _plain(name)) for i, name in enumerate(names))
