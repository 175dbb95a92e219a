"""VQK along a trellis: each is looked up by the last eight bits of its output channel's string of bits.

Free integers of b bits give each weight 2^b values. In a trellis code, a weight's b bits choose among values that the
bits before them decide (TCQ: Marcellin and Fischer, IEEE Transactions on Communications 38, 1990). So there are many
more values than 2^b, and a search over whole strings (Viterbi's) finds the nearest ones. The form here is QTIP's shift
register (arXiv 2406.11235, section 3). With c[t] the b bits of weight t,

    VQK[t] = table(b)[the last 8 bits of c[0] c[1] ... c[t]],    zeros before c[0]

so a code is a table of 256 integers. On Gaussian weights, its error is lower than with
free integers of as many bits. The gain is about 1 dB at 1 bit (against signs), 2.8 dB at 2 bits, and 2 dB at 3 and 4.

The string of an output channel goes block by block, within a block tap by tap, and within a tap channel by channel. So
weights that share an m are neighbours. `code` (the bits of every weight, uint8) has the shape of VQK; `strings` puts it
in the string's order.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

WINDOW = 8  # last bits of the string that decide a VQK
EVEN = 8  # a block's channels are a multiple of this, so that its bits fill whole bytes

# bits -> 256 integers, int8 in hexadecimal. benchmarks/trellis_tables.py made them for numbers with tails between a
# Gaussian's and a Laplacian's, as weights have them. They leave room for m, as the sum of two m VQK must not exceed
# 128.
_TABLES = {
    1: (
        "fe02ff010000fe02000501fc01fe01ff030001fefc01ff01fe01ff02000401fc01fd01ff02ff03fffa01fe01ff01ff03ff0701fd01fd02ff"
        "02ff03fffc00fe01fe01ff0400f900fc01fd04ff02ff02fffe01fe01fe02ff0400f901fd01ff01fe02ff0300fe02ff01ff02ff0600fb01fe"
        "01ff020003000500fc01fe02ff02000500fa01fe01fe02ff0400fd01ff02ff01ff03ff0400fb01ff01fe01ff0400fe01fd01ff03ff020005"
        "00fc01ff03ff01fd04ffff01fe01ff01ff03ff0701fe01fe02ff02ff0600fd01fd01ff01ff0400fb01fe01fb02ff02ff03fffe02ff01ff02"
        "0005fffc01fe01fd01fe01ff05fffd01ff02ff02ff0300fb01fe01ff02ff02ff"
    ),
    2: (
        "fcff0103fdff0105ff0002fbff0103fd000107fe0002fcff0105fe0002fcff0103fdff0105fe0002fdff0103fe0002fbff0103fc000107fe"
        "0103fdff0104fe0002fbff0003fdff0106fe0002fdff0103fe0002faff0103fd000105fe0002fcff0103feff02f9ff0003fd000105fe0002"
        "fcff0103fe0002f7ff0003fd000105fe0002fcff0103fdff0209fe0002fdff0104fe0002fbff0103fd000106ff0003fc000104fe0002faff"
        "0103fd000206fe0002fcff0004fe0001fcff0003fe000105fe0002fcff0103fd0001f9ff0104fdff0104fe0002fcff0004fe0001fbff0103"
        "fdff0104fe0001faff0103fd0002f9fe0103fdff0105fe0002fbff0104fe0001"
    ),
    3: (
        "f4fbfdff00020306fcfeff00010305fbfdff00010204f8fbff0001020307fcfeff00010305fbfdfe00010204f8fcfeff01020407fcfeff00"
        "020305fafdffff000304f9fdfeff00010408fcfeff00010206fbfdff00010203f9fdfe0001020409fcfeff00010306fbfeff00010205fafd"
        "ff000102040cfcfe0001020306fcfeff00010305fbfdffff010204f6fcfeff00020306fcfeff00010304fbfdfe00010105f7fdfeff000203"
        "07fcfeff00010304fafdff00010204f8fefe0001020408fcfeff00010306fbfdff00010204f9fdfe0001020409fcfeff01020306fbfdff00"
        "010205fafdfe000002040afcfeff00010306fbfeff00010204fafdfe00010203"
    ),
    4: (
        "eb01f802fa03fb04fd06fe09ff0d00f301f902fb03fc04fd06fe09ff0e00f701f902fc03fd05fe07ff0a00f201f801fa03fc04fd05fe07ff"
        "0c00f601f902fb03fc04fe06ff08ff1500f701fa02fb03fd05fe08ff0a00f501f802fa03fc04fd06fe08000c00f601f902fb03fc05fd06ff"
        "0900f001f702fa03fb04fd05fe06ff0b00f301f802fb03fc05fd07fe09ff1201f701fa02fc04fd05fe07ff0c00f401f901fb03fc04fd06fe"
        "08ff0f00f701fa02fb03fd05fe07ff0a00ee01f801fa02fc04fd06fe07ff0a00f501f802fa03fc04fd06ff08001000f601f902fb03fc04fe"
        "07ff0b00f101f802fa03fc04fd05fe08ff0b01f501f902fb03fc05fd06fe0900"
    ),
}


@lru_cache
def table(bits: int) -> NDArray[np.int8]:
    """Return VQK (256,) by the last eight bits. Raises KeyError for bits that have no trellis."""
    made = np.frombuffer(bytes.fromhex(_TABLES[bits]), np.int8)
    made.flags.writeable = False
    return made


def largest(bits: int) -> int:
    """Return the largest |VQK| of a trellis. Raises KeyError for bits that have no trellis."""
    return int(np.abs(table(bits).astype(int)).max())


def fits(bits: int, chi: int, block_size: int) -> bool:
    """Return whether a layer of chi input channels (per group) can be stored along a trellis.

    Its blocks must all have one size, and their bits must fill whole bytes.
    """
    size = min(block_size, chi)
    return bits in _TABLES and chi % size == 0 and size % EVEN == 0


def strings(x: Tensor, block_size: int) -> Tensor:
    """Reorder (cho, chi, kh, kw) to (cho, chi * kh * kw), each output channel in its string's order."""
    cho, chi, kh, kw = x.shape
    return x.reshape(cho, -1, min(block_size, chi), kh * kw).transpose(2, 3).reshape(cho, -1)


def from_strings(x: Tensor, shape: tuple[int, ...], block_size: int) -> Tensor:
    """Undo `strings`, for a weight of shape (cho, chi, kh, kw)."""
    cho, chi, kh, kw = shape
    return x.reshape(cho, -1, kh * kw, min(block_size, chi)).transpose(2, 3).reshape(shape).contiguous()


def windows(code: Tensor, bits: int) -> Tensor:
    """Return the last eight bits at each place of strings (cho, K), uint8, of `bits` bits a weight."""
    found = code.int()
    for back in range(1, -(-WINDOW // bits)):
        found[:, back:] |= code[:, :-back].int() << bits * back
    return (found & 255).to(torch.uint8)


@lru_cache
def quiet(bits: int, length: int) -> Tensor:
    """Return a string (length,) with small VQK, choosing the smallest at every place. No string gives zeros alone."""
    book, found, seen = np.abs(table(bits).astype(int)), np.zeros(length, np.uint8), 0
    for t in range(length):
        seen = seen << bits & 255
        found[t] = book[seen : seen + (1 << bits)].argmin()
        seen += int(found[t])
    return torch.from_numpy(found)
