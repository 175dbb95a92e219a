"""The fit's loops as they were before they were compiled, in torch and numpy: what `dsconvert.base.loops` must equal,
bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.dsconv.codes import FREE, TRELLIS
from dsconvert.dsconv.codes.trellis_search import AHEAD, NEAR, noise
from dsconvert.dsconv.codes.trellis_table import WINDOW, table

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Trellis:
    """What can follow what: `values` (states, 2^bits) float32 are VQK of the windows that go on from a state. Window
    w comes from state w >> bits and leads to state w % states."""

    bits: int
    states: int
    values: Tensor
    every: Tensor  # (states,): each state's number

    @staticmethod
    @lru_cache
    def of(bits: int) -> Trellis:
        states = 1 << (WINDOW - bits)
        values = torch.from_numpy(table(bits).astype(np.float32)).reshape(states, -1)
        return Trellis(bits, states, values, torch.arange(states))

    def step(self, cost: Tensor) -> tuple[Tensor, Tensor]:
        """cost (n, states, 2^bits) of all windows -> the least by which each state is reached, (n, states), and the
        window of it."""
        into = cost.reshape(len(cost), -1, self.states)
        least, first = into.min(1)
        return least, first.mul_(self.states).add_(self.every)

    def back(self, windows: Tensor, state: Tensor) -> Tensor:
        """From windows (K, n, states) uint8 by which each state was reached, and the last state (n,): the n best
        windows at each place, (K, n) int64."""
        rows, found = torch.arange(len(state)), torch.empty(windows.shape[:2], dtype=torch.int64)
        for t in reversed(range(len(windows))):
            found[t] = windows[t, rows, state]
            state = found[t] >> self.bits
        return found


def nearest_values(wanted: Tensor, m: Tensor, trellis: Trellis) -> tuple[Tensor, Tensor]:
    """Codes uint8 and VQK float32, both (n, K), of least `sum m^2 (wanted - VQK)^2` for wanted and m (n, K)."""
    count, length = wanted.shape
    cost = torch.full((count, trellis.states), torch.inf)
    cost[:, 0] = 0
    seen = torch.empty(length, count, trellis.states, dtype=torch.uint8)
    for t in range(length):
        error = (wanted[:, t, None, None] - trellis.values).mul_(m[:, t, None, None]).square_()
        cost, window = trellis.step(error.add_(cost[:, :, None]))
        seen[t] = window
    found = trellis.back(seen, cost.argmin(1)).T
    return _code(found, trellis), trellis.values.flatten()[found]


def _code(windows: Tensor, trellis: Trellis) -> Tensor:
    return (windows & (1 << trellis.bits) - 1).to(torch.uint8)


def follow(
    columns: Tensor, upper: Tensor, tried: Tensor, after: Tensor, own: int, state: Tensor, trellis: Trellis
) -> tuple[Tensor, Tensor]:
    """Of each output channel the string and m that add least to J: m (cho,) and windows (cho, own) int64.

    columns (cho, n) are in steps of CDSw, of a group's `own` columns and some of the next group's, which would have m
    `after`; `tried` (cho, count) are the group's m, `state` (cho,) where its strings begin. Every string that is
    followed carries the columns still to come, moved by its own errors."""
    cho, count = tried.shape
    rows, states, length = cho * count, trellis.states, columns.shape[1]
    waiting = (columns[:, None] / tried[:, :, None]).reshape(rows, 1, length).expand(-1, states, -1)
    waiting = waiting.reshape(rows * states, length)
    later = (after[:, None] / tried).reshape(rows, 1, 1) * trellis.values
    cost = torch.full((rows, states), torch.inf)
    cost[torch.arange(rows), state.repeat_interleave(count)] = 0
    seen = torch.empty(length, rows, states, dtype=torch.uint8)
    base = (torch.arange(rows) * states)[:, None]
    for j, factor in enumerate((1 / upper.diagonal()).tolist()):
        error = waiting[:, 0].reshape(rows, states, 1) - (trellis.values if j < own else later)
        cost, window = trellis.step(torch.add(cost[:, :, None], error.square(), alpha=factor * factor))
        seen[j] = window
        if j + 1 < length:
            spent = error.flatten(1).gather(1, window).reshape(-1, 1)
            waiting = waiting[:, 1:].index_select(0, (window >> trellis.bits).add_(base).flatten())
            waiting.addcmul_(spent, upper[j, j + 1 :], value=-factor)
    least, last = cost.min(1)
    pick = (least.reshape(cho, count) * tried.square()).argmin(1)
    best = torch.arange(cho) * count + pick
    windows = trellis.back(seen[:, best], last[best])[:own].T
    return tried[torch.arange(cho), pick], windows


def round_group(w: Floats, cds: Floats, upper: Floats, bits: int) -> tuple[Floats, Floats, Floats]:
    """One group's columns w (cho, n) rounded with every m, given their part of the Cholesky factor; of each output
    channel the m of least J: m (cho,), VQK and the errors to be made up for by later columns, both (cho, n).

    Those errors are in units of what the later columns leave, so what a group adds to J is the sum of their squares.
    In numpy: most of the fit's time is spent here on a few numbers at once, and torch takes five times as long to get
    to them."""
    low, high = FREE.limits(bits)
    tried = np.arange(1.0, FREE.most_m(bits) + 1)
    steps = cds[:, None] * tried
    columns = np.repeat(w.T[..., None], len(tried), -1)
    integers, errors = np.empty_like(columns), np.empty_like(columns)
    for j, (column, integer, error) in enumerate(zip(columns, integers, errors, strict=True)):
        np.rint(column / steps, out=integer)
        np.maximum(integer, low, out=integer)
        np.minimum(integer, high, out=integer)
        np.subtract(column, steps * integer, out=error)
        error /= upper[j, j]
        columns[j + 1 :] -= upper[j, j + 1 :, None, None] * error
    best = np.square(errors).sum(0).argmin(-1)
    channels = np.arange(len(best))
    return tried[best], integers[:, channels, best].T, errors[:, channels, best].T


def round_strings(target: Floats, cds: Floats, upper: Floats, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ's loop over a target (cho, K) in strings, `size` columns of which share an m, given the Cholesky factor of
    H^-1 in that order (K, K) and CDSw (cho,): codes uint8 (cho, K) and m (groups, cho)."""
    w, scale, factor = (torch.from_numpy(x).float() for x in (target, cds, upper))
    trellis = Trellis.of(bits)
    state = torch.zeros(len(w), dtype=torch.int64)
    codes, chosen = [], []
    for first, last in pairwise([*range(0, w.shape[1], size), w.shape[1]]):
        end = min(last + AHEAD, w.shape[1])
        own, after = (_suited(w[:, a : a + size], scale, bits) for a in (first, last if end > last else first))
        tried = around(own, TRELLIS.most_m(bits))
        part = factor[first:end, first:end]
        m, windows = follow(w[:, first:end] / scale[:, None], part, tried, after, last - first, state, trellis)
        state = windows[:, -1] % trellis.states
        vqk = trellis.values.flatten()[windows]
        for j in range(first, last):
            left = w[:, j] - (scale * m) * vqk[:, j - first]
            w[:, j + 1 :].addcmul_((left / factor[j, j])[:, None], factor[j, j + 1 :], value=-1)
        codes.append(_code(windows, trellis))
        chosen.append(m)
    return torch.cat(codes, 1), torch.stack(chosen).double()


