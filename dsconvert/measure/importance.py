"""What matters: how much the network's result changes when a value inside it changes.

`measure` turns the raw output maps into numbers whose squared change is the damage done. With v of them and random
signs s, the gradient g of sum(s v) has E[g^2] = sum over v of (dv / dvalue)^2: the diagonal of the Gauss-Newton
(Fisher) matrix, from one backward pass (Hutchinson's estimator, as in BRECQ's Fisher weights, arXiv 2102.05426).
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
from dsconvert.measure.damage import squared_gradient

SAMPLES_PER_IMAGE = 1024
FEWEST_SAMPLES = 64  # of an image, and two extremes besides
SAMPLES = 1 << 16  # of a value over all images, as far as FEWEST_SAMPLES allow
SEARCHED = 4096  # values of a map that samples are drawn from
THOROUGH = 64  # images at least are looked at thoroughly, as far as there are as many
MANY = 8.0  # of n images the root of MANY n at least
EARLY = 8  # maps finer than a cell of so many pixels are early: see `Importance`
BRIEFLY = 256  # of more images the way back through those that are not thorough ends at the last convolutions
GIVE_BACK = 16  # after so many images free memory is given back to the system
# (raw maps, the float network's raw maps, which give the constants) -> numbers whose squared change is the damage
Measure = Callable[[list[Tensor], list[Tensor]], list[Tensor]]
Found = dict[str, tuple[Tensor, Tensor]]  # value name -> the value, and its gradient (empty where it is not known)


@dataclass(frozen=True)
class Part:
    """Which images of the calibration set a process has."""

    first: int  # the place of its first
    mine: int  # how many it has
    all: int  # how many all processes have together


@dataclass(frozen=True)
class Importance:
    """What all images say together. Of several processes all have the same, but for what is drawn from their images.

    One image of `every` is looked at thoroughly. The others give positions alone, and those of early layers by the
    gradient behind these layers: their maps are large, and going back through them takes longer than all the rest. Of
    more than BRIEFLY images, all layers but the last take the gradients that arrive at the last ones' inputs.

    samples: value name -> (values of the thorough images, their weights), both (k,); and of all images whose `clipping`
        is known the two extremes, weighing nothing.
    drawn: convolution name -> positions drawn from each image by their weights, the root of the squared gradients
        summed over channels; evenly where nothing depends on the layer.
    channels: for all others the second moment (cho, cho) of the gradients of their output channels over the thorough
        images (see `fit.channels`).
    squares: for the convolutions that were asked for, the squared gradients of the weight (see `measure.damage`),
        summed over the thorough images, and as many times as those stand for others.
    clipping: the squared effects of cutting a value at each of `clipping.LEVELS`, by value name, for values that
        `samples` judges where they are. They are over all images whose way back reaches all readers of the value, and
        scaled to as many images as are looked at thoroughly.
    """

    samples: Mapping[str, tuple[Tensor, Tensor]]
    drawn: Mapping[str, Drawn]
    channels: Mapping[str, Tensor]
    squares: Mapping[str, Tensor]
    clipping: Mapping[str, Tensor]


def every(images: int) -> int:
    """One of so many is looked at thoroughly."""
    return max(1, int(images // max(THOROUGH, (MANY * images) ** 0.5)))


def way_back(graph: Graph, shapes: Mapping[str, Sequence[int]], high: int, wide: int, images: int) -> int:
    """The place of the first node that gets a gradient where an image of that size, one of so many, is not looked at
    thoroughly."""
    if images > BRIEFLY:
        return min(i for i, node in enumerate(graph.nodes) if node.name in graph.outputs)
    return behind_early(graph, shapes, high, wide)


def behind_early(graph: Graph, shapes: Mapping[str, Sequence[int]], high: int, wide: int) -> int:
    """The place of the first node behind the early ones, for images of that size and the shapes of their values."""
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
    """Every value of the float network on batch x (n, 3, h, w), and the gradient g of the module's docstring. Of the
    nodes before `start` only those have one that later nodes read, and it is what comes through these alone."""
    values: dict[str, Tensor] = {}
    found: dict[str, Tensor] = {}
    late = {node.name for node in graph.nodes[start:]}
    wanted = late | {name for node in graph.nodes[start:] for name in node.inputs if name != INPUT}

    def step(node: Node, inputs: list[Tensor]) -> Tensor:
        with torch.set_grad_enabled(node.name in late):
            value = float_step(node, inputs, params)
        if node.name in wanted:
            value.requires_grad_(True)  # the image's own gradient, which nobody asks for, is not computed
            value.register_hook(partial(found.__setitem__, node.name))  # no copy, unlike retain_grad
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
    """1 or -1, evenly; eight from every byte that is drawn."""
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
    """Importance over images (1, 3, h, w) each, which are the given part of the calibration set (by default, of one
    process, the whole, then images has a length); `squares` are those of the `chosen` convolutions; what is drawn goes
    to the room given.

    Values are weighted where they count: before an activation by the gradient behind it (see `Graph.activated`)."""
    if part is None:
        images = list(images)
        part = Part(0, len(images), len(images))
    samples: dict[str, list[tuple[Tensor, Tensor]]] = {n.name: [] for n in graph.nodes if not keeps_grid(n.op)}
    drawn = {n.name: Drawn(room or Room(), part.mine) for n in graph.convs()}
    apart = every(part.all)
    # each image gives fewer samples where there are many
    each = max(FEWEST_SAMPLES, min(SAMPLES_PER_IMAGE, SAMPLES * apart // part.all))
    most = draws.positions_each(part.all)
    shapes = {name: tuple(p.weight.shape) for name, p in params.items()}
    channels = {n.name: torch.zeros((shapes[n.name][0],) * 2, dtype=torch.float64) for n in graph.convs()}
    squares = {name: torch.zeros(shapes[name]) for name in chosen}
    behind, readers = graph.activated(), graph.consumers()
    clipping = {name: torch.zeros_like(LEVELS) for name in samples if name not in behind}
    clipped = dict.fromkeys(clipping, 0)  # images that say what clipping a value does
    looked = torch.zeros(2, dtype=torch.float64)  # images, and those that were looked at thoroughly

    @cache
    def start_for(depth: int, high: int, wide: int) -> int:
        values = value_shapes(graph, shapes, (depth, high, wide))
        return way_back(graph, values, high, wide, part.all)

    @cache
    def whole_from(start: int) -> Mapping[str, None]:
        """The values that `clipping` is about whose readers all are nodes from `start` on: their gradient is whole."""
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
    # where nothing depends on a layer, no process has anything to say about its positions
    counts = workers.summed(torch.tensor([taken.total() for taken in drawn.values()], dtype=torch.float64))
    for taken, count in zip(drawn.values(), counts, strict=True):
        taken.even = not count
    all_images, some = workers.summed(looked).tolist()
    saying = workers.summed(torch.tensor(list(clipped.values()), dtype=torch.float64)).tolist()

    def joined(parts: list[Tensor]) -> Tensor:
        # a process may have none of the images that are looked at
        return workers.joined(torch.cat([torch.empty(0), *parts]))

    return Importance(
        {name: (joined([v for v, _ in s]), joined([w for _, w in s])) for name, s in samples.items()},
        drawn,
        {name: workers.summed(c).float() for (name, c), count in zip(channels.items(), counts, strict=True) if count},
        {name: workers.summed(square) * (all_images / some) for name, square in squares.items()},
        {
            name: workers.summed(effects) * (some / max(count, 1))
            for (name, effects), count in zip(clipping.items(), saying, strict=True)
        },
    )


@dataclass(frozen=True)
class _Look:
    """What one image adds to each part of `Importance`; to channels and squares only if it is looked at thoroughly."""

    drawn: Mapping[str, tuple[Places, Tensor]]  # and the outputs there
    channels: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    clipping: Mapping[str, Tensor] = field(default_factory=dict)
    squares: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def at_gradients(
        graph: Graph, found: Found, places: Callable[[], torch.Generator], most: int, start: int = 0
    ) -> _Look:
        """What every image tells, from its values and gradients: at `most` positions of each layer, drawn by a
        generator from `places`. Of layers before `start` those without a gradient take that of what later ones read."""
        drawn: dict[str, tuple[Places, Tensor]] = {}
        passed = [length_of(g) for _, g in (found[node.name] for node in graph.nodes[:start]) if len(g)]
        for node in graph.convs():
            value, gradient = found[node.name]
            if len(gradient):
                length = length_of(gradient)
            else:
                squares = [F.interpolate(p[None, None].square(), value.shape[2:], mode="area")[0, 0] for p in passed]
                length = torch.stack(squares).sum(0).sqrt()
            weights = length.flatten().double()
            counts_at_all = bool(weights.any())
            picks, counts = draws.positions(weights if counts_at_all else torch.ones_like(weights), places(), most)
            outputs = value[0].flatten(1)[:, picks.to(value.device)].cpu()
            drawn[node.name] = Places(picks, counts * counts_at_all), outputs
        return _Look(drawn)

    def clipped(self, found: Found, names: Iterable[str]) -> _Look:
        """And what clipping does to the values of these names, whose gradients are whole."""
        return replace(self, clipping={name: clip_effects(*found[name]) for name in names})

    def extremes(self, found: Found, names: Iterable[str]) -> _Look:
        """And the least and the largest of the values of these names, as samples that weigh nothing."""
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
        """And the rest: how output channels go together, `each` samples of a value, squares of the `chosen`
        convolutions."""
        behind = graph.activated()
        names = [n.name for n in graph.nodes if not keeps_grid(n.op)]
        samples = {name: _sample(found[name][0], found[behind.get(name, name)][1], generator, each) for name in names}
        squares, channels = {}, {}
        for node in graph.convs():
            gradient = found[node.name][1]
            channels[node.name] = second_moment(gradient[0].flatten(1), self.drawn[node.name][0])
            if node.name in chosen:
                x = image if node.inputs[0] == INPUT else found[node.inputs[0]][0]
                shape = params[node.name].weight.shape
                squares[node.name] = squared_gradient(node, x, gradient, shape).cpu()
        return replace(self, channels=channels, samples=samples, squares=squares)


def length_of(gradient: Tensor) -> Tensor:
    """|g| at every position: (1, c, h, w) -> (h, w), on CPU."""
    from dsconvert.base import loops  # numba takes a while to load

    found = torch.empty(gradient.shape[2:])
    loops.lengths(gradient[0].flatten(1).cpu().contiguous().numpy(), found.flatten().numpy())
    return found


def _sample(values: Tensor, gradient: Tensor, generator: torch.Generator, each: int) -> tuple[Tensor, Tensor]:
    """`each` values drawn half evenly and half by weight, the squared gradient, with weights that keep
    sum(weight * f(value)) unbiased; the two extremes besides, weighing nothing."""
    v, g = values.reshape(-1), gradient.reshape(-1)
    extremes = torch.stack(torch.aminmax(v))
    if v.numel() > SEARCHED:  # a large map is thinned out first, or the sums below would be all the work
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
