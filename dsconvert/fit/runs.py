"""Fitting VQK in runs of four (see `dsconv.runs`): nearest to a weight, and within GPTQ's loop."""

from __future__ import annotations

from collections.abc import Sequence

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
    flat = scaled.reshape(-1, RUN)
    gain = np.full(scaled.shape[:3], -np.inf)
    m, chosen = np.ones(scaled.shape[:3]), np.zeros(scaled.shape[:-1], np.intp)
    for tried in range(1, m_max + 1):
        pick, reached = _most(flat / tried, book)
        pick = pick.reshape(chosen.shape)
        reached = (reached.reshape(chosen.shape) * real).sum(-1) * tried**2  # of m^2 |x / m - l|^2
        better = reached > gain
        gain, m = np.where(better, reached, gain), np.where(better, tried, m)
        chosen = np.where(better[..., None], pick, chosen)
    return m, chosen


def round_group(w: Floats, upper: Floats, cds: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """What `gptq._round_group` does, with VQK in runs: every four columns become the run of least error together.

    With U the run's part of the Cholesky factor, the errors to be made up for are (w - m CDSw v) U^-1 for a run v."""
    tried = np.arange(1.0, max_multiplier(bits, runs=True) + 1)
    steps = cds[..., None] * tried
    columns = np.repeat(np.moveaxis(w, -1, 0)[..., None], len(tried), -1)  # (n, starts, cho, m)
    integers, errors = np.empty_like(columns), np.empty_like(columns)
    book = vectors(bits).astype(np.float64)
    for j in range(0, len(columns), RUN):
        own = slice(j, j + RUN)
        back = np.linalg.inv(upper[own, own])
        wanted = np.moveaxis(columns[own], 0, -1) / steps[..., None] @ back
        codes = book @ back
        pick = _most(wanted.reshape(-1, RUN), codes)[0].reshape(steps.shape)
        integers[own] = np.moveaxis(book[pick], -1, 0)
        errors[own] = np.moveaxis((wanted - codes[pick]) * steps[..., None], -1, 0)
        columns[j + RUN :] -= np.einsum("ij,i...->j...", upper[own, j + RUN :], errors[own])
    best = np.square(errors).sum(0).argmin(-1)[..., None]
    integers, errors = (np.take_along_axis(v, best[None], -1)[..., 0] for v in (integers, errors))
    return tried[best[..., 0]], np.moveaxis(integers, 0, -1), np.moveaxis(errors, 0, -1)


def _most(wanted: Floats, codes: Floats) -> tuple[NDArray[np.intp], NDArray[np.float32]]:
    """Which of codes (k, 4) is nearest to each of wanted (n, 4), and w . c - |c|^2 / 2 of it, which is then largest."""
    # |w - c|^2 = |w|^2 - 2 (w . c - |c|^2 / 2), and what is in brackets is one product
    against = np.hstack((codes, -np.square(codes).sum(1, keepdims=True) / 2)).astype(np.float32)
    given = np.hstack((wanted, np.ones((len(wanted), 1)))).astype(np.float32)
    scores = given @ against.T
    pick = scores.argmax(-1)
    return pick, scores[np.arange(len(pick)), pick]
