"""The published YOLOv5 blocks with DSConv in them, and a network whose chosen convolutions are replaced by them.

In the published wrapping, DSConv2D_C3 is a C3 whose bottleneck convolutions are DSConv; its cv1, cv2 and cv3 stay
ordinary convolutions. `with_dsconv` can replace those too (scope `c3` and `all`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

from torch import nn

from dsconvert.dsconv.modules import DSConv
from dsconvert.graph.integer import QConv
from dsconvert.yolo.modules import C3, Bottleneck, Conv
from dsconvert.yolo.network import Network


class DSConv2D(Conv):
    """Conv (convolution, BatchNorm, activation) with a DSConv inside."""

    def __init__(
        self, c1: int, c2: int, k: int = 1, s: int = 1, p: int | None = None, g: int = 1, act: str = "SiLU",
        block_size: int = 32, KDSBias: bool = False, CDS: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(c1, c2, k, s, p, g, act)
        self.conv = DSConv(c1, c2, k, s, p, 1, g, "zeros", False, block_size, KDSBias, CDS)  # type: ignore[assignment]


class Bottleneck_DSConv2D(Bottleneck):
    """Bottleneck of two DSConv2D."""

    def __init__(
        self, c1: int, c2: int, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU",
        block_size: int = 32, KDSBias: bool = False, CDS: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(c1, c2, shortcut, g, e, act)
        hidden = int(c2 * e)
        self.cv1 = DSConv2D(c1, hidden, 1, 1, None, 1, act, block_size, KDSBias, CDS)
        self.cv2 = DSConv2D(hidden, c2, 3, 1, None, g, act, block_size, KDSBias, CDS)


class DSConv2D_C3(C3):
    """C3 whose bottlenecks are Bottleneck_DSConv2D."""

    def __init__(
        self, c1: int, c2: int, n: int = 1, shortcut: bool = True, g: int = 1, e: float = 0.5, act: str = "SiLU",
        block_size: int = 32, KDSBias: bool = False, CDS: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(c1, c2, n, shortcut, g, e, act)
        hidden = int(c2 * e)
        self.m = nn.Sequential(
            *(Bottleneck_DSConv2D(hidden, hidden, shortcut, g, 1.0, act, block_size, KDSBias, CDS) for _ in range(n))
        )


_DRESSED: dict[type[nn.Module], type[nn.Module]] = {
    Conv: DSConv2D, Bottleneck: Bottleneck_DSConv2D, C3: DSConv2D_C3,
}  # fmt: skip


def with_dsconv(network: Network, convs: Mapping[str, QConv]) -> Network:
    """A copy of a fused network in which every convolution named in `convs` is the fitted DSConv module.

    Blocks holding a DSConv get the published class name. Activations stay float.
    """
    made = copy.deepcopy(network)
    for name, fitted in convs.items():
        *path, last = name.split(".")
        parents = [made.get_submodule(".".join(path[:depth])) for depth in range(1, len(path) + 1)]
        conv = getattr(parents[-1], last) if not last.isdigit() else parents[-1].get_submodule(last)
        assert isinstance(conv, nn.Conv2d)
        setattr(parents[-1], last, DSConv.from_conv(conv, fitted.weight, fitted.bias))
        for parent in parents:
            # the classes differ only in what their constructors build, so changing the class changes the name
            if type(parent) in _DRESSED and (not isinstance(parent, C3) or "m" in path):
                parent.__class__ = _DRESSED[type(parent)]
    return made
