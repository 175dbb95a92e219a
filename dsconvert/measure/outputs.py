"""What a network's raw output maps mean: the numbers whose squared change is damage, and rules for their grids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from dsconvert.graph.grids import SURE, QParams
from dsconvert.graph.ir import Graph
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.network import Head


class Outputs(Protocol):
    """How errors in the raw maps of a network count."""

    def measure(self, raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        """Return numbers whose squared change is the damage.

        raw: the raw maps.
        reference: the float network's raw maps, taken as constants.
        """
        ...

    def reach(self, graph: Graph) -> Mapping[str, float]:
        """Return, for some values by name, how far up their grids must reach at least."""
        ...

    def pinned(self, graph: Graph) -> Mapping[str, QParams]:
        """Return, for some values by name, grids that are fixed."""
        ...


@dataclass(frozen=True)
class Detections:
    """Raw maps of YOLOv5's Detect (see `yolo.decode.detection_measure`)."""

    head: Head

    def measure(self, raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        """Return scores, and centres and sizes of boxes."""
        return detection_measure(raw, reference, self.head)

    def reach(self, graph: Graph) -> dict[str, float]:
        """Let the grids of objectness and class scores reach the logits of confident detections, where Detect is split.

        Images with few objects hold few high scores. A grid chosen from them alone would clip the scores of objects in
        other
        images: with 128 images and objects in few of them, no score could exceed one half.
        """
        maps, step = len(graph.outputs) - bool(self.head.nm), len(self.head.parts)
        if maps != step * len(self.head.strides):
            return {}
        return {name: SURE for part in (1, 2) for name in graph.outputs[part:maps:step]}

    def pinned(self, graph: Graph) -> dict[str, QParams]:
        """Return no grids."""
        return {}
