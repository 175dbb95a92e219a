"""Define what a converted model learns: changes of its shifts and biases and, on request, of its integers.

A latent is the change of one tensor; latents of 0 are the model as it is. With u the latent,

    CDSw, alpha    are multiplied by exp(u); alpha (the paper's real KDS) keeps its sign
    m              becomes round(m exp(u)), from 1 up to the largest m at which no engine's sums saturate
    VQK            becomes round(VQK + u), within its bits and the same bound
    CDSb           becomes CDSb + u

Gradients pass straight through the rounding. In plain int8 layers m is 1 and does not learn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
from torch import Tensor

from dsconvert.dsconv.codes.free_search import to_blocks
from dsconvert.dsconv.format import INT8_MAX, M_MAX, PAIR_MAX
from dsconvert.dsconv.tensor import DSTensor, expand_blocks
from dsconvert.graph.integer import QConv
from dsconvert.model.model import Converted

TRAINED = ("shifts", "shifts+bias", "all")
PAIRED = PAIR_MAX // 2  # two neighbours of up to this size never saturate together
# learning rate of each kind of latent, relative to CDSw's
PACE = {"cdsw": 1.0, "cdsb": 1.0, "m": 1.0, "alpha": 1.0, "vqk": 5.0}

Model = TypeVar("Model", bound=Converted)
Latents = dict[str, Tensor]  # "<convolution>.<part>" -> float32


@dataclass(frozen=True)
class Parts:
    """The numbers of one convolution, float32, on the device on which it is trained.

    vqk: (cho, chi, kh, kw).
    kds: m or alpha, (cho, nblk, kh, kw).
    cds_w, bias: (cho,).
    """

    vqk: Tensor
    kds: Tensor
    cds_w: Tensor
    bias: Tensor
    block_size: int

    def to(self, device: str) -> Parts:
        """Return a copy on another device."""
        cds_w, bias = self.cds_w.to(device), self.bias.to(device)
        return Parts(self.vqk.to(device), self.kds.to(device), cds_w, bias, self.block_size)

    def unscaled(self) -> Tensor:
        """Return W' / CDSw, (cho, chi, kh, kw)."""
        return expand_blocks(self.kds, self.vqk.shape[1], self.block_size) * self.vqk


