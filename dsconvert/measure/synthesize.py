"""Make calibration images from the network alone, by matching its BatchNorm statistics.

Every BatchNorm layer stores the mean and variance of its inputs in training. Starting from smooth noise, the pixels are
optimised until the batch has these statistics at every layer (the idea of ZeroQ, arXiv 2001.00281). The statistics of a
detector are mostly about background. So the images are also asked to contain objects, or they would not exercise the
few positions that decide about detections.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dsconvert.base.size import Size
from dsconvert.base.threads import in_order
from dsconvert.fit import draws

BATCH = 8
LEARNING_RATE = 0.05
WISH = 0.1  # weight of the wish for objects beside the distance of the statistics

# (number of images, size, generator) -> a function from the network's output to a loss: how far it is from the objects
# wished for
Wish = Callable[[int, Size, torch.Generator], Callable[[Any], Tensor]]


def synthesize(
    network: nn.Module,
    count: int,
    size: Size,
    steps: int,
    seed: int,
    progress: Callable[[int, int], None] | None = None,
    wish: Wish | None = None,
) -> list[Tensor]:
    """Make at least `count` images in batches of (8, 3, h, w), 0..1; as many batches at a time as torch has threads.

    network: with BatchNorm.
    count: is rounded up to whole batches.
    size: height and width of the images.
    steps: of the optimiser, for each batch.
    wish: which objects the images shall contain; None: none.

    Raises ValueError when the network has no BatchNorm (a fused checkpoint).
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        raise ValueError("no BatchNorm statistics")
    rounds = -(-count // BATCH)

    def one(index: int) -> Tensor:
        own = copy.deepcopy(network)  # batches made at the same time must not share hooks
        return _batch(own, size, steps, draws.of_image(seed, index), wish)

    batches = []
    for done, batch in enumerate(in_order(one, range(rounds)), 1):
        batches.append(batch)
        if progress:
            progress(done, rounds)
    return batches


def _batch(network: nn.Module, size: Size, steps: int, generator: torch.Generator, wish: Wish | None) -> Tensor:
    """Make one batch (BATCH, 3, h, w), rounded to the steps of 8-bit images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    device = next(network.parameters()).device
    pixels = _smooth_noise(BATCH, size, generator).to(device).requires_grad_(True)
    doubt = wish(BATCH, size, generator) if wish else None
    optimiser = torch.optim.Adam([pixels], LEARNING_RATE)
    for _ in range(steps):
        loss, output = _distance(network, norms, pixels.sigmoid())
        if doubt:
            loss = loss + WISH * doubt(output)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return (pixels.detach().sigmoid() * 255).round() / 255


def _smooth_noise(count: int, size: Size, generator: torch.Generator) -> Tensor:
    """Return logits of noise at several scales: coarse blobs for large objects, fine noise for texture."""
    total = torch.zeros(count, *size.image)
    for cells in (4, 16, 64):
        coarse = torch.randn(count, 3, cells, cells, generator=generator)
        total += F.interpolate(coarse, size=size.pair, mode="bilinear", align_corners=False)
    return total


def _distance(network: nn.Module, norms: list[nn.BatchNorm2d], images: Tensor) -> tuple[Tensor, Any]:
    """Return the distance of the images' statistics from the BatchNorm layers', and the network's output.

    The distance sums the squared differences of mean and standard deviation, in units of the stored deviation.
    """
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
        output = network(images)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(terms).sum(), output
