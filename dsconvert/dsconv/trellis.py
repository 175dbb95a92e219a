"""VQK along a trellis: each is read off the last eight bits of its output channel's string of bits.

Integers that are each free are points of a cube, and most of a cube looks like no weights. In a trellis code (TCQ:
Marcellin and Fischer, IEEE Transactions on Communications 38, 1990) a weight's few own bits choose among values that
the bits before them decide. So from b bits a weight there are many more values than 2^b to be had, and a search over
whole strings (Viterbi's) finds the one that comes nearest. The form here is the shift register of QTIP (arXiv
2406.11235, section 3): with c[t] the b bits that stand for weight t,

    VQK[t] = TABLES[b][the last 8 bits of c[0] c[1] ... c[t]],    zeros before c[0]

so 256 integers are all there is to know. For Gaussian weights the error falls by about 1 dB (1 bit, against signs),
2.8 dB (2 bits) and 2 dB (3 and 4 bits) from what free integers of as many bits leave.

An output channel's string goes block by block, within a block tap by tap, within a tap channel by channel: what shares
an m stands together. `code` (bits of every weight, uint8) has the shape of VQK, `strings` puts it in that order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW = 8  # bits that decide a VQK
EVEN = 8  # channels of a block are a multiple of so many, so that its bits are whole bytes

# bits -> 256 integers, int8 in hexadecimal, made by benchmarks/trellis_tables.py for numbers whose tails are between
# Gauss's and Laplace's, as weights' are. The largest leave room for m, as two m VQK must not exceed 128.
_TABLES = {
    1: (
        "fe0202ff01ff02fe00fb0005ff01ff01ff02ff0205ff02ff01ff02fe00fc0004ff02fd01ff01fe0105ff03ff01ff01fe00f9ff06ff03fd01"
        "fe01fd01040001ff01fd01fd00070004ff02fe00fc01fe0102ff02ff01fd01fb0005ff01ff03fc00fb01fd0103ff01fe01fe00faff05ff02"
        "ff01fe01fe01fb0005ff01ff01fe01fc0007ff02ff02fb00fa0103ff03ff01fc01fe01fcff05ff03ff02ff01fc0103ff02ff01ff01fe00fa"
        "ff04ff02ff01fe01fc0005ff040001fe00fc00f90004ff01fe02fd01fbff02ff02ff01fd01fd0005ff030005fd01ff02fd0001ff02ff01fe"
        "01fb0006ff03ff01fe01fe01f90001ff02fe01fe01fc0004ff04ff02ff01fe01"
    ),
    2: (
        "fcff0003feff0104ff0002fcff0103fd000107fe0002fdff0104fe0002fcff0003fe000106fe0002fdff0103ff0002faff0002fd000105fe"
        "0002fcff0103fe0002fbff0003fdff0004fe0001fd000103fe0001fbff0003fe000104fe0002fdff0103fe0001faff0003fd000106ff0002"
        "fdff0002fe0001f8ff0002fd000104fe0001fcff0103fe000209ff0003feff0104fe0001fcff0003fe000105ff0002fc000103fe0002fcff"
        "0002feff0205ff0002fcff0003ff0001fbff0003fe000106ff0002fd000103fe0001faff0103fdff0105fe0002fdff0004fe0001fcff0002"
        "fe000104ff0002fcff0103fd0001f9fe0002fdff0105fe0002fbff0004fd0001"
    ),
    3: (
        "f401fd0700fb03ff0601fd0400fb02ff0500fd03fffa02fe0500fc03fff801fe0500fc02ff0801fe0400fb02ff0701fd03fffa02fe0500fd"
        "03fff901fe0400fc02ff0a01fe0400fc02ff0601fd0300fb01fe0500fc03fffa01fe0500fc02fff601fe0400fc02ff0701fd0300fb02ff05"
        "00fd03fffa01fe0500fc02fff801fe0400fc02ff0801fe0400fb02ff0701fd0300fb01fe0600fd02fff901fe0400fc02ff0c01fe0400fc02"
        "ff0600fd0300fc01fe0500fd03fff901fe0400fd02fff701fe0300fc02ff0801fd0300fb02ff0601fd03fffa02fe0500fc02fff801fe0400"
        "fc02ff0901fe0300fb02ff0601fd0300fa02fe0500fd03fff901fe0400fc02ff"
    ),
    4: (
        "eb03fffa0902fef80601fdf40500fc0d03fff90701fef60500fc120400fb0902fef80501fdf40400fc0a03fffa0702fef70400fc0f03fffb"
        "0802fef90601fdf30400fb0a02fff90601fef70500fc0d03fffa0702fef70501fdf10400fc0903fef90601fdf60400fc0c03fffb0802fef7"
        "0500fcee03fffb0902fff90701fdf50400fc0b03fffa0702fef70501fd1504fffb0802fef80601fdf50400fc0b03fffa0701fdf50400fc10"
        "03fffb0902fef90601fdf304fffb0b02fffa0702fef70500fc0e03fffa0802fef80601fdf20400fb0902fef90601fdf60500fc0e03fffb07"
        "02fef80500fdf00400fb0a03fffa0701fdf50400fb0c03fffa0802fef80501fc"
    ),
}


@lru_cache
def table(bits: int) -> NDArray[np.int8]:
    """(256,): VQK by the last eight bits. Raises KeyError for bits that have no trellis."""
    made = np.frombuffer(bytes.fromhex(_TABLES[bits]), np.int8)
    made.flags.writeable = False
    return made


def largest(bits: int) -> int:
    """Largest |VQK| along a trellis of that many bits. Raises KeyError for bits that have none."""
    return int(np.abs(table(bits).astype(int)).max())


def exists(bits: int) -> bool:
    """Whether there is a trellis of that many bits."""
    return bits in _TABLES


def fits(bits: int, chi: int, block_size: int) -> bool:
    """Whether a layer of chi input channels (per group) can be stored so: its blocks are whole, and of whole bytes."""
    size = min(block_size, chi)
    return bits in _TABLES and chi % size == 0 and size % EVEN == 0


def strings(x: Tensor, block_size: int) -> Tensor:
    """(cho, chi, kh, kw) -> (cho, chi kh kw): every output channel in its string's order."""
    cho, chi, kh, kw = x.shape
    return x.reshape(cho, -1, min(block_size, chi), kh * kw).transpose(2, 3).reshape(cho, -1)


