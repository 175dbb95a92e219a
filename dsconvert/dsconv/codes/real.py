"""The paper's real-valued KDS: alpha, one float for each block, tap and output channel, instead of m * CDSw.

For given VQK the best alpha solve a linear least-squares problem. For given alpha the nearest VQK are rounded
quotients. Such a weight has no int8 form, so engines multiply in float.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.dsconv.codes.free import FREE, Free
from dsconvert.dsconv.codes.free_search import from_blocks, to_blocks
from dsconvert.dsconv.format import Code, Parts, Weight, WeightFormat
from dsconvert.dsconv.tensor import block_count

STARTS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)  # starting alpha, as shares of the smallest one that clips nothing
ROUNDS = 4
RIDGE = 1e-9  # share of the mean diagonal; it only keeps blocks whose VQK are all zero solvable


class Real(Free):
    """Free integers, with real alpha instead of m."""

    name = "real"
    real = True  # a model file shows this code by the type of its alpha
    joint_bits = ()

    @property
    def integers(self) -> Code:
        return FREE

    def nearest(self, weight: Tensor, format: WeightFormat) -> Parts:
        """Return a local minimum of the squared error, with CDSw = 1.

        Both signs of alpha are tried, as VQK reach one step further down than up.
        """
        return Parts(*nearest_alpha(weight, format), torch.ones(len(weight)))

    def refit(self, fitted: Weight, hessian: Tensor, cross: Tensor, format: WeightFormat) -> Parts:
        alpha = best_alpha(fitted, hessian, cross)
        return Parts(fitted.vqk, alpha.float(), torch.ones(len(alpha)))


REAL = Real()


def project_alpha(blocks: Tensor, vqk: Tensor) -> Tensor:
    """Return the alpha that minimises ||w - alpha v||^2 for every block: <w, v> / <v, v>, 0 where v = 0.

    blocks, vqk: w and v, (cho, nblk, B, taps). The result is (cho, nblk, 1, taps).
    """
    power = vqk.square().sum(2, keepdim=True)
    return torch.where(power > 0, (blocks * vqk).sum(2, keepdim=True) / power.clamp_min(1), 0.0)


def nearest_alpha(weight: Tensor, format: WeightFormat) -> tuple[Tensor, Tensor]:
    """Return VQK, int8, and alpha, float32, that minimise ||W - W'||^2 with CDSw = 1, as far as the search finds it.

    weight: W, (cho, chi, kh, kw) float.
    """
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
    """Return the alpha (cho, nblk, kh, kw), float64, that minimise J (see `fit.gptq`) for given VQK, with CDSw = 1.

    W' is linear in the alpha of an output channel: W' = V alpha. V (K, groups) has one column for each block and tap,
    with the VQK of that group. So

        J = const - 2 C W'^T + W' H W'^T    is least at    alpha = (V^T H V)^-1 V^T C^T

    J is never worse than for `fitted` itself, up to rounding.
    """
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
