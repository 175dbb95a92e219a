"""The training loop: epochs of batches, a measurement after each, and the best epoch kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import Graph
from dsconvert.tune.augment import Augment
from dsconvert.tune.latents import PACE, Latents, Layer, hold
from dsconvert.tune.loss import Gains, detection_loss
from dsconvert.tune.photos import Photos, order
from dsconvert.tune.schedule import follow, rate_share
from dsconvert.tune.simulate import simulate
from dsconvert.tune.state import State
from dsconvert.yolo.decode import whole_maps
from dsconvert.yolo.network import Head

STEEPEST = 10.0  # longer gradients are shortened to this norm


@dataclass(frozen=True)
class Plan:
    """How to train.

    epochs: at most.
    batch: images in a batch, over all processes.
    rate: learning rate of CDSw's factor.
    warmup: in epochs.
    patience: epochs without a better mAP after which training stops.
    seed: of all random choices.
    augment: how images are augmented.
    """

    epochs: int
    batch: int
    rate: float
    warmup: float
    patience: int
    seed: int
    augment: Augment


@dataclass(frozen=True)
class Student:
    """The network that is trained, apart from what learns.

    grids: activation grids, as `simulate` takes them.
    """

    graph: Graph
    layers: Mapping[str, Layer]
    grids: Mapping[str, QParams]
    head: Head
    device: str

    def loss(self, latents: Latents, images: Tensor, targets: Tensor, gains: Gains) -> Tensor:
        """Return this process's part of the batch's loss; the parts of all processes add up to the whole."""
        parts = {name: layer.parts(name, latents) for name, layer in self.layers.items()}
        x = images.to(self.device).contiguous(memory_format=torch.channels_last)  # a fifth faster on CPUs
        raw = whole_maps(simulate(self.graph, parts, self.grids, x), self.head)
        pixels = torch.tensor(self.head.anchors, device=self.device)
        anchors = pixels / torch.tensor(self.head.strides, device=self.device)[:, None, None]
        return detection_loss(raw, targets.to(self.device), anchors, self.head.nc, gains, workers.summed)


def train(
    student: Student,
    photos: Photos,
    plan: Plan,
    state: State,
    measure: Callable[[Latents], float],
    report: Callable[[int, int], None],
    after_epoch: Callable[[State], None],
) -> None:
    """Train until the plan ends, updating `state`.

    measure: returns the mAP of the model that latents stand for.
    report: called with the batches done and of the epoch.
    after_epoch: called with the state after every epoch, and once before the first.

    Raises InputError when the loss is no longer finite.
    """
    if not state.log:
        state.log.append({"map50_95": measure(state.average)})
        after_epoch(state)
    gains = Gains.usual(student.head.nc, photos.size)
    optimiser = _optimiser(state)
    while len(state.log) <= plan.epochs and len(state.log) - 1 - state.best_epoch < plan.patience:
        epoch = len(state.log)
        batches = order(len(photos), plan.batch, [plan.seed, epoch])
        losses = []
        for number, picks in enumerate(batches):
            mine = picks[workers.share(len(picks))]
            images, targets = photos.batch(mine, plan.augment, [plan.seed, epoch])
            share = rate_share(state.steps, plan.epochs * len(batches), round(plan.warmup * len(batches)))
            loss = student.loss(state.latents, images, targets, gains)
            optimiser.zero_grad()
            loss.backward()
            sum_gradients(list(state.latents.values()))
            torch.nn.utils.clip_grad_norm_(state.latents.values(), STEEPEST)
            for group in optimiser.param_groups:
                group["lr"] = plan.rate * share * group["pace"]
            optimiser.step()
            hold(student.layers, state.latents)
            state.steps += 1
            follow(state.average, state.latents, state.steps)
            losses.append(float(workers.summed(loss.detach().cpu())))
            if not torch.isfinite(torch.tensor(losses[-1])):
                raise InputError.naming("The loss is no longer finite in epoch {}; try a smaller {rate}.", epoch)
            report(number + 1, len(batches))
        _note_moments(optimiser, state)
        state.log.append({"map50_95": measure(state.average), "loss": sum(losses) / len(losses)})
        if state.best_epoch == epoch:
            state.best = {k: v.clone() for k, v in state.average.items()}
        after_epoch(state)


def _optimiser(state: State) -> torch.optim.Adam:
    """Return Adam with one group for each kind of latent, continuing with the state's moments."""
    groups = [
        {"params": [u for k, u in state.latents.items() if k.endswith(f".{part}")], "pace": pace}
        for part, pace in PACE.items()
    ]
    optimiser = torch.optim.Adam([g for g in groups if g["params"]])
    if state.steps:
        for key, u in state.latents.items():
            optimiser.state[u] = {
                "step": torch.tensor(float(state.steps)), "exp_avg": state.first[key], "exp_avg_sq": state.second[key],
            }  # fmt: skip
    return optimiser


def _note_moments(optimiser: torch.optim.Adam, state: State) -> None:
    """Copy the optimizer's moments to the state."""
    for key, u in state.latents.items():
        state.first[key], state.second[key] = optimiser.state[u]["exp_avg"], optimiser.state[u]["exp_avg_sq"]


def sum_gradients(latents: Sequence[Tensor]) -> None:
    """Add up the gradients of all processes, which are each divided by the whole batch's counts already."""
    if workers.count() == 1:
        return
    summed = workers.summed(torch.cat([u.grad.flatten().cpu() for u in latents if u.grad is not None]))
    for u, part in zip(latents, summed.split([u.numel() for u in latents]), strict=True):
        u.grad = part.view_as(u).to(u.device)
