"""The paper's real-valued KDS: alpha, one float for every block of every output channel and tap, instead of m * CDSw.

For given VQK the best alpha are a linear least-squares problem; for given alpha the nearest VQK are rounded quotients.
Such a weight is no int8 tensor: engines multiply it in float.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from dsconvert.dsconv.tensor import DSTensor, block_count, vqk_limits
from dsconvert.fit.gptq import Moments, fit_weight_gptq, measure_moments
from dsconvert.fit.least_squares import from_blocks, to_blocks
from dsconvert.fit.seen import Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # starting alpha, as a share of the one that just avoids clipping
ROUNDS = 4
RIDGE = 1e-9  # of the mean diagonal: only against blocks whose VQK are all zero


def fit_layer_real(
    node: Node, weight: Tensor, bits: int, block_size: int, images: Iterable[Seen], photographs: int | None = None
) -> DSTensor | QConv:
    """As `gptq.fit_layer`, with real alpha: its VQK, and the alpha that are best for them on the same objective."""
    if node.attrs["groups"] > 1:
        return fit_weight_real(weight, bits, block_size)
    moments = measure_moments(node, weight.shape, images, photographs)
    return moments.with_bias(with_best_alpha(weight, fit_weight_gptq(weight, moments, bits, block_size), moments))


def project_alpha(blocks: Tensor, vqk: Tensor) -> Tensor:
    """argmin over alpha of ||w - alpha v||^2 = <w, v> / <v, v> of every block: (cho, nblk, B, taps) twice ->
    (cho, nblk, 1, taps); 0 where v = 0."""
    power = vqk.square().sum(2, keepdim=True)
    return torch.where(power > 0, (blocks * vqk).sum(2, keepdim=True) / power.clamp_min(1), 0.0)


def fit_weight_real(weight: Tensor, bits: int, block_size: int) -> DSTensor:
    """Float weight (cho, chi, kh, kw) -> VQK and alpha minimising ||W - W'||^2 (locally, from several starts, of
    either sign as VQK reach further down than up), CDSw = 1."""
    _, chi, kh, kw = weight.shape
    low, high = vqk_limits(bits)
    blocks = to_blocks(weight.detach().cpu().double(), block_size)
    best_error = torch.full_like(blocks[:, :, :1], torch.inf)
    best_alpha, best_vqk = torch.zeros_like(best_error), torch.zeros_like(blocks)
    for sign in (1, -1):
        top, bottom = (sign * blocks).amax(2, keepdim=True), (sign * blocks).amin(2, keepdim=True)
        widest = (top / high).maximum(bottom / low).clamp_min(1e-12) * sign
        for start in STARTS:
            alpha = widest * start
            for _ in range(ROUNDS):
                vqk = torch.round(blocks / torch.where(alpha == 0, widest, alpha)).clamp_(low, high)
                alpha = project_alpha(blocks, vqk)
                error = (blocks - alpha * vqk).square().sum(2, keepdim=True)
                better = error < best_error
                best_error = torch.where(better, error, best_error)
                best_alpha, best_vqk = torch.where(better, alpha, best_alpha), torch.where(better, vqk, best_vqk)
    vqk = from_blocks(best_vqk, chi, kh, kw).to(torch.int8)
    return _real(vqk, best_alpha.reshape(len(weight), -1, kh, kw), torch.ones(len(weight)), bits, block_size)


def with_best_alpha(weight: Tensor, fitted: DSTensor, moments: Moments) -> DSTensor:
    """The same VQK with the alpha that minimise J(W') = const - 2 C W'^T + W' H W'^T (see `gptq`), CDSw = 1.

    W' is linear in an output channel's alpha: with the columns of VQK in one matrix V (K, groups), a column for every
    block and tap, the best are (V^T H V)^-1 V^T C^T. Never worse than `fitted` itself, up to rounding."""
    cho, chi, kh, kw = weight.shape
    nblk = block_count(chi, fitted.block_size)
    group = (torch.arange(chi)[:, None] // fitted.block_size * (kh * kw) + torch.arange(kh * kw)).flatten()
    vqk = fitted.vqk.double().flatten(1)
    linear = vqk * moments.cross
    alpha = torch.zeros(cho, nblk * kh * kw, dtype=torch.float64)
    wanted = alpha.clone().index_add_(1, group, linear)
    for o, v in enumerate(vqk):
        rows = alpha.new_zeros(alpha.shape[1], len(v)).index_add_(0, group, v[:, None] * moments.hessian)
        square = alpha.new_zeros(len(rows), len(rows)).index_add_(1, group, rows * v)
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-30)
        alpha[o] = torch.linalg.solve(square + ridge * torch.eye(len(square)), wanted[o])
    return _real(fitted.vqk, alpha.reshape(cho, nblk, kh, kw), torch.ones(cho), fitted.bits, fitted.block_size)


def _real(vqk: Tensor, alpha: Tensor, cds: Tensor, bits: int, block_size: int) -> DSTensor:
    return DSTensor(vqk, torch.ones_like(alpha, dtype=torch.int8), cds, bits, block_size, alpha.float())
