"""Choose the convolutions that become DSConv, from the words for blocks and scope."""

from __future__ import annotations

from dsconvert.base.errors import InputError
from dsconvert.graph.ir import Graph
from dsconvert.yolo.layers import C3_BLOCKS
from dsconvert.yolo.network import Network

SCOPES = ("bottleneck", "c3", "all")


def choose_layers(network: Network, blocks: str) -> list[int]:
    """Return the indices of the chosen C3 blocks: `all`, `head`, `backbone`, or indices such as `13,17,20,23`."""
    c3 = [i for i, kind in enumerate(network.kinds) if kind in C3_BLOCKS]
    if blocks == "all":
        return c3
    if blocks in ("head", "backbone"):
        return [i for i in c3 if (i >= network.backbone_length) == (blocks == "head")]
    try:
        wanted = [int(part) for part in blocks.split(",")]
    except ValueError:
        raise InputError.naming("{blocks} {} is not all, head, backbone or a list of layer indices.", blocks) from None
    wrong = [i for i in wanted if i not in c3]
    if wrong:
        raise InputError(f"Layer {wrong[0]} is not a C3 block; the C3 blocks of this model are {_join(c3)}.")
    return sorted(set(wanted))


def choose_convs(network: Network, graph: Graph, blocks: str, scope: str) -> frozenset[str]:
    """Return the names of the convolutions to convert.

    scope: `bottleneck` takes the convolutions inside the chosen blocks' bottlenecks, and `c3` all of the chosen blocks.
        `all` also takes other layers of the same part of the network: the whole head or backbone, or the layers between
        the first and the last index.

    The stem (layer 0) and Detect are never among them. The layers that make a segmentation network's prototypes belong
    to the head. A network without C3 blocks (YOLOv7) has only the scope `all`.

    Raises InputError when nothing is chosen.
    """
    if scope not in SCOPES:
        raise InputError.naming("{scope} {} is not one of {}.", scope, ", ".join(SCOPES))
    chosen = choose_layers(network, blocks)
    if not chosen and (scope != "all" or any(kind in C3_BLOCKS for kind in network.kinds)):
        raise InputError("This model has no C3 block to convert there.")
    last = len(network.kinds) - 1
    words = {
        "all": range(1, last),
        "head": range(network.backbone_length, last),
        "backbone": range(1, network.backbone_length),
    }
    part = words[blocks] if blocks in words else range(chosen[0], chosen[-1] + 1)
    layers = set(part) if scope == "all" else set(chosen)
    names = set()
    for node in graph.convs():
        layer, inner = int(node.name.split(".")[1]), node.name.split(".")[2]
        proto = layer == last and inner == "proto" and scope == "all" and blocks in ("all", "head")
        if proto or (layer in layers and 0 < layer < last and (scope != "bottleneck" or inner == "m")):
            names.add(node.name)
    if not names:
        raise InputError("The chosen blocks hold no convolution of that scope.")
    return frozenset(names)


def _join(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers)) or "none"
