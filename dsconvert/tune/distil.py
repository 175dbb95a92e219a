"""The brief fine-tune behind the fit: the converted network learns from the float one, without labels.

The fit is made layer by layer. What is learned here are the real numbers it ends with, all layers at once: CDSw (or
alpha) as a factor, and CDSb. VQK and m stay as they are. The loss of an image is the squared error of v, the numbers of
`measure.outputs`, with every activation rounded to its grid. Some images are held back. They decide which
step is kept, and whether learning was of use at all: the fit stays where their error did not fall by more than its
standard error.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic

import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.base.threads import in_order
from dsconvert.graph.ir import ConvParams
from dsconvert.graph.run import run_float
from dsconvert.measure.outputs import Outputs
from dsconvert.model.model import Converted
from dsconvert.photos.entry import UNIT, Entry
from dsconvert.tune.latents import Latents, Model, Parts, learned, start
from dsconvert.tune.loop import sum_gradients
from dsconvert.tune.schedule import rate_share
from dsconvert.tune.simulate import simulate

IMAGES = 4  # a step
TURNS = 2  # how often each image is learned from, where nobody says how many steps
RATE = 2e-4  # of the factors of CDSw and alpha; falls by half a cosine
BIAS_RATE = 0.004  # of CDSb, in 255ths of the range of the layer's outputs
WARMUP = 10  # steps
FORGETTING = (0.9, 0.99)  # Adam's betas: there are too few steps for the usual second one
LOOK = 32  # steps between two looks at the images held back
WORTHWHILE = 0.5  # of the error is the weights', or nothing is learned
SEED = 7919  # apart from the draws of the fit

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pictures:
    """Where the images are: those that are learned from, and those held back."""

    count: int  # images to learn from, in all processes
    mine: range  # which of them this process has
    one: Callable[[int], Tensor]  # such an image (1, 3, h, w), 0..1, by its number here
    held: Sequence[Tensor]  # two or more images held back (3, h, w), uint8, the same in all processes
    entry: Entry = UNIT  # what the network reads of their bytes


@dataclass(frozen=True)
class Look:
    """How far learning has come at one look."""

    step: int  # 0: before
    held_back: float  # mean error of the images held back
    learning: float | None  # mean loss of the steps since the look before


@dataclass(frozen=True)
class Distilled(Generic[Model]):
    """What came of it."""

    model: Model
    curve: tuple[Look, ...]
    kept: int  # the step whose numbers the model has; 0: the fit's own
    gain: float  # mean fall of the error from the fit's to that of the best look
    uncertainty: float  # standard error of the gain over the images held back
    judges: int  # how many images these are
    activations: float  # mean error that rounded activations alone do there, which nothing here changes

    @property
    def tried(self) -> bool:
        """Whether anything was learned at all."""
        return len(self.curve) > 1


def distil(
    model: Model,
    params: Mapping[str, ConvParams],
    outputs: Outputs,
    pictures: Pictures,
    steps: int | None,
    seconds: float | None,
    seed: int,
    device: str,
    report: Progress,
) -> Distilled[Model]:
    """Learn from the float network `params` in so many steps, and stop after so many seconds (None: never).

    Without a number of steps every image is learned from in TURNS of them, and nothing is learned where activations do
    most of the error. All processes take their own images' part of every step, and end in the same model."""
    layers, latents = start(model, "shifts+bias", device)
    latents = {name: u for name, u in latents.items() if not name.endswith(".m")}
    teacher = {name: ConvParams(p.weight.to(device), p.bias.to(device)) for name, p in params.items()}
    unconverted = {name: _as_parts(p) for name, p in teacher.items()}
    errors = partial(_errors, model, teacher, outputs)

    def parts() -> Mapping[str, Parts]:
        return {name: layer.parts(name, latents) for name, layer in layers.items()}

    optimiser = _optimiser(model, teacher, latents, pictures.one(0))
    generator = torch.Generator().manual_seed(seed + SEED)
    held = [pictures.entry.real(image.to(device))[None] for image in pictures.held]

    def look(made: Mapping[str, Parts]) -> Tensor:
        with torch.no_grad():
            found = torch.stack(list(in_order(lambda x: errors(made, x).cpu(), held))).double()
        return workers.gathered(found)[0]  # all decide by the same numbers, whatever machines they are on

    first, floor = look(parts()), float(look(unconverted).mean())
    curve = [Look(0, float(first.mean()), None)]
    if steps is None:
        if curve[0].held_back - floor < WORTHWHILE * curve[0].held_back:
            return Distilled(model, tuple(curve), 0, 0.0, 0.0, len(held), floor)
        steps = -(-TURNS * pictures.count // IMAGES)
    best, kept, gains = _copied(latents), 0, torch.zeros_like(first)
    losses: list[float] = []
    began, order = time.monotonic(), list[int]()
    for step in range(1, steps + 1):
        if len(order) < IMAGES:
            order += torch.randperm(pictures.count, generator=generator).tolist()
        picks, order = order[:IMAGES], order[IMAGES:]
        losses.append(_step(lambda x: errors(parts(), x), latents, pictures, picks))
        share = rate_share(step - 1, steps, WARMUP)
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * share
        optimiser.step()
        report(step, steps)
        over = _over(began, seconds)
        if step % LOOK and step < steps and not over:
            continue
        found = look(parts())
        curve.append(Look(step, float(found.mean()), sum(losses) / len(losses)))
        losses = []
        if float(found.mean()) < float((first - gains).mean()):
            best, kept, gains = _copied(latents), step, first - found
        if over:
            break
    gain, uncertainty = float(gains.mean()), float(gains.std()) / len(gains) ** 0.5
    if gain <= uncertainty:
        best, kept = {}, 0
    made = learned(model, layers, best) if kept else model
    return Distilled(made, tuple(curve), kept, gain, uncertainty, len(held), floor)


def _as_parts(float_layer: ConvParams) -> Parts:
    """A float convolution in the form of a converted one."""
    w, b = float_layer.weight, float_layer.bias
    return Parts(w, torch.ones_like(w[:, :1]), torch.ones_like(b), b, w.shape[1])


def _errors(
    model: Converted, teacher: Mapping[str, ConvParams], outputs: Outputs, parts: Mapping[str, Parts], x: Tensor
) -> Tensor:
    """The squared error of v on an image (1, 3, h, w), with gradients to what the parts were made of."""
    with torch.no_grad():
        wanted = run_float(model.graph, teacher, x)
    made = simulate(model.graph, parts, model.activations, x)
    pairs = zip(*(outputs.measure(raw, wanted) for raw in (made, wanted)), strict=True)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


def _step(errors: Callable[[Tensor], Tensor], latents: Latents, pictures: Pictures, picks: Sequence[int]) -> float:
    """Leave the gradient of the mean loss of the images picked in every latent; returns that loss."""

    every = list(latents.values())

    def one(pick: int) -> tuple[Tensor, ...]:
        loss = errors(pictures.one(pick - pictures.mine.start))
        return (loss.detach(), *torch.autograd.grad(loss, every))

    sums = [every[0].new_zeros(()), *(torch.zeros_like(u) for u in every)]
    for found in in_order(one, [pick for pick in picks if pick in pictures.mine]):
        for whole, part in zip(sums, found, strict=True):
            whole += part / len(picks)
    for u, gradient in zip(every, sums[1:], strict=True):
        u.grad = gradient
    sum_gradients(every)
    return float(workers.summed(sums[0].cpu()))


def _optimiser(
    model: Converted, teacher: Mapping[str, ConvParams], latents: Latents, image: Tensor
) -> torch.optim.Optimizer:
    """Adam, with the rate of each latent: of a bias by the range of its layer's outputs on an image (1, 3, h, w)."""
    spans: dict[str, float] = {}

    def note(name: str, value: Tensor) -> None:
        if name in model.convs:
            spans[name] = float(value.max() - value.min()) / 255

    run_float(model.graph, teacher, image, note)
    ranges = workers.gathered(spans)[0]  # one process's image, for all
    rates = {k: BIAS_RATE * ranges[k.removesuffix(".cdsb")] if k.endswith(".cdsb") else RATE for k in latents}
    groups = [{"params": [u], "rate": rates[k], "lr": 0.0} for k, u in latents.items()]
    return torch.optim.Adam(groups, betas=FORGETTING)


def _over(began: float, seconds: float | None) -> bool:
    """Whether the time is over, in any process."""
    return seconds is not None and any(workers.gathered(time.monotonic() - began >= seconds))


def _copied(latents: Latents) -> Latents:
    return {name: u.detach().clone() for name, u in latents.items()}
