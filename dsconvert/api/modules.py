"""Convert any torch module to DSConv: every Conv2d and Linear, fitted in the order in which they run.

The float module and the partly converted one run side by side, as in `fit.lockstep`, but with hooks. So whatever
happens between the layers stays the module's own code.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dsconvert.base.errors import InputError
from dsconvert.dsconv.codes import FREE
from dsconvert.dsconv.format import WeightFormat
from dsconvert.dsconv.modules import DSConv, fitted_conv
from dsconvert.dsconv.tensor import DSTensor
from dsconvert.fit.layer import GPTQ
from dsconvert.fit.seen import Seen, seen_evenly
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import Node

FITS = ("gptq", "least_squares")


@dataclass(frozen=True)
class ModulePlan:
    """How a module is converted.

    bits: of every layer, 2..8.
    block_size: input channels that share a shift (KDS).
    activations: None for float, or 8 to round inputs to 8 bits within the observed range.
    fit: gptq, or least_squares, which uses only the weights.
    seed: of all random choices.

    Raises InputError for other values.
    """

    bits: int = 4
    block_size: int = 32
    activations: int | None = None
    fit: str = "gptq"
    seed: int = 0

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8 or self.block_size < 1:
            raise InputError("bits must be 2 to 8, and block_size at least 1.")
        if self.activations not in (None, 8) or self.fit not in FITS:
            raise InputError(f"activations must be None or 8, and fit one of {', '.join(FITS)}.")


class DSLinear(nn.Module):
    """A Linear as a 1x1 DSConv."""

    def __init__(self, conv: DSConv) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., chi) to (..., cho)."""
        out = self.conv(x.reshape(-1, x.shape[-1], 1, 1))
        return out.reshape(*x.shape[:-1], out.shape[1])


class Rounded(nn.Module):
    """A layer whose input is rounded to 8 bits first."""

    def __init__(self, layer: nn.Module, grid: QParams) -> None:
        super().__init__()
        self.layer, self.scale, self.zero_point = layer, grid.scale, grid.zero_point

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(torch.fake_quantize_per_tensor_affine(x, self.scale, self.zero_point, 0, 255))


@torch.no_grad()
def quantize_module(module: nn.Module, batches: Sequence[Any], plan: ModulePlan | None = None) -> nn.Module:
    """Return a copy of the module, in evaluation mode, with DSConv for every Conv2d and Linear.

    batches: inputs for the module, each a tensor or a tuple of arguments; they are kept in memory.
    plan: None: the defaults.

    Some layers get the integers of least squares: layers that no batch reaches, grouped ones, and convolutions with
    unequal strides, paddings or dilations or with a padding mode. Layers with one channel a group get 8 bits.

    Raises InputError when there is no Conv2d and no Linear.
    """
    chosen = plan or ModulePlan()
    source = copy.deepcopy(module).eval()
    made = copy.deepcopy(source)
    names = {id(m): n for n, m in source.named_modules(remove_duplicate=True) if type(m) in (nn.Conv2d, nn.Linear)}
    if not names:
        raise InputError("The module has no Conv2d and no Linear layer, so there is nothing to convert.")
    order = _order(source, batches, names)
    for name in [*order, *(n for n in names.values() if n not in order)]:
        layer = source.get_submodule(name)
        seen = list(_seen(source, made, name, batches, chosen.seed)) if name in order else []
        fresh = _converted(layer, seen, chosen)
        for alias in [n for n, m in source.named_modules(remove_duplicate=False) if m is layer]:
            parent, _, last = alias.rpartition(".")
            if alias:
                made.get_submodule(parent)._modules[last] = fresh
            else:
                made = fresh
    return made


def _call(module: nn.Module, batch: Any) -> None:
    module(*batch) if isinstance(batch, (tuple, list)) else module(batch)


def _order(source: nn.Module, batches: Sequence[Any], names: dict[int, str]) -> list[str]:
    """Return the names of the layers that the first batch reaches, in the order in which it does."""
    found: dict[str, None] = {}
    hooks = [m.register_forward_pre_hook(lambda m, _: found.setdefault(names[id(m)]))
             for m in source.modules() if id(m) in names]  # fmt: skip
    for batch in batches[:1]:
        _call(source, batch)
    for hook in hooks:
        hook.remove()
    return list(found)


def _seen(source: nn.Module, made: nn.Module, name: str, batches: Sequence[Any], seed: int) -> Iterator[Seen]:
    """Yield what the layer gets in both modules, and what it gives in the float one, at every call."""
    layer, place = source.get_submodule(name), 0
    for batch in batches:
        for x, q in zip(*(_inputs(m, name, batch) for m in (source, made)), strict=True):
            x, q = _as_images(x, layer), _as_images(q, layer)
            y = _as_images(layer(x if isinstance(layer, nn.Conv2d) else x.flatten(1)), layer)
            yield from seen_evenly(q, y, seed, place)
            place += len(y)


def _inputs(module: nn.Module, name: str, batch: Any) -> list[Tensor]:
    """Return the layer's inputs in one forward pass."""
    caught: list[Tensor] = []
    layer = module.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0].detach().clone()))
    try:
        _call(module, batch)
    finally:
        hook.remove()
    return caught


def _as_images(x: Tensor, layer: nn.Module) -> Tensor:
    return x if isinstance(layer, nn.Conv2d) else x.reshape(-1, x.shape[-1], 1, 1)


def _converted(layer: nn.Module, seen: list[Seen], plan: ModulePlan) -> nn.Module:
    conv = layer if isinstance(layer, nn.Conv2d) else _as_conv(layer)
    bias = conv.bias if conv.bias is not None else torch.zeros(conv.out_channels)
    node = _node(conv)
    # with one channel a group, a shift would belong to a single weight, and plain int8 takes no more space
    format = WeightFormat(plan.bits if conv.weight.shape[1] > 1 else 8, plan.block_size, FREE)
    if seen and node is not None and plan.fit == "gptq":
        fitted = GPTQ().layer(node, conv.weight, format, lambda: seen)
    else:
        fitted = QConv(DSTensor.nearest(conv.weight, format), bias)
    made: nn.Module = fitted_conv(conv, fitted.weight, fitted.bias.detach()).eval()
    if isinstance(layer, nn.Linear):
        made = DSLinear(made)  # type: ignore[arg-type]
    if plan.activations and seen:
        made = Rounded(
            made, QParams.of_range(min(float(s.input.min()) for s in seen), max(float(s.input.max()) for s in seen))
        )
    return made


def _as_conv(layer: Any) -> nn.Conv2d:
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None])
    conv.bias = layer.bias
    return conv


def _node(conv: nn.Conv2d) -> Node | None:
    """Return the convolution as the fit knows it, or None if the fit does not."""
    attrs = {"stride": conv.stride, "padding": conv.padding, "dilation": conv.dilation}
    if conv.padding_mode != "zeros" or any(isinstance(v, str) or len(set(v)) > 1 for v in attrs.values()):
        return None
    return Node("conv", "layer", ("images",), {**{k: v[0] for k, v in attrs.items()}, "groups": conv.groups})
