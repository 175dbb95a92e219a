"""Find VQK along a trellis (see `trellis_table`): the nearest to a weight, or the ones that GPTQ's loop rounds to.

At each weight, the window is the last eight bits of the string, and decides VQK. The state is the part of the window
that the next window still contains. Of all strings that lead to one state, only the best can be part of the best string
(Viterbi, IEEE Transactions on Information Theory 13, 1967). So the search follows one string for each state.
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

AHEAD = 24  # columns of later groups that are searched before a group's string is decided
NEAR = 1  # how many m are tried on each side of the m that suits a group
# starting CDSw, as shares of the one that suits the largest block
SHARES = (1.3, 1.15, 1.0, 0.87, 0.75, 0.65, 0.56, 0.48)
MOST = 1 << 26  # most windows in memory at once


def most_m(bits: int) -> int:
    """Return the largest m at which two neighbouring m * VQK never exceed PAIR_MAX together."""
    return max(1, min(M_MAX, PAIR_MAX // 2 // largest(bits)))


@dataclass(frozen=True)
class Register:
    """The shift register of a trellis: window w follows state w >> bits and leads to state w % states.

    values: VQK by window, (256,) float32.
    """

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
    """Return rising root mean squares of numbers, and the mean squared error of the string nearest to such numbers.

    The numbers are random, with tails between a Gaussian's and a Laplacian's, as weights have them.
    """
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
    """Return for blocks the m of least expected error, and the expected mean squared error.

    rms: the blocks' root mean squares (cho, ...); both results have this shape.
    cds: CDSw, (cho,).
    """
    from dsconvert.base import loops  # numba takes a while to import

    given = np.ascontiguousarray(rms.reshape(len(rms), -1)), np.ascontiguousarray(cds), most_m(bits)
    m, errors = np.empty(given[0].shape), np.empty(given[0].shape)
    shared(len(rms), lambda first, last: loops.suit(first, last, *given, *noise(bits), m, errors))
    return m.reshape(rms.shape), errors.reshape(rms.shape)


def starting(rms: Floats, bits: int) -> Floats:
    """Return CDSw (cho,) of least expected error, for blocks of these root mean squares (cho, blocks)."""
    levels, errors = noise(bits)
    own = levels[(errors / np.square(levels)).argmin()]  # the root mean square that loses least relative to itself
    widest = rms.max(1).clip(1e-12) / own / most_m(bits)
    best, found = np.full(len(rms), np.inf), widest
    for share in SHARES:
        cds = widest * share
        error = suited(rms, cds, bits)[1].mean(1)
        found, best = np.where(error < best, cds, found), np.minimum(error, best)
    return found


def nearest(strings: Tensor, size: int, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Round weights to strings near the least squared error.

    strings: (cho, K), of which `size` neighbours share an m.

    Returns codes, uint8 (cho, K), m (cho, K / size) and CDSw (cho,), both float64.
    """
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
    # for fixed integers the best CDSw is <W, I> / <I, I>
    cross, power = (strings.double() * made).sum(1), made.square().sum(1)
    fitted = torch.where((cross > 0) & (power > 0), cross / power.clamp_min(1e-30), torch.from_numpy(start))
    return torch.cat(codes), m, fitted


def nearest_values(wanted: Tensor, m: Tensor, trellis: Register) -> tuple[Tensor, Tensor]:
    """Return codes, uint8, and VQK, float32, both (n, K), that minimise sum m^2 (wanted - VQK)^2.

    wanted, m: (n, K).
    """
    from dsconvert.base import loops  # numba takes a while to import

    windows = torch.empty(wanted.shape, dtype=torch.uint8)
    given = (wanted.contiguous().numpy(), m.contiguous().numpy(), trellis.values.numpy(), trellis.bits, windows.numpy())
    shared(len(wanted), lambda first, last: loops.nearest_windows(first, last, *given))
    return _code(windows, trellis), trellis.values[windows.long()]


def _code(windows: Tensor, trellis: Register) -> Tensor:
    """Return the bits that each window adds to the string."""
    return (windows & (1 << trellis.bits) - 1).to(torch.uint8)


def round_strings(target: Floats, cds: Floats, upper: Floats, size: int, bits: int) -> tuple[Tensor, Tensor]:
    """Run GPTQ's loop over a target in strings.

    target: (cho, K), of which `size` neighbours share an m.
    cds: CDSw, (cho,).
    upper: (K, K), the upper Cholesky factor of H^-1 in that order.

    Returns codes, uint8 (cho, K), and m (groups, cho).
    """
    from dsconvert.base import loops  # numba takes a while to import

    w, scale, factor = (np.array(x, np.float32, order="C") for x in (target, cds, upper))
    codes, chosen = np.empty(w.shape, np.uint8), np.empty((len(w), -(-w.shape[1] // size)))
    rules = (size, AHEAD, NEAR, most_m(bits), bits, Register.of(bits).values.numpy(), *noise(bits))
    shared(len(w), lambda first, last: loops.round_strings(first, last, w, scale, factor, *rules, codes, chosen))
    return torch.from_numpy(codes), torch.from_numpy(chosen).T
