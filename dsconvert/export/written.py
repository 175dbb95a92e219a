"""A written ONNX model, together with the names under which it holds the graph's values and weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from dsconvert.graph.grids import QParams
from dsconvert.graph.ir import Graph


@dataclass(frozen=True)
class Place:
    """Where a file holds a map of the graph, and in which form.

    The map is (n, channels, ny, nx), or (n, ny, nx, channels) if `last`. It is float, or uint8 on a grid.
    """

    name: str  # of the value in the file
    grid: QParams | None = None  # None for a float map
    last: bool = False  # whether the channels are the last dimension
    more: int = 0  # padding channels behind the graph's own


@dataclass(frozen=True)
class Written:
    """An ONNX model and the names of what it holds."""

    model: onnx.ModelProto
    places: Mapping[str, Place]  # of the graph's values by their names; values without a grid are missing
    weights: Mapping[str, str]  # layer name -> name of the value that is its weight, int8 or float


def float_places(graph: Graph) -> dict[str, Place]:
    """Return the places of a float file, where values have the graph's names."""
    return {node.name: Place(node.name) for node in graph.nodes}
