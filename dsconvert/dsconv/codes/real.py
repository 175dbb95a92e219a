"""The paper's real-valued KDS: alpha, one float for every block of every output channel and tap, instead of m * CDSw.

For given VQK the best alpha are a linear least-squares problem; for given alpha the nearest VQK are rounded quotients.
Such a weight is no int8 tensor: engines multiply it in float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.dsconv.codes.free import FREE, Free
from dsconvert.dsconv.codes.free_search import from_blocks, to_blocks
from dsconvert.dsconv.format import Code, Parts, Weight, WeightFormat
from dsconvert.dsconv.tensor import block_count

STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # starting alpha, as a share of the one that just avoids clipping
ROUNDS = 4
RIDGE = 1e-9  # of the mean diagonal: only against blocks whose VQK are all zero


class Real(Free):
    """Free integers, and real alpha in the place of m."""

    name = "real"
    real = True  # and told in a model file by its alpha
    joint_bits = ()

    @property
    def integers(self) -> Code:
        return FREE

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        """Locally, from several starts, of either sign as VQK reach further down than up; CDSw = 1."""
        return Parts(*nearest_alpha(weight, format), torch.ones(len(weight)))

    def refit(self, fitted: Weight, hessian: Tensor, cross: Tensor, format: WeightFormat) -> Parts:
        alpha = best_alpha(fitted, hessian, cross)
        return Parts(fitted.vqk, alpha.float(), torch.ones(len(alpha)))


REAL = Real()


def project_alpha(blocks: Tensor, vqk: Tensor) -> Tensor:
    """argmin over alpha of ||w - alpha v||^2 = <w, v> / <v, v> of every block: (cho, nblk, B, taps) twice ->
    (cho, nblk, 1, taps); 0 where v = 0."""
    power = vqk.square().sum(2, keepdim=True)
    return torch.where(power > 0, (blocks * vqk).sum(2, keepdim=True) / power.clamp_min(1), 0.0)


def nearest_alpha(weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Float weight (cho, chi, kh, kw) -> VQK int8 and alpha float32 minimising ||W - W'||^2 with CDSw = 1."""
    _, chi, kh, kw = weight.shape
    low, high = format.limits
    blocks = to_blocks(weight.detach().cpu().double(), format.block_size)
    best_error = torch.full_like(blocks[:, :, :1], torch.inf)
    best, best_vqk = torch.zeros_like(best_error), torch.zeros_like(blocks)
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
                best, best_vqk = torch.where(better, alpha, best), torch.where(better, vqk, best_vqk)
    vqk = from_blocks(best_vqk, chi, kh, kw).to(torch.int8)
    return vqk, best.reshape(len(weight), -1, kh, kw).float()


def best_alpha(fitted: Weight, hessian: Tensor, cross: Tensor) -> Tensor:
    """The alpha (cho, nblk, kh, kw) float64 that minimise J(W') = const - 2 C W'^T + W' H W'^T (see `fit.gptq`) for the
    VQK of a weight, CDSw = 1.

    W' is linear in an output channel's alpha: with the columns of VQK in one matrix V (K, groups), a column for every
    block and tap, the best are (V^T H V)^-1 V^T C^T. Never worse than `fitted` itself, up to rounding."""
    cho, chi, kh, kw = fitted.vqk.shape
    nblk = block_count(chi, fitted.format.block_size)
    group = (torch.arange(chi)[:, None] // fitted.format.block_size * (kh * kw) + torch.arange(kh * kw)).flatten()
    vqk = fitted.vqk.double().flatten(1)
    alpha = torch.zeros(cho, nblk * kh * kw, dtype=torch.float64)
    wanted = alpha.clone().index_add_(1, group, vqk * cross)
    for o, v in enumerate(vqk):
        rows = alpha.new_zeros(alpha.shape[1], len(v)).index_add_(0, group, v[:, None] * hessian)
        square = alpha.new_zeros(len(rows), len(rows)).index_add_(1, group, rows * v)
        ridge = RIDGE * square.diagonal().mean().clamp_min(1e-30)
        alpha[o] = torch.linalg.solve(square + ridge * torch.eye(len(square)), wanted[o])
    return alpha.reshape(cho, nblk, kh, kw)
