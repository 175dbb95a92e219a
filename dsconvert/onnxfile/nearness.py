"""How far a converted file is from the float file: the last look before it is written.

The network is judged where the tail reads it: scores apart from boxes, whatever their units, and before anything is
ranked. The tail is judged by itself: of the converted network's maps, the float file's nodes must make the converted
file's outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dsconvert.base.errors import CheckError
from dsconvert.onnxfile.engines import session
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.lower import Lowered
from dsconvert.onnxfile.meaning import Level, Maps
from dsconvert.onnxfile.source import Array, giving, used

# Of the variance. A network that finds the same objects is off by some hundredths, a small one of few bits by some
# tenths. One that finds others is off by twice the variance, and one that finds nothing by all of it.
FAR_OFF = 0.75
UNSEEN = 0.05  # scores below are all the same, as good as none
FAINT = 0.25  # scores may be off as if each image had but one such score
FLAT = 0.02  # of a channel's size: one that varies by less may be off as if it varied by this
SLACK, LEAST = 1e-3, 1e-5  # of a number, and of its output's largest, by which two runs of one tail may differ
NEARLY_ALL = 0.99  # of an output's numbers: the largest of nearly equal ones may be another in another run
RANKING = ("TopK", "NonMaxSuppression")  # operators that order what they read: equal scores may change places
SCORES, BOXES, VALUES = "scores", "boxes, or other numbers beside scores,", "numbers of output"
Key = tuple[str, int]  # what is judged as one: scores of a level, or what else an exit has


@dataclass(frozen=True)
class Look:
    """What a converted file makes of a batch of images.

    image: a batch of n images, as the file reads it.
    maps: (n, c, h, w) each, at the graph's exits, in their steps.
    outputs: the file's, in order.
    """

    image: Array
    maps: list[Tensor]
    outputs: list[Array]


def how_far_off(facts: Facts, low: Lowered, maps: Maps, looks: Sequence[Look]) -> str | None:
    """A sentence about what is farthest off on images, where it is far off; else None.

    Raises CheckError where the converted file gives no numbers though the float file does, and where its tail computes
    something else than the float file's."""
    outputs = [value.name for value in facts.source.model.graph.output]
    running = session(giving(facts.source.model, low.exits).SerializeToString(), torch.get_num_threads())
    sums: dict[Key, Tensor] = {}
    for look in looks:
        found = running.run([*outputs, *low.exits], {facts.source.image.name: look.image})
        for name, wanted, made in zip(outputs, found, look.outputs, strict=False):
            if _is_numbers(wanted) and not _is_numbers(made):
                raise CheckError(f"The converted file's output {name} is no number on an image; please report it.")
        _check_tail(facts, low, maps, look)
        ends = zip(maps.exits, found[len(outputs) :], look.maps, strict=True)
        reference = [e.raw(torch.from_numpy(y).reshape(x.shape)) for e, y, x in ends]
        for key, more in _sums(maps.levels(look.maps), maps.levels(reference)):
            sums[key] = sums[key] + more if key in sums else more
    images = sum(len(look.image) for look in looks)
    shares = {key: _share(found, key[0] == SCORES, images) for key, found in sums.items()}
    worst = max(shares, key=lambda key: shares[key])
    if shares[worst] < FAR_OFF:
        return None
    what = f"{VALUES} {_fed(facts, low.exits[worst[1]])}" if worst[0] == VALUES else worst[0]
    return (
        f"On calibration images, {what} are off by {100 * shares[worst]:.0f} % of their variance; look with dsconvert "
        "compare, as more photographs or 8 bits may help."
    )


def _is_numbers(value: object) -> bool:
    """Whether it is a tensor without NaN and infinity."""
    return isinstance(value, np.ndarray) and value.dtype.kind in "fiu" and bool(np.isfinite(value).all())


def _check_tail(facts: Facts, low: Lowered, maps: Maps, look: Look) -> None:
    """Raise CheckError unless the float file's nodes make the converted file's outputs of its maps."""
    real = [e.real(x).numpy() for e, x in zip(maps.exits, look.maps, strict=True)]
    given = {name: x.reshape(facts.shape(name)) for name, x in zip(low.exits, real, strict=True)}
    ranked = any(facts.source.nodes[i].op_type in RANKING for i in low.tail)
    for value, made in zip(facts.source.model.graph.output, look.outputs, strict=True):
        name = value.name
        wanted = given[name] if name in given else facts.compute(name, {**given, facts.source.image.name: look.image})
        if wanted is not None and isinstance(made, np.ndarray) and not _is_same(made, wanted, ranked):
            raise CheckError(f"The converted file's output {name} is not what its layers lead to; please report it.")


def _is_same(found: Array, wanted: Array, ranked: bool) -> bool:
    """Whether two runs of one tail agree, number by number; once they are ranked, in any order."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype or found.dtype.kind not in "fiu":
        return found.shape == wanted.shape and found.dtype == wanted.dtype
    if ranked:
        found, wanted = np.sort(found, None), np.sort(wanted, None)
    least = LEAST * float(np.abs(wanted[np.isfinite(wanted)]).max(initial=0))
    near = np.isclose(found, wanted, SLACK, least, equal_nan=True)
    return not near.size or float(near.mean()) >= NEARLY_ALL


def _sums(made: Sequence[Level], wanted: Sequence[Level]) -> Iterator[tuple[Key, Tensor]]:
    """Sums over a batch of all that is judged, by what it is."""
    for index, (a, b) in enumerate(zip(made, wanted, strict=True)):
        best = None
        if a.scores is not None and b.scores is not None:
            yield (SCORES, index), _over(a.scores.clamp_min(UNSEEN), b.scores.clamp_min(UNSEEN), torch.ones(1))
            best = b.scores.amax(1, keepdim=True)
        for one, other in zip(a.others, b.others, strict=True):
            score = best if other.root is None else other.root.square()
            weight = torch.ones(1) if score is None else torch.where(score < UNSEEN, 0, score)
            yield (VALUES if best is None else BOXES, one.exit), _over(one.shares, other.shares, weight)


def _over(made: Tensor, wanted: Tensor, weight: Tensor) -> Tensor:
    """Of each channel of maps (n, c, h, w) the sums (5, c), over images and positions, of: the weight, the weighted
    squared difference, one, the float file's number, its square."""
    a, b, w = (x.transpose(0, 1).flatten(1).double() for x in (made, wanted, weight.expand_as(made)))
    return torch.stack([x.sum(1) for x in (w, w * (a - b).square(), torch.ones_like(b), b, b.square())])


def _share(sums: Tensor, are_scores: bool, images: int) -> float:
    """The squared difference as a share of the variance of the channels (5, c), where it counts. Whatever the weights,
    there is as much as one box in every image. Channels of one number an image vary about one mean."""
    weight, off, count, first, second = sums
    mean = first.mean() / images if count[0] == images else first / count
    variance = second / count - 2 * mean * first / count + mean**2
    variance = variance.maximum(second / count * FLAT**2)
    spread = float((weight.clamp_min(images) * variance).sum())
    return float(off.sum()) / max(spread, images * FAINT**2 if are_scores else 1e-30)


def _fed(facts: Facts, exit_name: str) -> str:
    """The first output that is made from an exit."""
    source = facts.source
    for value in source.model.graph.output:
        read = {name for i in source.needed([value.name]) for name in used(source.nodes[i])}
        if exit_name in (value.name, *read):
            return value.name
    return exit_name
