"""YOLOv5's segmentation head (v7.0), written from the architecture and the parameter names of its checkpoints.

Every box also gets `nm` mask coefficients, and the network makes `nm` prototypes, maps of a quarter of the image's
side. A box's mask is the sigmoid of its coefficients times the prototypes (YOLACT, arXiv 1904.02689).
"""

from __future__ import annotations

from torch import Tensor, nn

from dsconvert.yolo.modules import Conv, Detect


class Proto(nn.Module):
    """A 3x3 convolution, upsampling by 2, a 3x3 convolution, and a 1x1 to the prototypes."""

    def __init__(self, c1: int, hidden: int, nm: int, act: str = "SiLU") -> None:
        super().__init__()
        self.cv1 = Conv(c1, hidden, 3, act=act)
        self.upsample = nn.Upsample(None, 2, "nearest")
        self.cv2 = Conv(hidden, hidden, 3, act=act)
        self.cv3 = Conv(hidden, nm, act=act)

    def forward(self, x: Tensor) -> Tensor:
        return self.cv3(self.cv2(self.upsample(self.cv1(x))))


class Segment(Detect):
    """Detect with `nm` more numbers behind each box's classes, and prototypes made from the first level's map."""

    def __init__(self, nc: int, channels: list[int], na: int, nm: int = 32, hidden: int = 256, act: str = "SiLU"):
        super().__init__(nc, channels, na, nm)
        self.proto = Proto(channels[0], hidden, nm, act)

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        """Return raw maps, one (n, na * (5 + nc + nm), h, w) a level, and the prototypes (n, nm, 2 h, 2 w) of the
        first.
        """
        return [*super().forward(xs), self.proto(xs[0])]
