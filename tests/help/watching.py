"""What layers see of a few images, every position counting the same."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dsconvert.base.kept import Room
from dsconvert.fit import draws
from dsconvert.fit.seen import Drawn, Places
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float


def watch(
    graph: Graph, params: Mapping[str, ConvParams], images: Sequence[Tensor], seed: int, room: Room | None = None
) -> dict[str, Drawn]:
    """Positions drawn evenly from images (3, h, w) 0..1, and the float network's outputs there, for every
    convolution."""
    drawn = {node.name: Drawn(room or Room(), len(images)) for node in graph.convs()}
    most = draws.positions_each(len(images))
    for index, image in enumerate(images):

        def note(name: str, value: Tensor, index: int = index) -> None:
            if name in drawn:
                flat = value[0].flatten(1)
                even = torch.ones(flat.shape[1], dtype=torch.float64)
                places = Places(*draws.positions(even, draws.of_image(seed, index), most))
                drawn[name].put(places)
                drawn[name].put_outputs(index, flat[:, places.picks.to(flat.device)].cpu())

        run_float(graph, params, image[None], note)
    return drawn