@dataclass(frozen=True)
class Layer:
    """A convolution's numbers before training, and the bounds within which they may change.

    start: the numbers before training.
    m_most: the largest m, of m's shape.
    reach: the largest |m * VQK|, of m's shape.
    vqk_low, vqk_high: the bounds of VQK, of its shape.
    """

    start: Parts
    m_most: Tensor
    reach: Tensor
    vqk_low: Tensor
    vqk_high: Tensor

    @staticmethod
    def of(conv: QConv, device: str, moving: bool) -> Layer:
        """Return the layer of a convolution.

        moving: whether VQK learns too, so that m must allow any integer of its bits. VQK along a trellis never learns.
        """
        w = conv.weight
        low, high = _vqk_bounds(w)
        largest = _block_amax(w)
        m = w.m.float()
        bound = (
            torch.full_like(m, w.format.most_m)
            if moving and w.format.code.movable
            else (PAIRED // largest.clamp_min(1)).clamp_max(M_MAX)
        )
        reach = torch.where(m * largest <= PAIRED, PAIRED, INT8_MAX).float()
        start = Parts(w.vqk.float(), m, w.cds_w, conv.bias, w.block_size)
        return Layer(
            start.to(device), torch.maximum(bound, m).to(device), reach.to(device), low.to(device), high.to(device)
        )

    def parts(self, name: str, latents: Mapping[str, Tensor]) -> Parts:
        """Return the numbers that the latents stand for, differentiable in them."""
        s = self.start

        def get(part: str) -> Tensor | None:
            return latents.get(f"{name}.{part}")

        kds, vqk, cds_w, bias = s.kds, s.vqk, s.cds_w, s.bias
        if (u := get("m")) is not None:
            kds = _straight((kds * u.exp()).clamp_min(1).minimum(self.m_most))
        if (u := get("alpha")) is not None:
            kds = kds * u.exp()
        if (u := get("vqk")) is not None:
            vqk = self._bounded_vqk(vqk + u, kds.detach(), get("alpha") is not None)
        if (u := get("cdsw")) is not None:
            cds_w = cds_w * u.exp()
        if (u := get("cdsb")) is not None:
            bias = bias + u
        return replace(s, kds=kds, vqk=vqk, cds_w=cds_w, bias=bias)

    def _bounded_vqk(self, wanted: Tensor, kds: Tensor, real: bool) -> Tensor:
        """Round VQK within its bits and, unless KDS are real, within the largest |m * VQK|."""
        wanted = wanted.maximum(self.vqk_low).minimum(self.vqk_high)
        if not real:
            most = expand_blocks(
                torch.div(self.reach, kds, rounding_mode="floor"), wanted.shape[1], self.start.block_size
            )
            wanted = wanted.minimum(most).maximum(-most)
        return _straight(wanted)


def start(model: Converted, train: str, device: str) -> tuple[dict[str, Layer], Latents]:
    """Return every convolution's layer, and latents of 0 for all that learns.

    train: one of TRAINED.
    """
    layers: dict[str, Layer] = {}
    latents: Latents = {}
    for name, conv in model.convs.items():
        w = conv.weight
        layers[name] = Layer.of(conv, device, train == "all")
        shaped = {"cdsw": w.cds_w}
        if w.format.code.real:
            shaped["alpha"] = w.m
        elif not w.is_plain_int8:
            shaped["m"] = w.m
        if train != "shifts":
            shaped["cdsb"] = conv.bias
        if train == "all" and w.format.code.movable:
            shaped["vqk"] = w.vqk
        latents |= {f"{name}.{p}": torch.zeros(v.shape, device=device, requires_grad=True) for p, v in shaped.items()}
    return layers, latents


@torch.no_grad()
def hold(layers: Mapping[str, Layer], latents: Mapping[str, Tensor]) -> None:
    """Bring latents back into the bounds of their integers; beyond these they have no gradient and would never
    return.
    """
    for key, u in latents.items():
        name, part = key.rsplit(".", 1)
        layer = layers[name]
        if part == "m":
            kds = layer.start.kds
            u.copy_(u.maximum(-kds.log()).minimum((layer.m_most / kds).log()))
        elif part == "vqk":
            vqk = layer.start.vqk
            u.copy_(u.maximum(layer.vqk_low - vqk).minimum(layer.vqk_high - vqk))


@torch.no_grad()
def learned(model: Model, layers: Mapping[str, Layer], latents: Mapping[str, Tensor]) -> Model:
    """Return the model that the latents stand for, on CPU. Tensors without a latent are taken over unchanged."""
    convs = {}
    for name, conv in model.convs.items():
        parts, w = layers[name].parts(name, latents), conv.weight
        have = {p for p in PACE if f"{name}.{p}" in latents}
        weight = replace(
            w,
            stored=parts.vqk.cpu().to(torch.int8) if "vqk" in have else w.stored,
            m=parts.kds.cpu().to(w.m.dtype) if have & {"m", "alpha"} else w.m,
            cds_w=parts.cds_w.cpu() if "cdsw" in have else w.cds_w,
        )
        convs[name] = QConv(weight, parts.bias.cpu() if "cdsb" in have else conv.bias)
    return replace(model, convs=convs)


def share(model: Converted, latents: Mapping[str, Tensor]) -> float:
    """Return the number of latents, as a share of the network's weights and biases."""
    biases = sum(c.bias.numel() for c in model.convs.values())
    return sum(u.numel() for u in latents.values()) / (model.weight_count + biases)


def _straight(wanted: Tensor) -> Tensor:
    """Round, with the gradient of the unrounded value."""
    return torch.fake_quantize_per_tensor_affine(wanted, 1.0, 0, -INT8_MAX, INT8_MAX)


def _vqk_bounds(w: DSTensor) -> tuple[Tensor, Tensor]:
    """Return the lowest and the highest value of each VQK, float: the limits of its bits.

    In plain int8 layers a VQK may exceed PAIRED if its neighbour leaves room. Each of the two may use half of the room.
    """
    low, high = (torch.full(w.vqk.shape, float(limit)) for limit in w.format.limits)
    if not w.is_plain_int8:
        return low, high
    v = w.vqk.float()
    if v.shape[1] % 2:  # with an odd number of channels any two may become neighbours
        most = max(float(PAIRED), float(v.abs().max()))
        return low.clamp_min(-most), high.clamp_max(most)
    room = ((PAIR_MAX - (v[:, 0::2] + v[:, 1::2]).abs()) / 2).floor().clamp_min(0).repeat_interleave(2, 1)
    return low.maximum(v - room), high.minimum(v + room)


def _block_amax(w: DSTensor) -> Tensor:
    """Return the largest |VQK| of every block, float (cho, nblk, kh, kw)."""
    return to_blocks(w.vqk.float().abs(), w.block_size).amax(2).reshape(w.m.shape)
