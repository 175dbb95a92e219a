"""How the errors of a layer's output channels go together, and how later channels make up for earlier ones.

With e the error of the layer's outputs at one position and g the gradient there, the result changes by g . e: channels
that pull on the same detections add up or cancel. So the layer's objective is tr(G E H E^T) over its weight errors E
(cho, K), with G = E[g g^T] (cho, cho) the channels' and H (K, K) the columns' second moments: for G = 1 it is the sum
of J over channels (see `gptq`). Where the errors E_d of some channels are decided, it is least for the others at
E_r = -G_rr^-1 G_rd E_d, whatever H is. That is GPTQ's error compensation over rows instead of columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.fit.seen import Places

SHRINK = 0.1  # of G's off-diagonal part: what a hundred images say of it is not exact
PARTS = 16  # runs of channels decided together: a layer of few channels is early, and matters most


def second_moment(gradient: Tensor, places: Places) -> Tensor:
    """Sum over positions of g g^T / |g| for g (cho, positions), float64 on CPU, from the places drawn by |g|: every
    position counts as `drawn` of `importance` has it, which is |g|."""
    g = gradient[:, places.picks.to(gradient.device)]
    g = g / torch.linalg.vector_norm(g, dim=0).clamp_min(1e-30) * places.weights.sqrt().to(g)
    return gram(g).double().cpu()


def gram(columns: Tensor) -> Tensor:
    """columns columns^T for (n, p): what is below the diagonal's blocks is not computed twice."""
    made = columns.new_empty(len(columns), len(columns))
    size = -(-len(columns) // 4)
    for first in range(0, len(columns), size):
        rows = slice(first, first + size)
        made[rows, first:] = columns[rows] @ columns[first:].T
        made[rows.stop :, rows] = made[rows, rows.stop :].T
    return made


def damped(moment: Tensor) -> Tensor:
    """G (cho, cho) float64, of mean diagonal 1, safe to invert."""
    g = moment.double()
    scale = g.diagonal().mean().clamp_min(1e-300)
    least = 1e-6 * scale  # a channel that nothing depends on
    return ((1 - SHRINK) * g + torch.diag(SHRINK * g.diagonal() + least)) / scale


def is_moment(moment: Tensor) -> bool:
    """Whether a matrix (cho, cho) can be what `second_moment` gives: symmetric but for float32's rounding, and positive
    once `damped`."""
    rounding = 1e-4 * float(moment.abs().max())  # sums over ten thousands of positions, added in another order
    if not bool(torch.isfinite(moment).all()) or float((moment - moment.T).abs().max()) > rounding:
        return False
    return float(moment.diagonal().min()) >= 0 and not int(torch.linalg.cholesky_ex(damped(moment)).info)


def parts(moment: Tensor) -> list[Tensor]:
    """Channel indices, those that matter most first, in at most PARTS runs of one length (the last may be shorter)."""
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    return list(order.split(-(-len(order) // PARTS)))


def made_up_for(moment: Tensor, done: Tensor, errors: Tensor, rest: Tensor) -> Tensor:
    """The errors (len(rest), K) of channels `rest` at which the objective is least, given the errors (cho, K) of those
    that are `done`; no channels in `done`: zeros."""
    if not len(done):
        return errors.new_zeros(len(rest), errors.shape[1])
    pull = torch.linalg.solve(moment[rest][:, rest], moment[rest][:, done])
    return -pull @ errors[done]
