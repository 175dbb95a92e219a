"""What widths finer than a layer would save.

    python benchmarks/finer_widths.py --checkpoint yolov5n.pt --data coco500.yaml

Output channels of every layer, sorted by what a rounding error there does, are cut into equal parts, each with a width
of its own. Damage is what `measure.damage` foretells. Widths are chosen by the damage on one set of images, and judged
by the damage on another, at the bytes that whole layers take. A part is counted with the nodes that unpack it, and once
more as if it were --shared bytes smaller, for nodes that parts might share.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsconvert.base.kept import Room
from dsconvert.base.size import Size
from dsconvert.dsconv.format import WeightFormat
from dsconvert.measure.calibration import decoded
from dsconvert.measure.damage import damage_of, formats_of
from dsconvert.measure.importance import measure_importance
from dsconvert.measure.leftover import Left, left_over
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.images import spread
from dsconvert.widths.allocate import Choice, allocate
from dsconvert.widths.size import BITS, BLOCK_SIZES, stored_bytes
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.plan import choose_convs

PARTS = (2, 4)
SMALLEST = 8  # output channels of a part


@dataclass(frozen=True)
class Layer:
    """A convolution's weight, the share of damage that the fit leaves, and squared gradients on both sets of images."""

    weight: Tensor
    left: Left
    squares: tuple[Tensor, Tensor]

    def parts(self, count: int) -> list[Tensor]:
        """Output channels in so many parts at most, those of most damage first."""
        first = self.squares[0].flatten(1).sum(1) * self.weight.flatten(1).square().mean(1)
        return list(torch.argsort(first, descending=True).chunk(max(1, min(count, len(first) // SMALLEST))))

    def damage(self, channels: Tensor) -> dict[WeightFormat, tuple[float, float]]:
        """By width, that of some channels on both sets."""
        weight = self.weight[channels]
        widths = formats_of(weight.shape[1], BITS, BLOCK_SIZES)
        first, second = (damage_of(weight, widths, squares[channels]) for squares in self.squares)
        return {w: (first[w] * self.left.of(w), second[w] * self.left.of(w)) for w in widths}


def measured(checkpoint: Path, data: Path, imgsz: int, samples: int) -> dict[str, Layer]:
    """The layers, looked at on two sets of images."""
    loaded = load_checkpoint(checkpoint)
    graph, params = split_detect(*lower(loaded.network.fused()), loaded.head)
    chosen = sorted(choose_convs(loaded.network, graph, "all", "all"))
    squares: list[Mapping[str, Tensor]] = []
    left: dict[str, Left] = {}
    paths = spread(calibration_images(data), 2 * samples)
    for mine in (paths[::2], paths[1::2]):
        images = decoded(mine, Size.of(imgsz), 0, lambda *told: None, Room())
        singles = (images.one(i, "cpu") for i in range(images.part.mine))
        measure = partial(detection_measure, head=loaded.head)
        found = measure_importance(graph, params, singles, measure, 0, chosen, images.part, Room())
        squares.append(found.squares)
        one = partial(images.one, device="cpu")
        left = left or left_over(graph, params, one, found.drawn, found.channels, images.part, images.photographs)
    first, second = squares
    whole = Left(1.0, 1.0)
    return {n: Layer(params[n].weight, left.get(n, whole), (first[n], second[n])) for n in chosen}


@dataclass(frozen=True)
class Part:
    """Some output channels of a layer: the bytes and the damage of each width, and whether they are the whole layer."""

    sizes: Mapping[WeightFormat, int]
    damage: Mapping[WeightFormat, tuple[float, float]]
    whole: bool


def cut(layers: Mapping[str, Layer], count: int) -> dict[str, Part]:
    """The layers in so many parts at most."""
    made = {}
    for name, layer in layers.items():
        parts = layer.parts(count)
        for index, channels in enumerate(parts):
            shape, damage = torch.Size((len(channels), *layer.weight.shape[1:])), layer.damage(channels)
            made[f"{name}/{index}"] = Part({w: stored_bytes(shape, w) for w in damage}, damage, len(parts) == 1)
    return made


def allocated(parts: Mapping[str, Part], budget: int, shared: int) -> tuple[float, float]:
    """Total damage on both sets within a budget of bytes, each part of a layer that many bytes smaller."""
    options = {
        key: [Choice(w, part.sizes[w] - (0 if part.whole else shared), first) for w, (first, _) in part.damage.items()]
        for key, part in parts.items()
    }
    made = [parts[key].damage[choice.format] for key, choice in allocate(options, budget).items()]
    return sum(first for first, _ in made), sum(second for _, second in made)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--samples", type=int, default=128, help="images of each of the two sets")
    parser.add_argument("--budgets", type=int, nargs="+", default=[519_000, 890_000], help="bytes of all layers")
    parser.add_argument("--shared", type=int, default=120, help="bytes that a part might share with others")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    layers = measured(args.checkpoint, args.data, args.imgsz, args.samples)
    whole, finer = cut(layers, 1), {count: cut(layers, count) for count in PARTS}
    for budget in args.budgets:
        before = allocated(whole, budget, 0)
        for count, parts in finer.items():
            for shared in (0, args.shared):
                same, other = (a / b for a, b in zip(allocated(parts, budget, shared), before, strict=True))
                said = f"damage {same:.3f} on the images that chose, {other:.3f} on others"
                print(f"{budget} bytes, {count} parts, {shared} bytes shared: {said}", flush=True)


if __name__ == "__main__":
    main()
