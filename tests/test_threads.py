"""One thread for small weights, all for large ones, and as before afterwards."""

from __future__ import annotations

import pytest
import torch

from dsconvert.fit.threads import FEW, threads_for


@pytest.mark.parametrize(("count", "inside"), [(1, 1), (FEW - 1, 1), (FEW, 3)])
def test_threads_by_the_size_of_the_weight(count, inside):
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with threads_for(count):
            assert torch.get_num_threads() == inside
        assert torch.get_num_threads() == 3
        with pytest.raises(ZeroDivisionError), threads_for(1):
            count / 0
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
