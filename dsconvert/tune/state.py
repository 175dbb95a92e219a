"""The state of a training, and the file that keeps it when training is stopped."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from dsconvert.base.files import write_atomic
from dsconvert.base.sealed import resumed, sealed
from dsconvert.tune.latents import Latents

NAME = "finetuning.safetensors"
META = "dsconvert.finetuning"
SETS = ("latents", "average", "best", "first", "second")
FACTORS = (".cdsw", ".m", ".alpha")  # latents of these kinds are exponents of a factor
MOST_CHANGE, MOST_NUMBER = 60.0, 1e30


@dataclass
class State:
    """The state after whole epochs.

    latents: the current ones.
    average: their moving average.
    best: the best average so far, by mAP.
    first, second: the optimizer's moments.
    steps: of the optimizer so far.
    log: `map50_95` and `loss` of each epoch; entry 0 is before training and has no loss.
    """

    latents: Latents
    average: Latents
    best: Latents
    first: Latents
    second: Latents
    steps: int = 0
    log: list[dict[str, float]] = field(default_factory=list)

    @staticmethod
    def new(latents: Latents) -> State:
        """Return the state before the first step."""
        average, best, first, second = (
            {k: torch.zeros_like(v.detach()) for k, v in latents.items()} for _ in SETS[1:]
        )  # fmt: skip
        return State(latents, average, best, first, second)

    @property
    def best_epoch(self) -> int:
        """The epoch with the highest mAP, the first of equals; 0 if none was better than before training."""
        maps = [entry["map50_95"] for entry in self.log]
        return maps.index(max(maps))


def write_state(path: Path, key: str, state: State) -> None:
    """Write the state to a file, replacing an earlier one."""
    tensors: dict[str, Tensor] = {}
    for name in SETS:
        tensors |= {f"{name}/{k}": v for k, v in getattr(state, name).items()}
    about = {"key": key, "steps": state.steps, "log": state.log}
    write_atomic(path, sealed(tensors, META, about), force=True)


def read_state(path: Path, key: str, like: Latents) -> State:
    """Read what `write_state` wrote, to the devices of `like`.

    Raises InputError when there is no file, or it belongs to a run with another key.
    """
    deciding = "options, images, labels, classes, model, threads, processes or version"
    with resumed(path, META, key, deciding) as (about, tensors):
        state = State.new(like)
        for name in SETS:
            found = {k: tensors[f"{name}/{k}"].to(v.device) for k, v in like.items()}
            if any(found[k].shape != v.shape for k, v in like.items()):
                raise ValueError(name)
            setattr(state, name, found)
        state.steps, state.log = int(about["steps"]), list(about["log"])
        _check(state)
        for value in state.latents.values():
            value.requires_grad_()
    return state


def _check(state: State) -> None:
    """Raise ValueError, TypeError or KeyError for a state that no training can have."""
    for name in ("latents", "average", "best"):
        for key, value in getattr(state, name).items():
            most = MOST_CHANGE if key.endswith(FACTORS) else MOST_NUMBER
            if value.dtype != torch.float32 or not bool((value.abs() <= most).all()):
                raise ValueError(f"{name} of {key}")
    for key, first in state.first.items():
        second = state.second[key]
        if not first.dtype == second.dtype == torch.float32 or not bool((first.isfinite() & (second >= 0)).all()):
            raise ValueError(f"moments of {key}")
    if state.steps < 0 or not state.log or not all(math.isfinite(v) for entry in state.log for v in entry.values()):
        raise ValueError("log")
    if not all(0 <= entry["map50_95"] <= 1 and ("loss" in entry) == (i > 0) for i, entry in enumerate(state.log)):
        raise ValueError("log")
