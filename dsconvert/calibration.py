"""The calibration images, and what they say of the float network: activation grids, what matters, what widths cost."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsconvert import workers
from dsconvert.dsconv.tensor import Width
from dsconvert.errors import InputError
from dsconvert.fit.channels import is_moment
from dsconvert.fit.importance import measure_importance
from dsconvert.fit.leftover import left_over
from dsconvert.fit.ranges import choose_grids
from dsconvert.fit.sensitivity import damage_of
from dsconvert.fit.synthesize import synthesize
from dsconvert.fit.threads import in_order
from dsconvert.graph.integer import QParams, keeps_grid
from dsconvert.graph.ir import INPUT, ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.graph.shapes import value_shapes
from dsconvert.modelcheck import check_grid
from dsconvert.yolo.checkpoint import Checkpoint
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.images import calibration_batches, none_readable
from dsconvert.yolo.network import Head
from dsconvert.yolo.wishes import wished

BATCH = 4
# What lockstep fitting may keep of both networks' values on one machine: 3 bytes each (half, uint8), or 6 with float
# activations (half, float32). More images than fit in are left out.
LOCKSTEP_BYTES = 5 << 28
MOST_VALUE = 60000  # of activations, which are kept as halves
SYNTHETIC_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_STEPS = 48, 320, 80

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Images:
    """uint8 batches (n, 3, side, side) that this process looks at, the place of the first of them among all `count`
    calibration images, and why files could not be read."""

    batches: list[Tensor]
    first: int
    count: int
    skipped: tuple[str, ...] = ()

    def real(self, device: str) -> Iterator[Tensor]:
        """The batches as the network reads them, 0..1, made one at a time."""
        return (b.to(device).float() / 255 for b in self.batches)

    def singles(self, device: str) -> Iterator[Tensor]:
        """The same, one image (1, 3, side, side) at a time."""
        return (image for batch in self.real(device) for image in batch.split(1))


@dataclass(frozen=True)
class Calibration:
    """Activation grids by value name (none: activations stay float), weights of every convolution's output positions
    in this process's images and the second moments of its output channels' gradients (see `Importance`), and the
    damage that each width of each layer would do."""

    own: Mapping[str, QParams]
    positions: Mapping[str, Tensor]
    channels: Mapping[str, Tensor]
    damage: Mapping[str, Mapping[Width, float]]


def check_calibration(
    found: Calibration,
    graph: Graph,
    params: Mapping[str, ConvParams],
    images: Images,
    widths: Mapping[str, Sequence[Width]],
    quantized: bool,
) -> None:
    """Raises ValueError or KeyError unless `found` can be what `calibrate` makes of the rest: it comes from a file."""
    if set(found.own) != ({INPUT, *(n.name for n in graph.nodes if not keeps_grid(n.op))} if quantized else set()):
        raise ValueError("grids")
    for name, grid in found.own.items():
        check_grid(name, grid)
    _, channels, height, width = images.batches[0].shape
    shapes = value_shapes(graph, {n: tuple(p.weight.shape) for n, p in params.items()}, (channels, height, width))
    mine = sum(map(len, images.batches))
    wanted = {n.name: (mine, shapes[n.name][1] * shapes[n.name][2]) for n in graph.convs()}
    if {name: tuple(w.shape) for name, w in found.positions.items()} != wanted:
        raise ValueError("shapes of positions")
    for weights in found.positions.values():
        if weights.dtype != torch.float32 or not bool(torch.isfinite(weights).all()) or float(weights.min()) < 0:
            raise ValueError("positions")
    if {name: tuple(c.shape) for name, c in found.channels.items()} != {
        n.name: (len(params[n.name].weight),) * 2 for n in graph.convs()
    }:
        raise ValueError("shapes of channels")
    for moment in found.channels.values():
        if moment.dtype != torch.float32 or not is_moment(moment):
            raise ValueError("channels")
    if {name: set(by_width) for name, by_width in found.damage.items()} != {n: set(w) for n, w in widths.items()}:
        raise ValueError("widths")
    if not all(math.isfinite(d) and d >= 0 for by_width in found.damage.values() for d in by_width.values()):
        raise ValueError("damage")


def decoded(paths: Sequence[Path], side: int, report: Progress) -> Images:
    """This process's part of the photographs, letterboxed; each is decoded once. Raises InputError when a process has
    none that can be read."""
    batches, skipped = [], []
    paths = paths[workers.share(len(paths), BATCH)]
    for batch, bad in calibration_batches(paths, side, BATCH):
        skipped += bad
        if len(batch):
            batches.append((batch * 255).round().to(torch.uint8))
        report("images", min(len(batches) * BATCH, len(paths)), len(paths))
    found = _placed(batches, [reason for reasons in workers.gathered(skipped) for reason in reasons])
    if not found.count:
        raise none_readable(found.skipped, "calibration images")
    if not all(workers.gathered(len(batches))):
        raise InputError(f"{found.count} calibration images are too few for {workers.count()} processes.")
    return found


def synthetic(checkpoint: Checkpoint, imgsz: int, samples: int, seed: int, report: Progress) -> Images:
    """Images made up from the checkpoint's BatchNorm statistics, with objects that it detects; as far as `samples`
    allows, each once more as its mirror image. Raises InputError where it has no such statistics left."""
    side, drawn = min(imgsz, SYNTHETIC_SIDE), min(samples, SYNTHETIC_IMAGES)
    try:
        batches = synthesize(
            checkpoint.network, drawn, side, SYNTHETIC_STEPS, seed,
            lambda done, total: report("synthesize", done, total), partial(wished, checkpoint.head),
        )  # fmt: skip
    except ValueError:
        raise InputError(
            f"{checkpoint.path} has its BatchNorm fused away, so images cannot be synthesised from it; give --calib."
        ) from None
    made = torch.cat(list(batches))[:drawn]
    made = torch.cat((made, made.flip(3)))[:samples]
    count = len(made)
    mine = made[workers.share(count, BATCH)]
    if count < workers.count():
        raise InputError(f"{count} calibration images are too few for {workers.count()} processes.")
    return _placed([(part * 255).round().to(torch.uint8).cpu() for part in mine.split(BATCH)])


def _placed(batches: list[Tensor], skipped: Sequence[str] = ()) -> Images:
    counts = workers.gathered(sum(map(len, batches)))
    return Images(batches, sum(counts[: workers.number()]), sum(counts), tuple(skipped))


def bounded(graph: Graph, params: Mapping[str, ConvParams], images: Images, device: str, value_bytes: int) -> Images:
    """As many of the batches, evenly spread, as may be kept at any time with so many bytes a value.

    Raises InputError when the network's values overflow on the first of them."""
    most = LOCKSTEP_BYTES // value_bytes // workers.here()
    sizes: dict[str, int] = {}
    batches = images.batches
    one = batches[0][:1].to(device).float() / 255

    def note(name: str, value: Tensor) -> None:
        if not float(value.abs().max()) < MOST_VALUE:  # NaN is not
            raise InputError(f"The values of layer {name} are infinite or beyond {MOST_VALUE}: it cannot be converted.")
        sizes[name] = value.numel()

    run_float(graph, params, one, note)
    alive, peak, last = 0, 0, graph.last_use()
    for index, node in enumerate(graph.nodes):
        alive += sizes[node.name]
        peak = max(peak, alive)
        alive -= sum(sizes[name] for name in set(node.inputs) if last[name] == index and name in sizes)
    fitting = max(1, most // (peak * len(batches[0])))
    count = min(fitting, len(batches))
    return replace(_placed([batches[i * len(batches) // count] for i in range(count)]), skipped=images.skipped)


def calibrate(
    graph: Graph,
    params: Mapping[str, ConvParams],
    head: Head,
    images: Images,
    widths: Mapping[str, Sequence[Width]],
    seed: int,
    device: str,
    quantized: bool,
    report: Progress,
) -> Calibration:
    """Look at the images once. `widths` are those of each layer whose damage is wanted; `quantized`: whether
    activations will be."""
    mine = sum(map(len, images.batches))

    def singles() -> Iterable[Tensor]:
        for done, image in enumerate(images.singles(device), 1):
            yield image
            report("importance", done, mine)

    def measure(raw: list[Tensor], reference: list[Tensor]) -> list[Tensor]:
        return detection_measure(raw, reference, head)

    chosen = list(widths)
    found = measure_importance(graph, params, singles(), measure, seed, chosen, images.first)
    own = choose_grids(graph, found.samples, found.clipping, seed) if quantized else {}
    damage: dict[str, dict[Width, float]] = {}
    if widths:
        again = images.singles(device)
        left = left_over(graph, params, again, found.positions, found.channels, images.count, seed, images.first)

        def foretold(name: str) -> dict[Width, float]:
            made = damage_of(params[name].weight.cpu(), widths[name], found.squares[name])
            return {width: d * left[name].of(width) if name in left else d for width, d in made.items()}

        damage = dict(zip(chosen, in_order(foretold, chosen), strict=True))
    return Calibration(own, found.positions, found.channels, damage)
