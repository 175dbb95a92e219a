"""What a network's output maps mean to whoever measures it: numbers whose squared change is damage, and their grids."""

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
    """How the raw maps of a graph count."""

    def measure(self, raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        """Numbers whose squared change is the damage, from raw maps and the float network's."""
        ...

    def reach(self, graph: Graph) -> Mapping[str, float]:
        """How far up the grids of some values go at least, by value name."""
        ...

    def pinned(self, graph: Graph) -> Mapping[str, QParams]:
        """Grids that are known and not chosen, by value name."""
        ...


@dataclass(frozen=True)
class Detections:
    """Raw maps of YOLOv5's Detect: see `yolo.decode.detection_measure`."""

    head: Head

    def measure(self, raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        """Scores, and centres and sizes of boxes."""
        return detection_measure(raw, reference, self.head)

    def reach(self, graph: Graph) -> dict[str, float]:
        """Where Detect is split: sure scores.

        Images that show few objects say little of high scores, and a grid that they alone chose would cut the scores of
        every object in other images: with 128 images of which few showed one, none could score above a half."""
        maps, step = len(graph.outputs) - bool(self.head.nm), len(self.head.parts)
        if maps != step * len(self.head.strides):
            return {}
        return {name: SURE for part in (1, 2) for name in graph.outputs[part:maps:step]}

    def pinned(self, graph: Graph) -> dict[str, QParams]:
        """None."""
        return {}
