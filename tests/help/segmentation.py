"""The tiny segmentation network that tests share."""

from __future__ import annotations

import copy

from conftest import TINY, randomise

from dsconvert.yolo.network import Head, Network, head_from_detect

MASKS = 4  # coefficients a box
SEGMENT = copy.deepcopy(TINY)
SEGMENT["head"][-1] = [[7, 4], 1, "Segment", ["nc", "anchors", MASKS, 96]]  # type: ignore[index]


def tiny_segment(seed: int = 0) -> tuple[Network, Head]:
    """The tiny network with a segmentation head: prototypes of half the image's side, 24 channels inside."""
    network = Network(SEGMENT, nc=2, na=3).eval()
    randomise(network, seed)
    network.requires_grad_(False)
    return network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])
