"""Calibration images from nothing but the network: pictures whose features have the BatchNorm statistics.

Every BatchNorm layer remembers the mean and variance its inputs had in training. Starting from smooth noise, the
pixels are optimised until the batch shows those statistics at every layer (the idea of ZeroQ, arXiv 2001.00281).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH = 8
LEARNING_RATE = 0.05


def synthesize(
    network: nn.Module,
    count: int,
    side: int,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
) -> list[Tensor]:
    """Batches of images (8, 3, side, side), 0..1, `count` images in all (rounded up to whole batches).

    Raises ValueError when the network has no BatchNorm left (a fused checkpoint).
    """
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    if not norms:
        raise ValueError("no BatchNorm statistics")
    generator = torch.Generator().manual_seed(seed)
    device = next(network.parameters()).device
    batches = []
    rounds = -(-count // BATCH)
    for index in range(rounds):
        pixels = _smooth_noise(BATCH, side, generator).to(device).requires_grad_(True)
        optimiser = torch.optim.Adam([pixels], LEARNING_RATE)
        for step in range(steps):
            loss = _distance(network, norms, pixels.sigmoid())
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            if progress:
                progress(index * steps + step + 1, rounds * steps)
        # the grid of 8-bit images, which is what the network will be fed
        batches.append((pixels.detach().sigmoid() * 255).round() / 255)
    return batches


def _smooth_noise(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Logits of noise at several scales: coarse blobs for large objects, fine grain for texture."""
    total = torch.zeros(count, 3, side, side)
    for cells in (4, 16, 64):
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        total += F.interpolate(coarse, size=(side, side), mode="bilinear", align_corners=False)
    return total


def _distance(network: nn.Module, norms: list[nn.BatchNorm2d], images: Tensor) -> Tensor:
    """Sum over BatchNorm layers of the squared differences of mean and deviation, in units of the deviation."""
    terms: list[Tensor] = []

    def compare(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        x = args[0]
        wanted = norm.running_var.clamp_min(1e-6).sqrt()
        mean = (x.mean((0, 2, 3)) - norm.running_mean) / wanted
        deviation = x.var((0, 2, 3)).clamp_min(1e-12).sqrt() / wanted - 1
        terms.append(mean.square().mean() + deviation.square().mean())

    hooks = [norm.register_forward_pre_hook(compare) for norm in norms]
    try:
        network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(terms).sum()
