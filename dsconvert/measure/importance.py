"""Measure importance: how much the network's result changes when a value inside it changes.

`measure` turns the raw output maps into numbers v whose squared change is the damage. With random signs s, one backward
pass of sum(s v) gives gradients g with

    E[g^2] = sum over v of (dv / dvalue)^2

This is the diagonal of the Gauss-Newton (Fisher) matrix, by Hutchinson's estimator. BRECQ weights errors by the same
matrix (arXiv 2102.05426).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.base import workers
from dsconvert.base.kept import Room, give_back
from dsconvert.base.threads import in_order
from dsconvert.fit import draws
from dsconvert.fit.channels import second_moment
from dsconvert.fit.seen import Drawn, Places
from dsconvert.graph.integer import keeps_grid
from dsconvert.graph.ir import INPUT, ConvParams, Graph, Node
from dsconvert.graph.run import execute, float_step
from dsconvert.graph.shapes import value_shapes
from dsconvert.measure.clipping import LEVELS, clip_effects
from dsconvert.measure.damage import Spots, squared_gradient

SAMPLES_PER_IMAGE = 1024  # values drawn from a map of one image
FEWEST_SAMPLES = 64  # least of them where there are many images; two extremes come on top
SAMPLES = 1 << 16  # values drawn from a map over all images, unless FEWEST_SAMPLES gives more
SEARCHED = 4096  # a larger map is first thinned out to so many values
THOROUGH = 64  # least number of thorough images, if there are as many: see `Importance`
MANY = 8.0  # of n images, at least sqrt(MANY n) are thorough: see `Importance`
EARLY = 8  # a layer is early if its map has cells smaller than EARLY x EARLY pixels
BRIEFLY = 256  # with more images, the backward pass of brief ones ends before the last convolutions
GIVE_BACK = 16  # free memory is returned to the system after so many images
# (raw maps, the float network's raw maps as constants) -> numbers whose squared change is the damage
Measure = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
Found = dict[str, tuple[Tensor, Tensor]]  # value name -> the value and its gradient (empty where it is unknown)


@dataclass(frozen=True)
class Part:
    """Which images of the calibration set a process has."""

    first: int  # index of its first image
    mine: int  # number of its images
    all: int  # number of all processes' images


@dataclass(frozen=True)
class Importance:
    """What all images tell together; all processes have the same, except for the positions drawn from their own images.

    One image in `every` is thorough: its backward pass goes through the whole network. The others are brief. Their
    backward pass skips the early layers, whose maps are large: it would take longer than all the rest. Early layers
    draw their positions by the gradient that arrives behind them. With more than BRIEFLY images, the pass ends at the
    inputs of the last convolutions, and all layers before draw by the gradient there.

    samples: value name -> (values, their weights), both (k,), from thorough images. The minimum and maximum of brief
        images are added with weight 0 where `clipping` is known.
    drawn: convolution name -> positions drawn from each image. A position's chance is the square root of its squared
        gradients summed over channels; all chances are equal where nothing depends on the layer.
    channels: convolution name -> the second moment (cho, cho) of its output gradients over thorough images (see
        `fit.channels`); missing where nothing depends on the layer.
    squares: for the requested convolutions, the squared gradient of the weight (see `measure.damage`), summed over
        thorough images and scaled up to all images.
    clipping: value name -> the squared effect of clipping the value at each of `clipping.LEVELS`. It sums over all
        images whose backward pass reaches every reader of the value, scaled to the number of thorough images. Values
        that feed an activation are missing, as they are judged behind it.
    """

    samples: Mapping[str, tuple[Tensor, Tensor]]
    drawn: Mapping[str, Drawn]
    channels: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    clipping: Mapping[str, Tensor]


def every(images: int) -> int:
    """Return n so that one image in n is thorough."""
    return max(1, int(images // max(THOROUGH, (MANY * images) ** 0.5)))


def way_back(graph: Graph, shapes: Mapping[str, Sequence[int]], high: int, wide: int, images: int) -> int:
    """Return the index of the first node that a brief image's backward pass reaches.

    shapes: value name -> (channels, height, width).
    high, wide: the image's height and width.
    images: number of calibration images.
    """
    if images > BRIEFLY:
        return min(i for i, node in enumerate(graph.nodes) if node.name in graph.outputs)
    return behind_early(graph, shapes, high, wide)


def behind_early(graph: Graph, shapes: Mapping[str, Sequence[int]], high: int, wide: int) -> int:
    """Return the index of the first node whose map has cells of at least EARLY x EARLY pixels, 0 if there is none."""
    most = (high // EARLY) * (wide // EARLY)
    return next((i for i, n in enumerate(graph.nodes) if shapes[n.name][1] * shapes[n.name][2] <= most), 0)


def gradients(
    graph: Graph,
    params: Mapping[str, ConvParams],
    x: Tensor,
    measure: Measure,
    generator: torch.Generator,
    start: int = 0,
) -> Found:
    """Run the float network on a batch (n, 3, h, w) and return every value with its gradient g (see the module).

    start: index of the first node that the backward pass covers. Earlier values get a gradient only if a node from
        `start` on reads them, and only from these nodes.
    """
    values: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    late = {node.name for node in graph.nodes[start:]}
    wanted = late | {name for node in graph.nodes[start:] for name in node.inputs if name != INPUT}

    def step(node: Node, inputs: list[Tensor]) -> Tensor:
        with torch.set_grad_enabled(node.name in late):
            value = float_step(node, inputs, params)
        if node.name in wanted:
            value.requires_grad_(True)  # this stops torch from computing the gradient of the image, which nothing uses
            value.register_hook(partial(found.__setitem__, node.name))  # unlike retain_grad, a hook makes no copy
        values[node.name] = value
        return value

    with torch.enable_grad():
        raw = execute(graph, x, step)
        measured = measure(raw, [t.detach() for t in raw])
        total = torch.zeros((), device=x.device)
        for v in measured:
            total = total + (v * _signs(v, generator)).sum()
        total.backward()

    def gradient(name: str, value: Tensor) -> Tensor:
        return found[name] if name in found else torch.zeros_like(value if name in wanted else value[:0])

    return {name: (v.detach(), gradient(name, v)) for name, v in values.items()}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Draw 1 or -1 for every number; each random byte gives eight signs."""
    drawn = torch.randint(256, (-(-like.numel() // 8),), generator=generator, dtype=torch.uint8)
    bits = torch.from_numpy(np.unpackbits(drawn.numpy(), count=like.numel())).reshape(like.shape)
    return bits.to(like).mul_(2).sub_(1)


def measure_importance(
    graph: Graph,
    params: Mapping[str, ConvParams],
    images: Iterable[Tensor],
    measure: Measure,
    seed: int,
    chosen: Sequence[str] = (),
    part: Part | None = None,
    room: Room | None = None,
) -> Importance:
    """Measure importance over images.

    graph, params: the float network.
    images: (1, 3, h, w) each, this process's part of the calibration set.
    measure: see Measure.
    seed: decides all draws.
    chosen: convolutions whose `squares` are wanted.
    part: which images these are; None: all of them, and `images` has a length.
    room: keeps what is drawn, in memory or on disk.

    A value that feeds an activation alone is weighted by the gradient behind the activation (see `Graph.activated`).
    """
    if part is None:
        images = list(images)
        part = Part(0, len(images), len(images))
    samples: dict[str, list[tuple[Tensor, Tensor]]] = {n.name: [] for n in graph.nodes if not keeps_grid(n.op)}
    drawn = {n.name: Drawn(room or Room(), part.mine) for n in graph.convs()}
    apart = every(part.all)
    # the more images there are, the fewer values each gives
    each = max(FEWEST_SAMPLES, min(SAMPLES_PER_IMAGE, SAMPLES * apart // part.all))
    most = draws.positions_each(part.all)
    shapes = {name: tuple(p.weight.shape) for name, p in params.items()}
    channels = {n.name: torch.zeros((shapes[n.name][0],) * 2, dtype=torch.float64) for n in graph.convs()}
    squares = {name: torch.zeros(shapes[name]) for name in chosen}
    spots: dict[str, Spots] = {}
    behind, readers = graph.activated(), graph.consumers()
    clipping = {name: torch.zeros_like(LEVELS) for name in samples if name not in behind}
    clipped = dict.fromkeys(clipping, 0)  # number of images that contribute to each value's clipping effects
    looked = torch.zeros(2, dtype=torch.float64)  # number of images, and of thorough ones

    @cache
    def start_for(depth: int, high: int, wide: int) -> int:
        values = value_shapes(graph, shapes, (depth, high, wide))
        return way_back(graph, values, high, wide, part.all)

    @cache
    def whole_from(start: int) -> Mapping[str, None]:
        """Return the values in `clipping` whose gradient is complete: all their readers are nodes from `start` on."""
        late = {node.name for node in graph.nodes[start:]}
        return {n: None for n in clipping if n in late or all(r.name in late for r in readers.get(n, []))}

    def look(numbered: tuple[int, Tensor]) -> _Look:
        index, image = numbered
        generator, at = draws.of_image(seed, index), partial(draws.of_image, seed, index)
        start = start_for(*image.shape[1:]) if index % apart else 0
        found = gradients(graph, params, image, measure, generator, start)
        known = whole_from(start)
        made = _Look.at_gradients(graph, found, at, most, start).clipped(found, known)
        if index % apart:
            return made.extremes(found, [name for name in samples if behind.get(name, name) in known])
        return made.thoroughly(graph, params, image, found, chosen, generator, each)

    for index, look_at in enumerate(in_order(look, enumerate(images, part.first))):
        if index % GIVE_BACK == GIVE_BACK - 1:
            give_back()
        looked += torch.tensor((1, bool(look_at.channels)))
        for name, taken in drawn.items():
            places, outputs = look_at.drawn[name]
            taken.put(places)
            taken.put_outputs(index, outputs)
        for name, moment in look_at.channels.items():
            channels[name] += moment
        for name, pair in look_at.samples.items():
            samples[name].append(pair)
        for name, effects in look_at.clipping.items():
            clipping[name] += effects
            clipped[name] += 1
        for name, square in look_at.squares.items():
            squares[name] += square
        for name, spot in look_at.spots.items():
            spots[name] = spots[name].plus(spot) if name in spots else spot
    # a layer without any gradient in all processes has no importance to draw by
    counts = workers.summed(torch.tensor([taken.total() for taken in drawn.values()], dtype=torch.float64))
    for taken, count in zip(drawn.values(), counts, strict=True):
        taken.even = not count
    all_images, some = workers.summed(looked).tolist()
    saying = workers.summed(torch.tensor(list(clipped.values()), dtype=torch.float64)).tolist()

    def joined(parts: list[Tensor]) -> Tensor:
        # a process may have no thorough image
        return workers.joined(torch.cat([torch.empty(0), *parts]))

    return Importance(
        {name: (joined([v for v, _ in s]), joined([w for _, w in s])) for name, s in samples.items()},
        drawn,
        {name: workers.summed(c).float() for (name, c), count in zip(channels.items(), counts, strict=True) if count},
        {name: square * (all_images / some) for name, square in _of_all_processes(squares, spots).items()},
        {
            name: workers.summed(effects) * (some / max(count, 1))
            for (name, effects), count in zip(clipping.items(), saying, strict=True)
        },
    )


def _of_all_processes(squares: Mapping[str, Tensor], spots: Mapping[str, Spots]) -> dict[str, Tensor]:
    """Return the sums over all images; layers in `spots` have theirs from there."""
    found = {name: workers.summed(square) for name, square in squares.items()}
    for name in sorted(set().union(*workers.gathered(set(spots)))):  # a process may have no thorough image
        mine = spots.get(name) or Spots.none(found[name])
        whole = Spots(workers.summed(mine.squares), workers.summed(mine.products), workers.summed(mine.outputs))
        found[name] = whole.centred()
    return found


@dataclass(frozen=True)
class _Look:
    """What one image adds to `Importance`; only a thorough image has `channels`, and `squares` or `spots`."""

    drawn: Mapping[str, tuple[Places, Tensor]]  # positions, and the float outputs there
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clipping: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)
    spots: Mapping[str, Spots] = field(default_factory=dict)  # of layers whose maps have one position

    @staticmethod
    def at_gradients(
        graph: Graph, found: Found, places: Callable[[], torch.Generator], most: int, start: int = 0
    ) -> _Look:
        """Draw `most` positions for each layer by the gradients, and take the layer's outputs there.

        A layer before `start` without a gradient of its own draws by the gradients of the values that later nodes read.

        places: returns the image's random generator, anew for each layer.
        """
        drawn: dict[str, tuple[Places, Tensor]] = {}
        passed = [length_of(g) for _, g in (found[node.name] for node in graph.nodes[:start]) if len(g)]
        for node in graph.convs():
            value, gradient = found[node.name]
            if len(gradient):
                length = length_of(gradient)
            else:
                # sum the gradients that arrive at later nodes' inputs, each resized to this layer's map
                squares = [F.interpolate(p[None, None].square(), value.shape[2:], mode="area")[0, 0] for p in passed]
                length = torch.stack(squares).sum(0).sqrt()
            weights = length.flatten().double()
            counts_at_all = bool(weights.any())
            picks, counts = draws.positions(weights if counts_at_all else torch.ones_like(weights), places(), most)
            outputs = value[0].flatten(1)[:, picks.to(value.device)].cpu()
            drawn[node.name] = Places(picks, counts * counts_at_all), outputs
        return _Look(drawn)

    def clipped(self, found: Found, names: Iterable[str]) -> _Look:
        """Add the effects of clipping the named values, whose gradients must be complete."""
        return replace(self, clipping={name: clip_effects(*found[name]) for name in names})

    def extremes(self, found: Found, names: Iterable[str]) -> _Look:
        """Add the minimum and maximum of the named values as samples of weight 0."""
        ends = {name: torch.stack(torch.aminmax(found[name][0])).cpu() for name in names}
        return replace(self, samples={name: (both, torch.zeros_like(both)) for name, both in ends.items()})

    def thoroughly(
        self,
        graph: Graph,
        params: Mapping[str, ConvParams],
        image: Tensor,
        found: Found,
        chosen: Sequence[str],
        generator: torch.Generator,
        each: int,
    ) -> _Look:
        """Add what only thorough images give: second moments of output channels, samples, and squares.

        chosen: convolutions whose squares are wanted.
        each: samples drawn from a value.
        """
        behind = graph.activated()
        names = [n.name for n in graph.nodes if not keeps_grid(n.op)]
        samples = {name: _sample(found[name][0], found[behind.get(name, name)][1], generator, each) for name in names}
        squares, spots, channels = {}, {}, {}
        for node in graph.convs():
            gradient = found[node.name][1]
            channels[node.name] = second_moment(gradient[0].flatten(1), self.drawn[node.name][0])
            if node.name in chosen:
                x = image if node.inputs[0] == INPUT else found[node.inputs[0]][0]
                shape = params[node.name].weight.shape
                if gradient[0, 0].numel() == 1:
                    spots[node.name] = Spots.of(node, x, gradient, shape)
                else:
                    squares[node.name] = squared_gradient(node, x, gradient, shape).cpu()
        return replace(self, channels=channels, samples=samples, squares=squares, spots=spots)


def length_of(gradient: Tensor) -> Tensor:
    """Return |g| over the channels at every position: (1, c, h, w) -> (h, w), on CPU."""
    from dsconvert.base import loops  # numba takes a while to import

    found = torch.empty(gradient.shape[2:])
    loops.lengths(gradient[0].flatten(1).cpu().contiguous().numpy(), found.flatten().numpy())
    return found


def _sample(values: Tensor, gradient: Tensor, generator: torch.Generator, each: int) -> tuple[Tensor, Tensor]:
    """Draw `each` values, half of them evenly and half in proportion to the squared gradient.

    Weights keep the expectation of sum(weight * f(value)) equal to sum(g^2 f(value)). The minimum and maximum are added
    with weight 0.
    """
    v, g = values.reshape(-1), gradient.reshape(-1)
    extremes = torch.stack(torch.aminmax(v))
    if v.numel() > SEARCHED:  # a large map is thinned out first; otherwise the sums below would take most of the time
        thin = torch.randint(v.numel(), (SEARCHED,), generator=generator).to(v.device)
        scale = v.numel() / SEARCHED
        v, w = v[thin], g[thin].square() * scale
    else:
        w = g.square()
    n, half, sums = v.numel(), each // 2, w.double().cumsum(0)
    even = torch.randint(n, (half,), generator=generator).to(v.device)
    at = torch.rand(half, generator=generator, dtype=torch.float64).to(v.device) * sums[-1]
    picks = torch.cat((even, torch.searchsorted(sums, at).clamp_max(n - 1)))
    chance = 0.5 / n + 0.5 * w[picks] / sums[-1].clamp_min(1e-300)
    weight = torch.cat((w[picks] / (2 * half * chance), torch.zeros_like(extremes)))
    return torch.cat((v[picks], extremes)).cpu(), weight.float().cpu()
