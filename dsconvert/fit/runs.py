"""Fitting VQK in runs of four (see `dsconv.runs`): nearest to a weight, and within GPTQ's loop."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.dsconv.runs import LONGEST, RUN, leaders, vectors
from dsconvert.dsconv.tensor import max_multiplier

Floats = NDArray[np.float64]

STARTS = (1.0, 0.8, 0.6)  # starting CDSw, as a share of the one at which no run is longer than the longest
ROUNDS = 3


def nearest_blocks(
    blocks: Tensor, padding: int, bits: int, starts: Sequence[float] = STARTS, rounds: int = ROUNDS
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight in blocks (cho, nblk, B, taps), the last block's last `padding` channels being none -> VQK in runs (like
    blocks), m (cho, nblk, 1, taps) and CDSw (cho,), all float64: locally the least squared error.

    Among all orders and signs of a leader, the nearest to some weights has their own (rearrangement inequality). So
    weights are sorted by size once, and all is compared in that order."""
    cho, nblk, size, taps = blocks.shape
    runs = blocks.numpy().transpose(0, 1, 3, 2).reshape(cho, nblk, taps, size // RUN, RUN)
    order = np.argsort(-np.abs(runs), -1, kind="stable")
    falling = np.take_along_axis(np.abs(runs), order, -1)
    real = np.ones((nblk, 1, size // RUN))
    if padding:
        real[-1, :, -(padding // RUN) :] = 0
    book, m_max = leaders(bits), max_multiplier(bits, runs=True)
    widest = np.sqrt(np.square(falling).sum(-1).max((1, 2, 3)) / LONGEST[bits]).clip(1e-12)
    best_error = np.full(cho, np.inf)
    best: tuple[Floats, ...] = (np.zeros_like(falling), np.ones((cho, nblk, taps)), np.ones(cho))
    for start in starts:
        cds = widest * start / m_max
        for _ in range(rounds):
            m, chosen = _nearest_leaders(falling / cds[:, None, None, None, None], real, book, m_max)
            integers = book[chosen] * (m[..., None] * real)[..., None]
            power, cross = np.square(integers).sum((1, 2, 3, 4)), (integers * falling).sum((1, 2, 3, 4))
            cds = np.where(cross > 0, cross / power, cds)
            error = np.square(falling - cds[:, None, None, None, None] * integers).sum((1, 2, 3, 4))
            better = error < best_error
            best_error = np.where(better, error, best_error)
            found = book[chosen], m, cds
            best = tuple(
                np.where(better.reshape(-1, *[1] * (new.ndim - 1)), new, old)
                for new, old in zip(found, best, strict=True)
            )
    values, m, cds = best
    vqk = np.empty_like(runs)
    np.put_along_axis(vqk, order, values, -1)
    vqk = np.copysign(vqk, runs).reshape(cho, nblk, taps, size).transpose(0, 1, 3, 2)
    return torch.from_numpy(vqk.copy()), torch.from_numpy(m[:, :, None]), torch.from_numpy(cds)


def _nearest_leaders(scaled: Floats, real: Floats, book: Floats, m_max: int) -> tuple[Floats, NDArray[np.intp]]:
    """Of every block the m of least error, (cho, nblk, taps), and with it the leader nearest to each run, (cho, nblk,
    taps, runs), for runs in falling order and steps of CDSw; those that are not `real` do not count."""
    flat, codes = scaled.reshape(-1, RUN), _codes(book)
    gain = np.full(scaled.shape[:3], -np.inf)
    m, chosen = np.ones(scaled.shape[:3]), np.zeros(scaled.shape[:-1], np.intp)
    for tried in range(1, m_max + 1):
        pick, reached = _most(flat / tried, codes)
        pick = pick.reshape(chosen.shape)
        reached = (reached.reshape(chosen.shape) * real).sum(-1) * tried**2  # of m^2 |x / m - l|^2
        better = reached > gain
        gain, m = np.where(better, reached, gain), np.where(better, tried, m)
        chosen = np.where(better[..., None], pick, chosen)
    return m, chosen


@dataclass(frozen=True)
class Factor:
    """A group's part (n, n) of the Cholesky factor, and for each of its runs the inverse of the run's own part (4, 4)
    and all vectors in the terms in which their errors count, as `_codes` has them."""

    upper: Floats
    back: list[Floats]
    codes: list[NDArray[np.float32]]

    @staticmethod
    def of(upper: Floats, bits: int) -> Factor:
        book = vectors(bits).astype(np.float64)
        own = [upper[j : j + RUN, j : j + RUN] for j in range(0, len(upper), RUN)]
        back = [np.linalg.inv(part).astype(np.float64) for part in own]
        return Factor(upper, back, [_codes(book @ b) for b in back])


def round_runs(w: Floats, cds: Floats, factor: Factor, bits: int) -> tuple[Floats, Floats, Floats]:
    """What `gptq._round_group` does, with VQK in runs: every four columns become the run of least error together.

    With U the run's part of the Cholesky factor, the errors to be made up for are (w - m CDSw v) U^-1 for a run v."""
    tried = np.arange(1.0, max_multiplier(bits, runs=True) + 1)
    steps = cds[:, None] * tried
    columns = np.repeat(w.T[..., None], len(tried), -1)  # (n, cho, m)
    integers, errors = np.empty_like(columns), np.empty_like(columns)
    book = vectors(bits).astype(np.float64)
    for j, back, codes in zip(range(0, len(columns), RUN), factor.back, factor.codes, strict=True):
        own = slice(j, j + RUN)
        wanted = (columns[own] / steps).reshape(RUN, -1).T
        found = book[_most(wanted @ back, codes)[0]]
        integers[own] = found.T.reshape(RUN, *steps.shape)
        errors[own] = ((wanted - found) @ back).T.reshape(RUN, *steps.shape) * steps
        after = factor.upper[own, j + RUN :].T @ errors[own].reshape(RUN, -1)
        columns[j + RUN :] -= after.reshape(-1, *steps.shape)
    return least_of(tried, integers, errors)


def least_of(tried: Floats, integers: Floats, errors: Floats) -> tuple[Floats, Floats, Floats]:
    """Of each output channel the m of least squared error: m (cho,), integers and errors (cho, n), given all m that
    were tried and both with each of them (n, cho, m)."""
    best = np.square(errors).sum(0).argmin(-1)
    channels = np.arange(len(best))
    return tried[best], integers[:, channels, best].T, errors[:, channels, best].T


def _codes(book: Floats) -> NDArray[np.float32]:
    """Vectors c (k, 4) beside -|c|^2 / 2 (k, 5), turned around: what `_most` multiplies by."""
    return np.hstack((book, -np.square(book).sum(1, keepdims=True) / 2)).T.astype(np.float32, order="C")


def _most(wanted: Floats, codes: NDArray[np.float32]) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which of the `_codes` is nearest to each of wanted (n, 4), and w . c - |c|^2 / 2 of it, which is then largest as
    |w - c|^2 = |w|^2 - 2 (w . c - |c|^2 / 2)."""
    given = np.ones((len(wanted), RUN + 1), np.float32)
    given[:, :RUN] = wanted
    scores = np.empty((len(given), codes.shape[1]), np.float32)
    # numpy's threads for matrix products and torch's get in each other's way
    torch.mm(torch.from_numpy(given), torch.from_numpy(codes), out=torch.from_numpy(scores))
    pick = scores.argmax(-1)
    return pick, scores[np.arange(len(pick)), pick]
