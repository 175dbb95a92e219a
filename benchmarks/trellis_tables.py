"""Make the tables of `dsconvert.dsconv.codes.trellis_table`: which integer stands for which eight bits.

    python benchmarks/trellis_tables.py

takes about three minutes on one thread, and prints them with the error they leave of the numbers they are made for:
independent, of density exp(-|x / s|^p), with p between Laplace's 1 and Gauss's 2, as weights of networks have tails
between those two. A table starts from the numbers' quantiles in the order a w mod 256 for a window w, with the best odd
a, so that what can follow a state is spread evenly. It is then moved to the means of the numbers that it stands for,
and the best strings are searched anew, in turns (Lloyd's algorithm), in the end with integers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dsconvert.dsconv.codes.trellis_search import Register, nearest_values
from dsconvert.dsconv.codes.trellis_table import WINDOW, windows

SIZE = 1 << WINDOW
LENGTH, TEST = 64, 800  # numbers of a string; strings that judge
STEPS = np.linspace(0.5, 1.05, 23)  # of the integers, as shares of the one with which the largest value is `most`


@dataclass(frozen=True)
class Wanted:
    """bits of a number, p of its density, and the largest integer, which leaves m = 64 // most."""

    bits: int
    tails: float
    most: int


TABLES = (Wanted(1, 1.4, 7), Wanted(2, 1.4, 9), Wanted(3, 1.5, 12), Wanted(4, 1.6, 21))


def numbers(wanted: Wanted, count: int, seed: int) -> Tensor:
    """(count, LENGTH) of variance 1."""
    rng = np.random.default_rng(seed)
    p, shape = wanted.tails, (count, LENGTH)
    x = rng.gamma(1 / p, size=shape) ** (1 / p) * rng.choice((-1.0, 1.0), shape)
    return torch.from_numpy(x * math.sqrt(math.gamma(1 / p) / math.gamma(3 / p))).float()


def trellis(wanted: Wanted, table: Tensor) -> Register:
    """A trellis with any values (256,)."""
    return Register(wanted.bits, table.float())


def error(wanted: Wanted, table: Tensor, x: Tensor) -> float:
    """Mean squared error of the nearest strings."""
    return float((x - nearest_values(x, torch.ones_like(x), trellis(wanted, table))[1]).square().mean())


def moved(wanted: Wanted, table: Tensor, x: Tensor, rounds: int) -> Tensor:
    """The table after so many rounds of Lloyd's algorithm over numbers x."""
    for _ in range(rounds):
        code, _ = nearest_values(x, torch.ones_like(x), trellis(wanted, table))
        seen = windows(code, wanted.bits).flatten().long()
        sums, counts = torch.zeros(SIZE).index_add_(0, seen, x.flatten()), torch.bincount(seen, minlength=SIZE)
        table = torch.where(counts > 0, sums / counts.clamp_min(1), table)
    return table


def real_table(wanted: Wanted, x: Tensor, test: Tensor) -> Tensor:
    """(256,): the values before they are integers."""
    sample = numbers(wanted, 4096, 2).flatten().sort().values
    quantiles = sample[((torch.arange(SIZE) + 0.5) / SIZE * len(sample)).long()]
    quantiles = (quantiles - quantiles.flip(0)) / 2 * math.sqrt(1 - 4.0**-wanted.bits)
    starts = [quantiles[torch.arange(SIZE) * a % SIZE] for a in range(1, SIZE, 2)]
    starts.sort(key=lambda table: error(wanted, table, x[:80]))
    tables = [moved(wanted, table, x[: len(x) * 3 // 8], 40) for table in starts[:3]]
    return moved(wanted, min(tables, key=lambda table: error(wanted, table, test)), x, 15)


def integer_table(wanted: Wanted) -> tuple[Tensor, float]:
    """(256,) int8, and the error it leaves, dB."""
    x, test = numbers(wanted, 4000, 0), numbers(wanted, TEST, 1)
    real = real_table(wanted, x, test)
    best = (math.inf, real, 1.0)
    for step in (float(real.abs().max()) / wanted.most * STEPS).tolist():
        table = (real / step).round().clamp(-wanted.most, wanted.most)
        best = min(best, (error(wanted, table * step, test), table, step), key=lambda b: b[0])
    _, table, step = best
    for _ in range(6):
        table = (moved(wanted, table * step, x, 1) / step).round().clamp(-wanted.most, wanted.most)
        best = min(best, (error(wanted, table * step, test), table, step), key=lambda b: b[0])
    return best[1].to(torch.int8), 10 * math.log10(best[0])


def spelled(table: NDArray[np.int8]) -> str:
    """As it stands in `dsconvert.dsconv.codes.trellis_table`."""
    text = table.tobytes().hex()
    return "\n".join(f'        "{text[i : i + 112]}"' for i in range(0, len(text), 112))


def main() -> None:
    for wanted in TABLES:
        table, left = integer_table(wanted)
        print(f"    {wanted.bits}: (  # {left:.2f} dB\n{spelled(table.numpy())}\n    ),", flush=True)


if __name__ == "__main__":
    main()
