"""Fitting VQK along a trellis (see `trellis_table`): nearest to a weight, and within GPTQ's loop.

A window is the last eight bits at a place, and decides VQK there; a state is what of it the next window keeps. Of all
strings that lead to one state, only the best can become part of the best (Viterbi, IEEE Transactions on Information
Theory 13, 1967), so as many strings as there are states are followed from weight to weight.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from dsconvert.base.threads import shared
from dsconvert.dsconv.codes.trellis_table import largest, table
from dsconvert.dsconv.format import M_MAX, PAIR_MAX, Floats

AHEAD = 24  # columns of later groups into which strings are followed before a group's best is chosen
NEAR = 1  # m tried on each side of the one that suits a group
SHARES = (1.3, 1.15, 1.0, 0.87, 0.75, 0.65, 0.56, 0.48)  # starting CDSw, as shares of what suits the largest block
MOST = 1 << 26  # windows that are remembered at once


def most_m(bits: int) -> int:
    """Largest m for which no two m * VQK can exceed PAIR_MAX together."""
    return max(1, min(M_MAX, PAIR_MAX // 2 // largest(bits)))


@dataclass(frozen=True)
class Register:
    """What can follow what: `values` (256,) float32 are VQK by window. Window w comes from state w >> bits and leads to
    state w % states."""

    bits: int
    values: Tensor

    @property
    def states(self) -> int:
        return len(self.values) >> self.bits

    @staticmethod
    @lru_cache
    def of(bits: int) -> Register:
        return Register(bits, torch.from_numpy(table(bits).astype(np.float32)))


@lru_cache
def noise(bits: int) -> tuple[Floats, Floats]:
    """Root mean squares of numbers, rising, and the mean squared error of the string nearest to such numbers."""
    rng = np.random.default_rng(0)
    size = rng.gamma(1 / 1.5, size=(32, 128)) ** (1 / 1.5) * rng.choice((-1.0, 1.0), (32, 128))
    numbers = torch.from_numpy(size / np.sqrt(np.square(size).mean())).float()
    spread = float(np.square(table(bits).astype(np.float64)).mean() ** 0.5)
    levels: Floats = spread * 1.12 ** np.arange(-16, 9, dtype=np.float64)
    trellis = Register.of(bits)
    errors = []
    for level in levels:
        wanted = numbers * float(level)
        errors.append(float((wanted - nearest_values(wanted, torch.ones_like(wanted), trellis)[1]).square().mean()))
    return levels, np.array(errors, np.float64)


def suited(rms: Floats, cds: Floats, bits: int) -> tuple[Floats, Floats]:
    """For blocks of that root mean square (cho, ...) and CDSw (cho,): the m of least expected error, and that mean
    squared error, both like rms."""
    from dsconvert.base import loops  # numba takes a while to load

    given = np.ascontiguousarray(rms.reshape(len(rms), -1)), np.ascontiguousarray(cds), most_m(bits)
    m, errors = np.empty(given[0].shape), np.empty(given[0].shape)
    shared(len(rms), lambda first, last: loops.suit(first, last, *given, *noise(bits), m, errors))
    return m.reshape(rms.shape), errors.reshape(rms.shape)


def starting(rms: Floats, bits: int) -> Floats:
    """For blocks of that root mean square (cho, blocks): CDSw (cho,) of least expected error."""
    levels, errors = noise(bits)
    own = levels[(errors / np.square(levels)).argmin()]  # of the numbers that suit the trellis best
    widest = rms.max(1).clip(1e-12) / own / most_m(bits)
    best, found = np.full(len(rms), np.inf), widest
    for share in SHARES:
        cds = widest * share
        error = suited(rms, cds, bits)[1].mean(1)
        found, best = np.where(error < best, cds, found), np.minimum(error, best)
    return found


def nearest(strings: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weights in strings (cho, K), `size` of which share an m -> codes uint8 (cho, K), m (cho, K / size) and CDSw
    (cho,), both float64: near the least squared error."""
    rms = strings.double().unflatten(1, (-1, size)).square().mean(-1).sqrt().numpy()
    start = starting(rms, bits)
    m = torch.from_numpy(suited(rms, start, bits)[0])
    spread = m.repeat_interleave(size, 1)
    trellis, codes, integers = Register.of(bits), [], []
    for rows in torch.arange(len(strings)).split(max(1, MOST // (strings.shape[1] * trellis.states))):
        wanted = strings[rows].double() / (torch.from_numpy(start)[rows, None] * spread[rows])
        code, vqk = nearest_values(wanted.float(), spread[rows].float(), trellis)
        codes.append(code)
        integers.append(vqk)
    made = torch.cat(integers).double() * spread
    cross, power = (strings.double() * made).sum(1), made.square().sum(1)
    fitted = torch.where((cross > 0) & (power > 0), cross / power.clamp_min(1e-30), torch.from_numpy(start))
    return torch.cat(codes), m, fitted


def nearest_values(wanted: Tensor, m: Tensor, trellis: Register) -> tuple[Tensor, Tensor]:
    """Codes uint8 and VQK float32, both (n, K), of least `sum m^2 (wanted - VQK)^2` for wanted and m (n, K)."""
    from dsconvert.base import loops  # numba takes a while to load

    windows = torch.empty(wanted.shape, dtype=torch.uint8)
    given = (wanted.contiguous().numpy(), m.contiguous().numpy(), trellis.values.numpy(), trellis.bits, windows.numpy())
    shared(len(wanted), lambda first, last: loops.nearest_windows(first, last, *given))
    return _code(windows, trellis), trellis.values[windows.long()]


def _code(windows: Tensor, trellis: Register) -> Tensor:
    return (windows & (1 << trellis.bits) - 1).to(torch.uint8)


def round_strings(target: Floats, cds: Floats, upper: Floats, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """GPTQ's loop over a target (cho, K) in strings, `size` columns of which share an m, given the Cholesky factor of
    H^-1 in that order (K, K) and CDSw (cho,): codes uint8 (cho, K) and m (groups, cho)."""
    from dsconvert.base import loops  # numba takes a while to load

    w, scale, factor = (np.array(x, np.float32, order="C") for x in (target, cds, upper))
    codes, chosen = np.empty(w.shape, np.uint8), np.empty((len(w), -(-w.shape[1] // size)))
    rules = (size, AHEAD, NEAR, most_m(bits), bits, Register.of(bits).values.numpy(), *noise(bits))
    shared(len(w), lambda first, last: loops.round_strings(first, last, w, scale, factor, *rules, codes, chosen))
    return torch.from_numpy(codes), torch.from_numpy(chosen).T
