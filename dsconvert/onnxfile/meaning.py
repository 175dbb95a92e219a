"""What the values mean that a float tail reads: which channels become scores, and the range that each channel has.

A tail is not understood, only followed: where a Sigmoid or a Softmax reads numbers that were but moved, these are
scores. Boxes and scores, and any two channels, have grids of their own: the step of each goes into its convolution's
CDSw, and the tail reads the channel back in its own unit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dsconvert.graph.grids import QMAX, SURE, QParams
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.onnxfile.facts import Facts
from dsconvert.onnxfile.lower import Lowered
from dsconvert.onnxfile.recognise import MOVING
from dsconvert.onnxfile.source import attribute

UNLIKELY = -9.0  # a logit whose sigmoid is 0.0001: scores below are all the same
ANCHORS = 3  # boxes of a cell of YOLOv5's
MARGIN = 0.05  # of a channel's range on the images seen, beyond both ends: other images show more
STEPS = QParams(1.0, 128)  # the grid of a map whose channels are in steps of their own
WIDE = 1 << 13  # channels of an exit at most
NOTHING, SIGMOID, SOFTMAX = 0, 1, 2  # what a channel becomes a score by


@dataclass(frozen=True)
class Exit:
    """One map that the tail reads. Its value is (map + 128 - zero) * step, channel by channel."""

    name: str  # of the graph's output
    kinds: Tensor  # (c,) of NOTHING, SIGMOID and SOFTMAX
    step: Tensor  # (c,) float32
    zero: Tensor  # (c,) float32, integers 0..255

    @property
    def has_boxes(self) -> bool:
        """Whether all channels go through a Sigmoid and make x, y, w, h, objectness and classes of each of ANCHORS, as
        YOLOv5's do."""
        channels = len(self.kinds)
        return bool((self.kinds == SIGMOID).all()) and channels % ANCHORS == 0 and channels // ANCHORS > 5

    def real(self, x: Tensor) -> Tensor:
        """A map (n, c, h, w) in the file's unit."""
        shape = (-1, 1, 1)
        return (x + (STEPS.zero_point - self.zero).to(x).view(shape)) * self.step.to(x).view(shape)

    def raw(self, real: Tensor) -> Tensor:
        """The map (n, c, h, w) that `real` makes this of."""
        shape = (-1, 1, 1)
        return real / self.step.to(real).view(shape) - (STEPS.zero_point - self.zero).to(real).view(shape)


@dataclass(frozen=True)
class Other:
    """The channels of one map that are no scores.

    exit: place of the map among the exits.
    shares: (n, c, h, w), as shares of their range, or of 1 behind a Sigmoid.
    root: (n, c, h, w), root of the best score of the box that a channel belongs to, a constant; None: cells have one.
    """

    exit: int
    shares: Tensor
    root: Tensor | None


@dataclass(frozen=True)
class Level:
    """What maps of one size mean.

    scores: (n, classes, h, w); None where no channel becomes a score.
    others: all other channels, map by map.
    """

    scores: Tensor | None
    others: tuple[Other, ...]


