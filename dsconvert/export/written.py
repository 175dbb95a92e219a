"""A file as it was written, and where it has the graph's values: what looks at the file need not guess their names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import Graph


@dataclass(frozen=True)
class Place:
    """Where a file has a map of the graph: float, or uint8 on a grid; (n, channels, ny, nx), or with its channels last,
    and some more of them, which nobody asks for."""

    name: str  # of the file's value
    grid: QParams | None = None  # None: float
    last: bool = False  # the channels are
    more: int = 0  # channels behind those of the graph's


@dataclass(frozen=True)
class Written:
    """A model with all its names, and what they are."""

    model: onnx.ModelProto
    places: Mapping[str, Place]  # of the graph's values, by their names there; those without a grid have none
    weights: Mapping[str, str]  # the value that is a layer's weight, int8 or float, by the layer's name


def float_places(graph: Graph) -> dict[str, Place]:
    """Those of a file in float, whose values have the graph's names."""
    return {node.name: Place(node.name) for node in graph.nodes}
