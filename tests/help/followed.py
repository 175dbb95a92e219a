"""The strings of one group by the compiled loop, for tests that look at a group alone."""

from __future__ import annotations

import torch
from torch import Tensor

from dsconvert.base import loops
from dsconvert.dsconv.codes.trellis_search import Register


def followed(
    columns: Tensor, upper: Tensor, tried: Tensor, after: Tensor, own: int, state: Tensor, bits: int
) -> tuple[Tensor, Tensor]:
    """As `reference.torch_loops.follow`, by `loops.follow`."""
    m, windows = torch.empty(len(columns)), torch.empty(len(columns), own, dtype=torch.int64)
    given = [x.float().contiguous().numpy() for x in (columns, upper, tried, after)]
    values = Register.of(bits).values.numpy()
    loops.follow(0, len(columns), *given, own, state.contiguous().numpy(), values, bits, m.numpy(), windows.numpy())
    return m, windows