def from_strings(x: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
    """Inverse of `strings`, for a weight of that shape (cho, chi, kh, kw)."""
    cho, chi, kh, kw = shape
    return x.reshape(cho, -1, kh * kw, min(block_size, chi)).transpose(2, 3).reshape(shape).contiguous()


def windows(code: Tensor, bits: int) -> Tensor:
    """Strings (cho, K) of `bits` bits each, uint8 -> the last eight bits at each place, uint8."""
    found = code.int()
    for back in range(1, -(-WINDOW // bits)):
        found[:, back:] |= code[:, :-back].int() << bits * back
    return (found & 255).to(torch.uint8)


def values(code: Tensor, bits: int, block_size: int) -> Tensor:
    """code (cho, chi, kh, kw), uint8 -> VQK, int8. Raises ValueError where a code has more bits."""
    if code.numel() and int(code.max()) >> bits:
        raise ValueError(f"codes leave {bits} bits")
    found = torch.from_numpy(table(bits).copy())[windows(strings(code, block_size), bits).long()]
    return from_strings(found, tuple(code.shape), block_size)


@lru_cache
def quiet(bits: int, length: int) -> Tensor:
    """A string (length,) whose VQK are small, as none is all zeros: at every place the smallest there is."""
    book, found, seen = np.abs(table(bits).astype(int)), np.zeros(length, np.uint8), 0
    for t in range(length):
        seen = seen << bits & 255
        found[t] = book[seen : seen + (1 << bits)].argmin()
        seen += int(found[t])
    return torch.from_numpy(found)
