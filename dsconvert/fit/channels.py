"""Fit the output channels of a layer together, so that later channels compensate the errors of earlier ones.

Let e be the error of a layer's outputs at one position, and g the gradient of the network's result there. The result
changes by g . e: errors of channels that act on the same detections add up or cancel. For weight errors E (cho, K) the
layer's objective is therefore

    tr(G E H E^T),    G = E[g g^T]  (cho, cho),    H = E[q q^T]  (K, K),    q: the unfolded input

For G = 1 this is the sum of J over the channels (see `gptq`). Once the errors E_d of some channels are decided, it is
least for the remaining channels r at

    E_r = -G_rr^-1 G_rd E_d

whatever H is. This is GPTQ's error compensation over the rows of W instead of its columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.fit.seen import Places

SHRINK = 0.1  # share taken from G's off-diagonal part: a hundred images estimate it only roughly
PARTS = 16  # most groups of channels decided one after another


def second_moment(gradient: Tensor, places: Places) -> Tensor:
    """Return the sum over positions of g g^T / |g|, (cho, cho) float64 on CPU.

    The positions were drawn with chances |g|, and weights that make up for it. Dividing by |g|^2 and multiplying by the
    weight leaves each position with the importance |g| that `Importance.drawn` gives it.

    gradient: g (cho, positions), of one image.
    places: the positions drawn from that image.
    """
    g = gradient[:, places.picks.to(gradient.device)]
    g = g / torch.linalg.vector_norm(g, dim=0).clamp_min(1e-30) * places.weights.sqrt().to(g)
    return gram(g).double().cpu()


def gram(columns: Tensor) -> Tensor:
    """Return columns columns^T for columns (n, p), computing each block below the diagonal only once."""
    made = columns.new_empty(len(columns), len(columns))
    size = -(-len(columns) // 4)
    for first in range(0, len(columns), size):
        rows = slice(first, first + size)
        made[rows, first:] = columns[rows] @ columns[first:].T
        made[rows.stop :, rows] = made[rows, rows.stop :].T
    return made


def damped(moment: Tensor) -> Tensor:
    """Return G (cho, cho) float64 with a mean diagonal of 1, made safe to invert."""
    g = moment.double()
    scale = g.diagonal().mean().clamp_min(1e-300)
    least = 1e-6 * scale  # keeps a channel without any gradient invertible
    return ((1 - SHRINK) * g + torch.diag(SHRINK * g.diagonal() + least)) / scale


def is_moment(moment: Tensor) -> bool:
    """Return whether a matrix (cho, cho) can come from `second_moment`.

    It must be finite, symmetric up to float32's rounding, and positive definite once `damped`.
    """
    rounding = 1e-4 * float(moment.abs().max())  # sums over tens of thousands of positions, added in another order
    if not bool(torch.isfinite(moment).all()) or float((moment - moment.T).abs().max()) > rounding:
        return False
    return float(moment.diagonal().min()) >= 0 and not int(torch.linalg.cholesky_ex(damped(moment)).info)


def parts(moment: Tensor) -> list[Tensor]:
    """Return the channels' indices by falling importance, in at most PARTS groups of one size.

    The last group may be smaller.
    """
    order = torch.argsort(moment.diagonal(), descending=True, stable=True)
    return list(order.split(-(-len(order) // PARTS)))


def made_up_for(moment: Tensor, done: Tensor, errors: Tensor, rest: Tensor) -> Tensor:
    """Return the errors (len(rest), K) of the channels `rest` at which the objective is least.

    done: indices of the decided channels; with none, the result is zeros.
    errors: (cho, K), of which the rows `done` are used.
    """
    if not len(done):
        return errors.new_zeros(len(rest), errors.shape[1])
    pull = torch.linalg.solve(moment[rest][:, rest], moment[rest][:, done])
    return -pull @ errors[done]
