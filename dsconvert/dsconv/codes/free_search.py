"""Find the VQK, m and CDSw nearest to a float weight, by least squares.

For a fixed CDSw the blocks are independent. For each m the best VQK is clamp(round(W / (CDSw m))), so trying all m
finds a block's optimum. For fixed integers I = m VQK the best CDSw is <W, I> / <I, I>. The two steps alternate from
several starting scales. No step can increase the error.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from dsconvert.dsconv.format import PAIR_MAX, Parts, WeightFormat
from dsconvert.dsconv.tensor import block_count

STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # starting CDSw, as shares of the smallest one that clips nothing
ROUNDS = 4


def fit_weight(weight: Tensor, format: WeightFormat, starts: Sequence[float] = STARTS, rounds: int = ROUNDS) -> Parts:
    """Minimise ||W - W'||^2 for each output channel, as far as the search finds it, on CPU.

    weight: W, (cho, chi, kh, kw) float.
    starts: starting CDSw, as shares of the smallest one that clips nothing.
    rounds: alternations from each start.

    Returns VQK and m, int8, and CDSw.
    """
    cho, chi, kh, kw = weight.shape
    blocks = to_blocks(weight.detach().cpu().double(), format.block_size)
    widest = _unclipped_scale(blocks, format)
    best_error = torch.full((cho,), torch.inf, dtype=torch.float64)
    best_cds = torch.ones(cho, dtype=torch.float64)
    best_m = torch.ones(cho, blocks.shape[1], 1, kh * kw, dtype=torch.float64)
    best_vqk = torch.zeros_like(blocks)
    for start in starts:
        cds = widest * start / format.most_m
        for _ in range(rounds):
            m, vqk = nearest_integers(blocks, cds, format)
            vqk = relieve_pairs(vqk, format.bits)
            cds = project_cds(blocks, m * vqk, cds)
            error = (blocks - cds[:, None, None, None] * m * vqk).square().sum((1, 2, 3))
            better = error < best_error
            best_error = torch.where(better, error, best_error)
            best_cds = torch.where(better, cds, best_cds)
            best_m = torch.where(better[:, None, None, None], m, best_m)
            best_vqk = torch.where(better[:, None, None, None], vqk, best_vqk)
    vqk, m = from_blocks(best_vqk, chi, kh, kw).to(torch.int8), best_m.reshape(cho, -1, kh, kw).to(torch.int8)
    return Parts(vqk, m, best_cds.float())


def nearest_integers(blocks: Tensor, cds: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Return for each block the m (cho, nblk, 1, taps) and VQK (cho, nblk, B, taps) nearest to it at the given CDSw.

    The result is exact: all m are tried, each with the rounded quotients as VQK. Of equal errors the smaller m is kept.
    """
    low, high = format.limits
    scaled = blocks / cds[:, None, None, None]
    best_error = torch.full_like(scaled[:, :, :1], torch.inf)
    best_m, best_vqk = torch.ones_like(best_error), torch.zeros_like(scaled)
    for m in range(1, format.most_m + 1):
        vqk = (scaled / m).round_().clamp_(low, high)
        error = scaled.sub(vqk, alpha=m).square_().sum(2, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_m = torch.where(better, float(m), best_m)
        best_vqk = torch.where(better, vqk, best_vqk)
    return best_m, best_vqk


def _unclipped_scale(blocks: Tensor, format: WeightFormat) -> Tensor:
    """Return the least CDSw * m (cho,) at which no VQK is clipped, by its own limits or by a pair's."""
    low, high = format.limits
    scale = (blocks.amax((1, 2, 3)) / high).maximum(blocks.amin((1, 2, 3)) / low)
    if format.bits == 8:
        together = 2 * blocks if blocks.shape[2] % 2 else blocks[:, :, 0::2] + blocks[:, :, 1::2]
        scale = scale.maximum(together.abs().amax((1, 2, 3)) / (PAIR_MAX - 1))  # each of the two may be rounded up
    return scale.clamp_min(1e-12)


def relieve_pairs(vqk: Tensor, bits: int) -> Tensor:
    """Cut the larger of two neighbouring VQK so that their sum stays within PAIR_MAX.

    Only 8 bits need it: below, `most_m` keeps each m VQK within half of PAIR_MAX.

    vqk: (cho, nblk, B, taps).
    """
    if bits < 8:
        return vqk
    if vqk.shape[2] % 2:
        return vqk.clamp(-PAIR_MAX // 2, PAIR_MAX // 2)
    a, b = vqk[:, :, 0::2], vqk[:, :, 1::2]
    excess = (a + b).sign() * ((a + b).abs() - PAIR_MAX).clamp_min(0)
    first = a.abs() >= b.abs()
    pairs = torch.stack((a - excess * first, b - excess * ~first), 3)
    return pairs.flatten(2, 3)


def project_cds(blocks: Tensor, integers: Tensor, fallback: Tensor) -> Tensor:
    """Return the CDSw that minimises ||W - CDSw * I||^2 for each output channel: <W, I> / <I, I>.

    `fallback` is kept where I = 0 or the result is not positive.
    """
    power = integers.square().sum((1, 2, 3))
    cds = (blocks * integers).sum((1, 2, 3)) / power.clamp_min(1e-30)
    return torch.where((power > 0) & (cds > 0), cds, fallback)


def to_blocks(weight: Tensor, block_size: int) -> Tensor:
    """Reshape (cho, chi, kh, kw) to (cho, nblk, B, kh * kw); zeros fill up a short last block, and fit exactly."""
    cho, chi, kh, kw = weight.shape
    nblk = block_count(chi, block_size)
    size = min(block_size, chi) if nblk == 1 else block_size
    padded = F.pad(weight.reshape(cho, chi, -1), (0, 0, 0, nblk * size - chi))
    return padded.reshape(cho, nblk, size, kh * kw)


def from_blocks(blocks: Tensor, chi: int, kh: int, kw: int) -> Tensor:
    """Undo `to_blocks`."""
    return blocks.reshape(blocks.shape[0], -1, kh, kw)[:, :chi]