def _suited(columns: Tensor, cds: Tensor, bits: int) -> Tensor:
    """The m (cho,) that suits columns (cho, n)."""
    rms = columns.double().square().mean(1).sqrt().numpy()
    return torch.from_numpy(suited(rms, cds.double().numpy(), bits)[0]).float()


def suited(rms: Floats, cds: Floats, bits: int) -> tuple[Floats, Floats]:
    """For blocks of that root mean square (cho, ...) and CDSw (cho,): the m of least expected error, and that mean
    squared error, both like rms."""
    tried = np.arange(1.0, TRELLIS.most_m(bits) + 1)
    steps = cds.reshape(-1, *[1] * rms.ndim) * tried
    errors = expected(rms[..., None] / steps, bits) * np.square(steps)
    return tried[errors.argmin(-1)], errors.min(-1)


def expected(rms: Floats, bits: int) -> Floats:
    """Mean squared error of numbers of that root mean square, by `noise`; what is larger than its largest is cut."""
    levels, errors = noise(bits)
    beyond = np.square(np.maximum(rms - levels[-1], 0))
    return np.interp(rms, levels, errors) + beyond


def around(m: Tensor, most: int) -> Tensor:
    """m (cho,) -> those to try (cho, count): all of few, else the nearest ones that exist."""
    count = min(most, 2 * NEAR + 1)
    lowest = (m - NEAR).clamp(1, most - count + 1)
    return lowest[:, None] + torch.arange(count)
