"""VQK in runs: four neighbouring input channels of one tap stored as one number.

At 2 and 3 bits, four VQK that are each free take the 256 or 4096 corners and insides of a cube. Most of a cube's
corners are vectors no weights look like, and its points are not as evenly spread as they could be. In runs the VQK are
instead the integer vectors of odd sum whose squares sum to at most 9 (there are exactly 256 of them), or to at most 39
(3992): a ball cut from the lattice D4 around a hole of it (Conway and Sloane, Sphere Packings, Lattices and Groups,
chapters 4 and 20). For Gaussian weights that is 1.6 dB (2 bits) and 1.3 dB (3 bits) less error from the same bytes.
At 1 bit, for large layers on which little depends, they are the 16 vectors of signs.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from numpy.typing import NDArray

RUN = 4  # VQK in a run
LONGEST = {1: 4, 2: 9, 3: 39}  # bits -> largest sum of squares of a run


def largest(bits: int) -> int:
    """Largest |VQK| in runs of that many bits. Raises KeyError for bits that have none."""
    return 1 if bits == 1 else int(LONGEST[bits] ** 0.5)


def fits(bits: int, chi: int, block_size: int) -> bool:
    """Whether a layer of chi input channels (per group) can be stored in runs: every run lies within a block."""
    return bits in LONGEST and chi % RUN == 0 and block_size % RUN == 0


def least(bits: int, shape: tuple[int, ...]) -> NDArray[np.int8]:
    """VQK (cho, chi, kh, kw) of runs that do as little as any, as zeros are none."""
    run = (1, -1, 1, -1) if bits == 1 else (1, 0, 0, 0)
    return np.broadcast_to(np.resize(run, shape[1])[:, None, None], shape).astype(np.int8)


@lru_cache
def vectors(bits: int) -> NDArray[np.int8]:
    """(count, 4): all runs, in lexicographic order. A run is stored as its row."""
    if bits == 1:
        return np.array(list(product((-1, 1), repeat=RUN)), np.int8)
    most = largest(bits)
    every = np.array(list(product(range(-most, most + 1), repeat=RUN)), np.int8)
    squares = every.astype(np.int64) ** 2
    return every[(squares.sum(1) <= LONGEST[bits]) & (squares.sum(1) % 2 == 1)]


@lru_cache
def _rows(bits: int) -> NDArray[np.int32]:
    """Row of every vector, by its number in base 2 largest + 1; -1 where it is none of the runs."""
    found = np.full((2 * largest(bits) + 1) ** RUN, -1, np.int32)
    found[_numbers(vectors(bits), bits)] = np.arange(len(vectors(bits)))
    return found


def _numbers(runs: NDArray[np.int8], bits: int) -> NDArray[np.int64]:
    base = 2 * largest(bits) + 1
    return (runs.astype(np.int64) + largest(bits)) @ (base ** np.arange(RUN - 1, -1, -1))


def rows(runs: NDArray[np.int8], bits: int) -> NDArray[np.int32]:
    """Runs (..., 4) -> their rows (...). Raises ValueError where one is not in `vectors`."""
    if runs.size and int(np.abs(runs.astype(np.int32)).max()) > largest(bits):
        raise ValueError(f"VQK leave the runs of {bits} bits")
    found = _rows(bits)[_numbers(runs, bits)]
    if bool((found < 0).any()):
        raise ValueError(f"VQK leave the runs of {bits} bits")
    return found


def from_rows(found: NDArray[np.int32], bits: int) -> NDArray[np.int8]:
    """Rows (cho, chi / 4, kh, kw) -> VQK (cho, chi, kh, kw). Raises ValueError where there is no such row."""
    book = vectors(bits)
    if found.size and (int(found.min()) < 0 or int(found.max()) >= len(book)):
        raise ValueError(f"rows beyond the runs of {bits} bits")
    cho, count, kh, kw = found.shape
    return np.ascontiguousarray(np.moveaxis(book[found], -1, 2)).reshape(cho, count * RUN, kh, kw)


@lru_cache
def leaders(bits: int) -> NDArray[np.float64]:
    """(count, 4): the runs whose values fall and are not negative. All others are these, reordered and with signs."""
    v = vectors(bits)
    return v[(v >= 0).all(1) & (np.diff(v, axis=1) <= 0).all(1)].astype(np.float64)
