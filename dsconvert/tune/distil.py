"""Fine-tune the fitted model briefly: it learns from the float network, without labels.

The fit works layer by layer. Here the real numbers that it ends with learn for all layers at once: CDSw (or alpha), by
a factor, and CDSb. VQK and m stay as they are. The loss of an image is the squared error of v, the numbers of
`measure.outputs`, with every activation rounded to its grid.

Some images are held back. They decide which step is kept. They also decide whether learning helped at all: if their
error falls by no more than its standard error, the fitted model is kept.
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

IMAGES = 4  # in a step
TURNS = 2  # how often each image is used if no number of steps is given
RATE = 2e-4  # learning rate of the factors of CDSw and alpha; falls by half a cosine
BIAS_RATE = 0.004  # learning rate of CDSb, in 255ths of the range of the layer's outputs
WARMUP = 10  # steps
FORGETTING = (0.9, 0.99)  # Adam's betas; the usual second one, 0.999, is too slow for so few steps
LOOK = 32  # steps between two evaluations of the held-back images
WORTHWHILE = 0.5  # least share of the error that must come from the weights; otherwise nothing is learned
SEED = 7919  # a seed of its own, so that these draws differ from the fit's

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Pictures:
    """The images to learn from, and the images held back."""

    count: int  # images to learn from, of all processes
    mine: range  # which of them this process has
    one: Callable[[int], Tensor]  # returns this process's image of an index, (1, 3, h, w), 0..1
    held: Sequence[Tensor]  # at least two images (3, h, w), uint8, the same in all processes
    entry: Entry = UNIT  # how the network reads the held-back images' bytes


@dataclass(frozen=True)
class Look:
    """One evaluation of the held-back images."""

    step: int  # 0: before learning
    held_back: float  # mean error of the held-back images
    learning: float | None  # mean loss of the steps since the last evaluation


@dataclass(frozen=True)
class Distilled(Generic[Model]):
    """The result of the brief fine-tune."""

    model: Model
    curve: tuple[Look, ...]
    kept: int  # the step whose numbers the model has; 0: the fit's
    gain: float  # by how much the mean error fell from the fit to the best evaluation
    uncertainty: float  # standard error of the gain over the held-back images
    judges: int  # number of held-back images
    activations: float  # mean error on them of float weights with rounded activations, which learning does not change

    @property
    def tried(self) -> bool:
        """Whether any step was made."""
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
    """Learn from the float network in a number of steps, and return the better of the fitted and the learned model.

    model: the fitted model.
    params: the float network's weights.
    outputs: which numbers of the raw maps count.
    pictures: the images.
    steps: None: each image is used TURNS times, but nothing is learned if rounded activations cause most of the error.
    seconds: after which learning stops; None: never.
    seed: decides the order of images.
    device: where the network runs.
    report: called with the steps done and of all.

    Every process computes its own images' part of each step, and all end with the same model.
    """
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
        # all processes decide by the same numbers, though their machines may round differently
        return workers.gathered(found)[0]

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
    """Return a float convolution in the form of a converted one."""
    w, b = float_layer.weight, float_layer.bias
    return Parts(w, torch.ones_like(w[:, :1]), torch.ones_like(b), b, w.shape[1])


def _errors(
    model: Converted, teacher: Mapping[str, ConvParams], outputs: Outputs, parts: Mapping[str, Parts], x: Tensor
) -> Tensor:
    """Return the squared error of v on an image (1, 3, h, w), differentiable in what `parts` was made of."""
    with torch.no_grad():
        wanted = run_float(model.graph, teacher, x)
    made = simulate(model.graph, parts, model.activations, x)
    pairs = zip(*(outputs.measure(raw, wanted) for raw in (made, wanted)), strict=True)
    return torch.stack([(a - b).square().sum() for a, b in pairs]).sum()


def _step(errors: Callable[[Tensor], Tensor], latents: Latents, pictures: Pictures, picks: Sequence[int]) -> float:
    """Set every latent's gradient of the mean loss over the picked images, and return this loss."""

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
    """Return Adam with a learning rate for each latent.

    The rate of a bias is proportional to the range of its layer's outputs on an image (1, 3, h, w).
    """
    spans: dict[str, float] = {}

    def note(name: str, value: Tensor) -> None:
        if name in model.convs:
            spans[name] = float(value.max() - value.min()) / 255

    run_float(model.graph, teacher, image, note)
    ranges = workers.gathered(spans)[0]  # all processes use the range on the first one's image
    rates = {k: BIAS_RATE * ranges[k.removesuffix(".cdsb")] if k.endswith(".cdsb") else RATE for k in latents}
    groups = [{"params": [u], "rate": rates[k], "lr": 0.0} for k, u in latents.items()]
    return torch.optim.Adam(groups, betas=FORGETTING)


def _over(began: float, seconds: float | None) -> bool:
    """Return whether the time is over in any process."""
    return seconds is not None and any(workers.gathered(time.monotonic() - began >= seconds))


def _copied(latents: Latents) -> Latents:
    return {name: u.detach().clone() for name, u in latents.items()}
