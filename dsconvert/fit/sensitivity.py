"""How much each layer's weight error costs, measured: one layer quantized at a time, everything else float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.importance import Measure
from dsconvert.fit.least_squares import fit_weight
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import conv, float_step, run_float

REFERENCE_BITS = 4


def measure_damage(
    graph: Graph,
    params: Mapping[str, ConvParams],
    names: Sequence[str],
    batches: Sequence[Tensor],
    measure: Measure,
    block_size: int,
    widths: Sequence[int],
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, dict[int, float]]:
    """Convolution name -> bits -> squared change of `measure` over the batches (n, 3, h, w).

    Measured at `REFERENCE_BITS` with a least-squares weight and corrected channel means; the other widths follow by
    the ratio of their squared weight errors, as damage grows with the square of a small error."""
    totals = dict.fromkeys(names, 0.0)
    quick = {
        name: fit_weight(params[name].weight, REFERENCE_BITS, block_size, starts=(0.8,), rounds=1) for name in names
    }
    with torch.no_grad():
        for index, batch in enumerate(batches):
            values: dict[str, Tensor] = {}
            wanted = run_float(graph, params, batch, values.__setitem__)
            for done, name in enumerate(names):
                got = _rerun(graph, params, values, name, quick[name].weight())
                pairs = zip(measure(got, wanted), measure(wanted, wanted), strict=True)
                totals[name] += sum(float((a - b).double().square().sum()) for a, b in pairs)
                if progress:
                    progress(index * len(names) + done + 1, len(batches) * len(names))
    damage = {}
    for name in names:
        weight = params[name].weight.cpu()
        errors = {b: float((_quick(weight, b, block_size).weight() - weight).square().sum()) for b in widths}
        reference = float((quick[name].weight() - weight).square().sum())
        damage[name] = {b: totals[name] * error / max(reference, 1e-30) for b, error in errors.items()}
    return damage


def _quick(weight: Tensor, bits: int, block_size: int) -> DSTensor:
    """Least squares from one starting scale; at 8 bits plain per channel."""
    return fit_weight(weight, bits, block_size if bits < 8 else weight.shape[1], starts=(0.8,), rounds=1)


def _rerun(
    graph: Graph, params: Mapping[str, ConvParams], values: Mapping[str, Tensor], name: str, weight: Tensor
) -> list[Tensor]:
    """The outputs with one convolution's weight replaced; only what depends on it is computed again."""
    fresh: dict[str, Tensor] = {}
    last = graph.last_use()
    for index, node in enumerate(graph.nodes):
        if node.name == name:
            x = values[node.inputs[0]]
            made = conv(node, x, weight.to(x), params[name].bias)
            fresh[name] = made + (values[name] - made).mean((0, 2, 3), keepdim=True)
        elif any(x in fresh for x in node.inputs):
            fresh[node.name] = float_step(node, [fresh.get(x, values[x]) for x in node.inputs], params)
        for source in set(node.inputs):
            if last[source] == index:
                fresh.pop(source, None)
    return [fresh.get(x, values[x]) for x in graph.outputs]
