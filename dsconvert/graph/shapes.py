"""Check that the nodes of a graph can be run one after another, by their shapes alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from dsconvert.graph.ir import INPUT, Graph, Node, Shape
from dsconvert.graph.ops import OPS


def check_node(node: Node) -> None:
    """Raise ValueError when the node's name, operation, inputs or attributes are not valid."""
    if not isinstance(node.name, str) or not 0 < len(node.name) <= 200 or not node.name.isprintable():
        raise ValueError("a node's name")
    if not isinstance(node.op, str) or node.op not in OPS:
        raise ValueError(f"operation of {node.name}")
    op = OPS[node.op]
    least, most = op.inputs
    if not least <= len(node.inputs) <= most:
        raise ValueError(f"inputs of {node.name}")
    if set(node.attrs) != set(op.attrs):
        raise ValueError(f"attributes of {node.name}")
    for key, allowed in op.attrs.items():
        if type(node.attrs[key]) not in (int, str) or node.attrs[key] not in allowed:
            raise ValueError(f"{key} of {node.name}")


def value_shapes(graph: Graph, weights: Mapping[str, Sequence[int]], image: Shape) -> dict[str, Shape]:
    """Return the shape of every value. Nodes must have passed `check_node`.

    weights: convolution name -> shape (cho, chi / groups, kh, kw).
    image: shape of the input.

    Raises ValueError where a node cannot take its inputs.
    """
    shapes = {INPUT: image}
    for node in graph.nodes:
        given = [shapes[name] for name in node.inputs]
        if node.op == "conv":
            given.append(tuple(weights[node.name]))
        shapes[node.name] = OPS[node.op].shape(node, given)
    return shapes
