"""Read the calibration images and measure the float network on them.

The result holds activation grids, the importance of positions, and the expected damage of each format.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.kept import Kept, Room
from dsconvert.base.size import Size
from dsconvert.base.threads import in_order
from dsconvert.dsconv.format import WeightFormat
from dsconvert.fit import draws
from dsconvert.fit.channels import is_moment
from dsconvert.fit.moments import TOGETHER
from dsconvert.fit.seen import Drawn, check_drawn
from dsconvert.graph.grids import QParams
from dsconvert.graph.integer import gridded
from dsconvert.graph.ir import ConvParams, Graph
from dsconvert.graph.run import run_float
from dsconvert.graph.shapes import value_shapes
from dsconvert.measure.damage import damage_of
from dsconvert.measure.grids import choose_grids
from dsconvert.measure.importance import Part, measure_importance
from dsconvert.measure.leftover import left_over
from dsconvert.measure.outputs import Outputs
from dsconvert.measure.synthesize import synthesize
from dsconvert.measure.views import WANTED, view, wanted
from dsconvert.model.check import check_grid
from dsconvert.photos.entry import UNIT, Entry
from dsconvert.photos.images import letterbox, none_readable, read_image
from dsconvert.yolo.checkpoint import Checkpoint
from dsconvert.yolo.wishes import wished

MOST_VALUE = 60000  # largest activation that can be converted, as activations are kept in half precision
# images made from a checkpoint alone: their number, longest side in pixels, and optimisation steps
SYNTHETIC_IMAGES, SYNTHETIC_SIDE, SYNTHETIC_STEPS = 48, 320, 80
FEW = 32  # synthesised images are added to fewer photographs than this

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Images:
    """The calibration images of this process, letterboxed."""

    pixels: Kept  # this process's images (3, h, w), uint8
    part: Part  # which images of the whole set they are
    size: Size  # of each image
    # how many of them are photographs and not views of photographs; these come first (see `measure.views`)
    photographs: int
    skipped: tuple[str, ...] = ()  # one reason for each file that could not be read
    # how many images of all processes were synthesised and added to the photographs; these come last
    synthesised: int = 0
    entry: Entry = UNIT  # how the network reads an image's bytes

    def one(self, index: int, device: str) -> Tensor:
        """Return an image (1, 3, h, w) as the network reads it."""
        return self.entry.real(self.pixels.get(index).to(device))[None]

    def all_photographs(self) -> int:
        """Return how many images of all processes are photographs, not views of them."""
        return sum(workers.gathered(self.photographs))

    def digest(self) -> str:
        """Return a SHA-256 digest of all pixels of this process."""
        digest = hashlib.sha256()
        for index in range(self.part.mine):
            digest.update(self.pixels.get(index).numpy().tobytes())
        return digest.hexdigest()


@dataclass(frozen=True)
class Calibration:
    """What the images tell about the float network."""

    own: Mapping[str, QParams]  # value name -> activation grid; empty where activations stay float
    drawn: Mapping[str, Drawn]  # convolution name -> positions drawn from this process's images (see `Importance`)
    channels: Mapping[str, Tensor]  # convolution name -> second moment of its output gradients (see `Importance`)
    damage: Mapping[str, Mapping[WeightFormat, float]]  # layer name -> format -> expected damage


def check_calibration(
    found: Calibration,
    graph: Graph,
    params: Mapping[str, ConvParams],
    images: Images,
    formats: Mapping[str, Sequence[WeightFormat]],
    quantized: bool,
) -> None:
    """Raise ValueError or KeyError unless a calibration read from a file can be the result of `calibrate`.

    found: the calibration to check.
    graph, params: the float network.
    images: the calibration images.
    formats: layer name -> the formats whose damage was measured.
    quantized: whether activations are quantized.
    """
    if set(found.own) != (gridded(graph) if quantized else set()):
        raise ValueError("grids")
    for name, grid in found.own.items():
        check_grid(name, grid)
    sizes = {n: tuple(p.weight.shape) for n, p in params.items()}
    shapes = value_shapes(graph, sizes, images.size.image)
    most = draws.positions_each(images.part.all)
    if set(found.drawn) != {n.name for n in graph.convs()}:
        raise ValueError("positions")
    for name, drawn in found.drawn.items():
        check_drawn(drawn, images.part.mine, shapes[name][1] * shapes[name][2], most)
    if {name: tuple(c.shape) for name, c in found.channels.items()} != {
        n.name: (len(params[n.name].weight),) * 2 for n in graph.convs()
    }:
        raise ValueError("shapes of channels")
    for moment in found.channels.values():
        if moment.dtype != torch.float32 or not is_moment(moment):
            raise ValueError("channels")
    if {name: set(by_format) for name, by_format in found.damage.items()} != {n: set(f) for n, f in formats.items()}:
        raise ValueError("formats")
    if not all(math.isfinite(d) and d >= 0 for by_format in found.damage.values() for d in by_format.values()):
        raise ValueError("damage")


def decoded(
    paths: Sequence[Path], size: Size, seed: int, report: Progress, room: Room, beside: Tensor | None = None
) -> Images:
    """Read this process's share of the photographs, letterboxed.

    If there are few photographs, views of them are added (see `measure.views`), and then the images `beside`.

    paths: the files.
    size: height and width of the images.
    seed: decides the views.
    report: called with a stage, the number done and the total.
    room: keeps the pixels, in memory or on disk.
    beside: synthesised images (n, 3, h, w), uint8, or None.

    Raises InputError when a process has no image that can be read.
    """
    made_up = torch.empty(0, *size.image, dtype=torch.uint8) if beside is None else beside
    # with few images every process reads all, because a view may combine any of them
    whole = workers.count() == 1 or len(paths) < WANTED
    if not whole:
        paths = paths[workers.share(len(paths), TOGETHER)]
    pixels, count, skipped = room.kept(len(paths), size.image, torch.uint8), 0, []

    for done, image in enumerate(in_order(partial(_read, size=size), paths), 1):
        if isinstance(image, str):
            skipped.append(image)
        else:
            pixels.put(count, image)
            count += 1
        report("images", done, len(paths))
    if not whole:
        skipped = [reason for reasons in workers.gathered(skipped) for reason in reasons]
    share = range(count)
    if whole and count:
        total = wanted(count) + len(made_up)
        share = range(total)[workers.share(total, TOGETHER)]
        pixels = with_views(pixels, count, share, seed, room, made_up)
    photographs = len(range(count)[share.start : share.stop])
    found = replace(_placed(pixels, len(share), size, photographs, skipped), synthesised=len(made_up))
    if not found.part.all:
        raise none_readable(found.skipped, "calibration images")
    if not all(workers.gathered(found.part.mine)):
        raise InputError(f"{found.part.all} calibration images are too few for {workers.count()} processes.")
    return found


def _read(path: Path, size: Size) -> Tensor | str:
    """Return a photograph, letterboxed (3, h, w), uint8; or the reason why it cannot be read."""
    try:
        return torch.from_numpy(letterbox(read_image(path), size)[0]).permute(2, 0, 1)
    except InputError as error:
        return str(error)


def photographs_of(paths: Sequence[Path], size: Size) -> list[Tensor]:
    """Return the photographs that can be read, letterboxed (3, h, w), uint8."""
    return [image for image in in_order(partial(_read, size=size), paths) if not isinstance(image, str)]


def with_views(
    photographs: Kept, count: int, share: range, seed: int, room: Room, beside: Sequence[Tensor] | Tensor = ()
) -> Kept:
    """Return a process's share of all images: photographs, then views of them, then the images `beside`.

    photographs: holds `count` images (3, h, w).
    share: indices of this process's images among all.
    """
    if share == range(count):
        return photographs
    kept, viewed = room.like(len(share), photographs.get(0)), wanted(count)

    def made(index: int) -> Tensor:
        if index < count:
            return photographs.get(index)
        return view(photographs.get, count, index - count, seed) if index < viewed else beside[index - viewed]

    for place, image in enumerate(in_order(made, share)):
        kept.put(place, image)
    photographs.free()
    return kept


def synthetic(
    checkpoint: Checkpoint, imgsz: Size, samples: int, seed: int, report: Progress, room: Room
) -> Images:  # fmt: skip
    """Make calibration images from the checkpoint's BatchNorm statistics, with objects that it detects.

    samples: most images. If there is room, each image is followed by its mirror image.

    Raises InputError where the checkpoint has no BatchNorm statistics.
    """
    size, drawn = imgsz.within(SYNTHETIC_SIDE), min(samples, SYNTHETIC_IMAGES)
    try:
        made = _synthesised(checkpoint, drawn, size, seed, report)[:samples]
    except ValueError:
        raise InputError.naming(
            "{} has its BatchNorm fused away, so images cannot be synthesised from it; give {images}.", checkpoint.path
        ) from None
    if len(made) < workers.count():
        raise InputError(f"{len(made)} calibration images are too few for {workers.count()} processes.")
    mine = made[workers.share(len(made), TOGETHER)]
    pixels = room.kept(len(mine), size.image, torch.uint8)
    for index, image in enumerate(mine):
        pixels.put(index, image)
    return _placed(pixels, len(mine), size, len(mine))


def beside_few(checkpoint: Checkpoint, photographs: int, size: Size, seed: int, report: Progress) -> Tensor | None:
    """Make synthesised images (n, 3, h, w), uint8, to be added to fewer than FEW photographs.

    Returns None for FEW or more photographs, and for a checkpoint without BatchNorm statistics.
    """
    if photographs >= FEW:
        return None
    try:
        made = _synthesised(checkpoint, SYNTHETIC_IMAGES, size.within(SYNTHETIC_SIDE), seed, report)
    except ValueError:
        return None
    return tiled(made, size)


def tiled(pictures: Tensor, size: Size) -> Tensor:
    """Put pictures (n, 3, a, b) side by side until they cover `size`, and cut them to it: (m, 3, h, w)."""
    high, wide = pictures.shape[-2:]
    down, across = -(-size.height // high), -(-size.width // wide)
    each = down * across
    pictures = pictures.repeat(-(-each // len(pictures)), 1, 1, 1) if len(pictures) < each else pictures
    grids = pictures[: len(pictures) // each * each].unflatten(0, (-1, down, across))
    whole = grids.permute(0, 3, 1, 4, 2, 5).reshape(-1, 3, down * high, across * wide)
    return whole[:, :, : size.height, : size.width].contiguous()


def _synthesised(checkpoint: Checkpoint, count: int, size: Size, seed: int, report: Progress) -> Tensor:
    """Make `count` pictures with objects that the checkpoint detects, followed by their mirror images.

    Returns (2 count, 3, h, w), uint8. Raises ValueError where the checkpoint has no BatchNorm statistics.
    """
    batches = synthesize(
        checkpoint.network, count, size, SYNTHETIC_STEPS, seed,
        lambda done, total: report("synthesize", done, total), partial(wished, checkpoint.head),
    )  # fmt: skip
    made = torch.cat(batches)[:count]
    return (torch.cat((made, made.flip(3))) * 255).round().to(torch.uint8).cpu()


def _placed(pixels: Kept, mine: int, size: Size, photographs: int, skipped: Sequence[str] = ()) -> Images:
    """Return this process's images with their place among all processes' images."""
    counts = workers.gathered(mine)
    return Images(pixels, Part(sum(counts[: workers.number()]), mine, sum(counts)), size, photographs, tuple(skipped))


def check_values(graph: Graph, params: Mapping[str, ConvParams], image: Tensor) -> None:
    """Raise InputError if a value of the network is infinite or too large on an image (1, 3, h, w)."""

    def check(name: str, value: Tensor) -> None:
        if not float(value.abs().max()) < MOST_VALUE:  # written so that NaN fails
            raise InputError(f"The values of layer {name} are infinite or beyond {MOST_VALUE}: it cannot be converted.")

    run_float(graph, params, image, check)


def calibrate(
    graph: Graph,
    params: Mapping[str, ConvParams],
    outputs: Outputs,
    images: Images,
    formats: Mapping[str, Sequence[WeightFormat]],
    seed: int,
    device: str,
    quantized: bool,
    report: Progress,
    room: Room,
) -> Calibration:
    """Measure the float network on the images, in one pass.

    graph, params: the float network.
    outputs: turns its raw maps into the numbers that count.
    images: the calibration images.
    formats: layer name -> the formats whose expected damage is measured.
    seed: decides all draws.
    device: where the network runs.
    quantized: whether activation grids are chosen.
    report: called with a stage, the number done and the total.
    room: keeps what is drawn from the images, in memory or on disk.
    """

    def singles() -> Iterator[Tensor]:
        for index in range(images.part.mine):
            yield images.one(index, device)
            report("importance", index + 1, images.part.mine)

    chosen = list(formats)
    found = measure_importance(graph, params, singles(), outputs.measure, seed, chosen, images.part, room)
    own: dict[str, QParams] = {}
    if quantized:
        own = choose_grids(graph, found.samples, found.clipping, seed, outputs.reach(graph), images.entry.grid)
        own |= outputs.pinned(graph)
    damage: dict[str, dict[WeightFormat, float]] = {}
    if formats:
        again = partial(images.one, device=device)
        left = left_over(graph, params, again, found.drawn, found.channels, images.part, images.all_photographs())

        # the damage of rounding alone, times the share of it that the fit is expected to leave
        def foretold(name: str) -> dict[WeightFormat, float]:
            made = damage_of(params[name].weight.cpu(), formats[name], found.squares[name])
            return {f: d * left[name].of(f) if name in left else d for f, d in made.items()}

        damage = dict(zip(chosen, in_order(foretold, chosen), strict=True))
    return Calibration(own, found.drawn, found.channels, damage)


def float_outputs(
    graph: Graph, params: Mapping[str, ConvParams], images: Images, drawn: Mapping[str, Drawn], device: str
) -> None:
    """Compute the float network's outputs at positions that were drawn before."""

    def one(index: int) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}

        def note(name: str, value: Tensor) -> None:
            if name in drawn:
                picks = drawn[name].get(index).picks
                found[name] = value[0].flatten(1)[:, picks.to(value.device)].cpu()

        run_float(graph, params, images.one(index, device), note)
        return found

    for index, found in enumerate(in_order(one, range(images.part.mine))):
        for name, outputs in found.items():
            drawn[name].put_outputs(index, outputs)