@dataclass(frozen=True)
class Maps:
    """The maps that a tail of any origin reads, as `measure.outputs.Outputs`."""

    exits: tuple[Exit, ...]

    def measure(self, raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        """Scores, and all other channels as shares of their range. These count where the float network's best score
        is: by its root, as boxes do in `yolo.decode.detection_measure`. Maps of one size belong together."""
        parts: list[Tensor] = []
        for level, level0 in zip(self.levels(raw), self.levels(reference), strict=True):
            weight = level0.scores.amax(1, keepdim=True).sqrt() if level0.scores is not None else None
            parts += [level.scores] if level.scores is not None else []
            others = [o.shares if o.root is None else o.shares * o.root for o in level.others]
            parts += [x * weight if weight is not None else x for x in others]
        return parts

    def levels(self, maps: Sequence[Tensor]) -> list[Level]:
        """What the maps (n, c, h, w), one for each exit, mean; maps of one size together."""
        sizes = dict.fromkeys(x.shape[2:] for x in maps)
        return [self._level([i for i, x in enumerate(maps) if x.shape[2:] == size], maps) for size in sizes]

    def _level(self, here: Sequence[int], maps: Sequence[Tensor]) -> Level:
        """What maps of one size mean."""
        found: list[Tensor] = []
        others: list[Other] = []
        for i in here:
            e, x = self.exits[i], maps[i]
            if e.has_boxes:
                apart = e.real(x).unflatten(1, (ANCHORS, -1)).sigmoid()
                products = apart[:, :, 4:5] * apart[:, :, 5:]
                found.append(products.flatten(1, 2))
                boxes = apart[:, :, :4]
                root = products.detach().amax(2, keepdim=True).sqrt().expand_as(boxes)
                others.append(Other(i, boxes.flatten(1, 2), root.flatten(1, 2)))
                continue
            real = e.real(x)
            logits = real[:, e.kinds == SIGMOID]
            shares = real[:, e.kinds == SOFTMAX]
            if logits.shape[1]:
                found.append(logits.sigmoid())
            if shares.shape[1]:
                found.append(shares.softmax(1))
            if (e.kinds == NOTHING).any():
                others.append(Other(i, x[:, e.kinds == NOTHING] / QMAX, None))
        if not found:
            return Level(None, tuple(others))
        # one channel beside several is an objectness
        single = [s for s in found if s.shape[1] == 1] if max(s.shape[1] for s in found) > 1 else []
        scores = torch.cat([s for s in found if all(s is not one for one in single)], 1)
        for one in single:
            scores = scores * one
        return Level(scores, tuple(others))

    def reach(self, graph: Graph) -> dict[str, float]:
        """None: the grids of outputs are pinned."""
        return {}

    def pinned(self, graph: Graph) -> dict[str, QParams]:
        """Every output is in steps of its own channels."""
        return {e.name: STEPS for e in self.exits if (e.step != 1).any() or (e.zero != STEPS.zero_point).any()}


def score_kinds(facts: Facts, low: Lowered) -> dict[str, Tensor]:
    """Of every exit what its channels become scores by, (c,), by its name in the file."""
    shapes = {name: facts.shape(name) for name in low.exits}
    kinds = {name: torch.zeros(shapes[name][1], dtype=torch.long) for name in low.exits}
    # numbers that say which exit, and which of its channels
    marks = {
        name: np.broadcast_to(
            (np.arange(shape[1]) + WIDE * (i + 1)).astype(np.float32).reshape(-1, *[1] * (len(shape) - 2)), shape
        ).copy()
        for i, (name, shape) in enumerate(shapes.items())
    }
    for index in low.tail:
        node = facts.source.nodes[index]
        kind = {"Sigmoid": SIGMOID, "Softmax": SOFTMAX}.get(node.op_type)
        sources = _moved_from(facts, node.input[0], low.exits) if kind else None
        if kind is None or not sources:
            continue
        found = facts.compute(node.input[0], {name: marks[name] for name in sources})
        if found is None:
            continue
        owners, channels = np.divmod(np.unique(np.rint(found)).astype(np.int64), WIDE)
        if kind == SOFTMAX and found.shape[attribute(node, "axis", -1)] != len(
            channels
        ):  # over bins of a distance, or over pixels
            continue
        for owner, channel in zip(owners, channels, strict=True):
            kinds[low.exits[owner - 1]][channel] = kind
    return kinds


def _moved_from(facts: Facts, value: str, exits: Sequence[str]) -> set[str] | None:
    """The exits that a value is only moved from; None where it is computed."""
    return {value} if value in exits else facts.sources(value, exits, lambda node: node.op_type in MOVING)


def in_steps(
    low: Lowered, kinds: Mapping[str, Tensor], images: Iterable[Tensor]
) -> tuple[Lowered, Maps]:  # fmt: skip
    """The graph with every channel of its outputs in steps of its own range on the images (1, c, h, w), where a
    convolution makes the output and nothing else in the graph reads it."""
    lows, highs = _ranges(low, kinds, images)
    read = {name for node in low.graph.nodes for name in node.inputs}
    convs = {node.name for node in low.graph.convs()}
    params, exits = dict(low.params), list[Exit]()
    for name, value, least, most in zip(low.graph.outputs, low.exits, lows, highs, strict=True):
        kind = kinds[value]
        if (same := next((e for e in exits if e.name == name), None)) is not None:  # one value under two names
            exits.append(same)
            continue
        if name not in convs or name in read:
            exits.append(Exit(name, kind, torch.ones_like(least), torch.full_like(least, STEPS.zero_point)))
            continue
        beyond = MARGIN * (most - least)
        is_logit = kind == SIGMOID
        bottom = torch.where(is_logit, least.clamp_min(UNLIKELY), least - beyond).clamp_max(0)
        top = torch.where(is_logit, most.clamp_min(SURE), most + beyond).clamp_min(0)
        step = ((top - bottom) / QMAX).clamp_min(1e-6)
        zero = (-bottom / step).round().clamp(0, QMAX)
        p = params[name]
        params[name] = ConvParams(p.weight / step[:, None, None, None], p.bias / step + zero - STEPS.zero_point)
        exits.append(Exit(name, kind, step, zero))
    return replace(low, params=params), Maps(tuple(exits))


def _ranges(low: Lowered, kinds: Mapping[str, Tensor], images: Iterable[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """The least and the largest number of each channel of every output that makes a difference."""
    lows: list[Tensor] = []
    highs: list[Tensor] = []
    for x in images:
        made = [y[0].flatten(1) for y in run_float(low.graph, low.params, x)]
        ends = [_ends(y, kinds[name] == SOFTMAX) for y, name in zip(made, low.exits, strict=True)]
        least, most = [a for a, _ in ends], [b for _, b in ends]
        lows = [torch.minimum(a, b) for a, b in zip(lows, least, strict=True)] if lows else least
        highs = [torch.maximum(a, b) for a, b in zip(highs, most, strict=True)] if highs else most
    return lows, highs


def _ends(y: Tensor, shared: Tensor) -> tuple[Tensor, Tensor]:
    """The least and the largest number of each channel of a map (c, positions).

    Of channels that one Softmax reads, `shared` (c,), no number counts that could as well be nearer: its own share
    stays below exp(UNLIKELY), or the share of all others does."""
    least, most = y.amin(1), y.amax(1)
    if int(shared.sum()) < 2:
        return least, most
    logits = y[shared].double()
    whole, best = logits.logsumexp(0), logits.argmax(0, keepdim=True)
    others = whole.expand_as(logits).scatter(0, best, logits.scatter(0, best, -torch.inf).logsumexp(0, keepdim=True))
    least, most = least.clone(), most.clone()
    least[shared] = torch.maximum(logits, whole + UNLIKELY).amin(1).float()
    most[shared] = torch.minimum(logits, others - UNLIKELY).amax(1).float()
    return least, most
