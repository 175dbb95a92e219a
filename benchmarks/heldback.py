"""The error of a fit on training images that it never saw: what every choice about the fit is made by.

    python benchmarks/heldback.py CHECKPOINT FOLDER --fit NAME
    python benchmarks/heldback.py yolov5n.pt coco500.yaml --samples 4 16 128 --seeds 0 1 --no-layers

FOLDER is a folder of images or a data.yaml. NAME is a file `fits/NAME.py` with a class `Fit`, or a name in
`named_fits.py`: docs/contributing.md walks through it. Held-back images are spread evenly, and the same for every fit.

First comes J of every layer (see `layer_error.py`), on the images of the fit and on those held back. The latter has its
standard error over images. The last column is its share of the second moment of what the float layer makes.

Then one line has the error of v, the numbers of `yolo.decode.detection_measure`: scores, and box centres and sizes as
far as they count. It is the sum of squared differences over an image, float network against converted one, both in
torch. Mean with its standard error, median, the same of layout openvino, seconds, and the brief fine-tune's curve.

With --folds N there are N sets of held-back images that share none, and a fit for each, which has all other images.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from layer_error import Watched, layer_error, layer_sums, watched
from named_fits import FITS, PRODUCT, Maker, named
from torch import Tensor

from dsconvert.base.errors import InputError
from dsconvert.base.threads import in_order
from dsconvert.convert.division import divided
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.record import Quantized
from dsconvert.export.onnx import in_layout
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.integer import real_params, run_integer
from dsconvert.graph.ir import ConvParams, Graph, display_name
from dsconvert.graph.run import run_float
from dsconvert.model.model import DSModel, is_dsconv
from dsconvert.photos.dataset import calibration_images
from dsconvert.photos.images import letterbox, read_image, spread, to_tensor
from dsconvert.yolo.checkpoint import load_checkpoint
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.lower import lower, split_detect
from dsconvert.yolo.network import Head

HEADINGS = ("layer", "width", "J, its images", "J held back", "+-", "ratio", "share held back")
ROW = "{:<24} {:>6} {:>14} {:>12} {:>9} {:>6} {:>16}"


@dataclass(frozen=True)
class Network:
    """The float network."""

    path: Path
    graph: Graph
    params: Mapping[str, ConvParams]
    head: Head

    @classmethod
    def of(cls, path: Path) -> Network:
        checkpoint = load_checkpoint(path)
        return cls(path, *split_detect(*lower(checkpoint.network.fused()), checkpoint.head), checkpoint.head)

    def watched(self, paths: Sequence[Path], options: QuantizeOptions) -> Watched:
        """Photographs, and positions drawn from them."""
        return watched(self.graph, self.params, self.head, paths, options.size, options.seed)


@dataclass(frozen=True)
class Result:
    """What one fit came to on its held-back images."""

    errors: tuple[Tensor, ...]  # of v by image, as it is and (with int8 activations) in layout openvino
    seen: Mapping[str, Tensor]  # `layer_sums` on the images of the fit; none where there are none, or nobody asked
    held: Mapping[str, Tensor]  # on those held back
    made: Quantized
    seconds: float  # of quantize


def folds(paths: Sequence[Path], held: int, count: int) -> list[tuple[list[Path], list[Path]]]:
    """So many times the images that a fit may have, and `held` images that it has not, evenly spread. No image is held
    back twice. Raises InputError where there are too few images."""
    away = spread(paths, held * count)
    if len(away) < held * count or held * count >= len(paths) or held < 2:
        raise InputError(f"{len(paths)} images are too few to hold back {count} times {held}, at least two.")
    made = []
    for first in range(count):
        gone = away[first::count]
        made.append(([path for path in paths if path not in set(gone)], gone))
    return made


def said(found: Tensor) -> str:
    """Mean with its standard error, and median, of the errors on some images."""
    return (
        f"{float(found.mean()):.3f} +- {float(found.std()) / len(found) ** 0.5:.3f}, median {float(found.median()):.3f}"
    )


def errors(network: Network, model: DSModel, paths: Sequence[Path]) -> Tensor:
    """The error of v on each image, float64."""

    def one(path: Path) -> float:
        x = to_tensor([letterbox(read_image(path), model.imgsz)[0]])
        wanted = run_float(network.graph, network.params, x)
        if model.activations:
            made = run_integer(model.graph, model.convs, model.activations, x)
        else:
            made = run_float(model.graph, real_params(model.convs), x)
        pairs = zip(*(detection_measure(raw, wanted, network.head) for raw in (wanted, made)), strict=True)
        return sum(float((a - b).double().square().sum()) for a, b in pairs)

    return torch.tensor(list(in_order(one, paths)), dtype=torch.float64)


def fitted(network: Network, paths: Sequence[Path], options: QuantizeOptions, fit: Maker) -> Quantized:
    """What `quantize` makes of the images, or of none, by that fit."""
    with TemporaryDirectory() as folder:
        listed = Path(folder) / "images.txt"
        listed.write_text("".join(f"{path.resolve()}\n" for path in paths))
        chosen = replace(options, calib=listed if paths else None)
        return quantize(load_checkpoint(network.path), chosen, by=fit)


def measured(
    network: Network,
    paths: Sequence[Path],
    held: Sequence[Path],
    on: Watched | None,
    options: QuantizeOptions,
    fit: Maker,
) -> Result:
    """Fit on images, or on none, and look at those held back; `on`: these, where J by layer is wanted."""
    began = time.perf_counter()
    made = fitted(network, paths, options, fit)
    seconds, model = time.perf_counter() - began, made.model
    layouts = [model, in_layout(model, layout_named("openvino"))] if model.activations else [model]
    found = tuple(errors(network, layout, held) for layout in layouts)
    if on is None:
        return Result(found, {}, {}, made, seconds)
    own = divided(paths, options.samples, False, options.finetune_steps != 0).fit
    seen = layer_sums(model, network.params, network.watched(own, options)) if own else {}
    return Result(found, seen, layer_sums(model, network.params, on), made, seconds)


def table(results: Sequence[Result]) -> list[str]:
    """J by layer, over the images of all folds."""
    models = [result.made.model for result in results]
    rows, shares = [ROW.format(*HEADINGS)], []
    for node in models[0].graph.convs():
        weights = [model.convs[node.name].weight for model in models]
        widths = {f"{w.bits}/{w.block_size}" if is_dsconv(w) else "int8" for w in weights}
        held = layer_error(torch.cat([result.held[node.name] for result in results]))
        row = [display_name(node), ", ".join(sorted(widths)), "", f"{held.j:.4g}", f"{held.uncertainty:.2g}", ""]
        shares.append((held.share, held.share))
        if results[0].seen:
            seen = layer_error(torch.cat([result.seen[node.name] for result in results]))
            row[2], row[5] = f"{seen.j:.4g}", f"{held.j / max(seen.j, 1e-30):.2f}"
            shares[-1] = seen.share, held.share
        rows.append(ROW.format(*row, f"{held.share:.4f}"))
    seen_share, held_share = (sum(each) / len(each) for each in zip(*shares, strict=True))
    known = f"{seen_share:.5f} on the images of the fit, " if results[0].seen else ""
    return [*rows, f"mean share over layers: {known}{held_share:.5f} held back"]


def tuned(result: Quantized) -> str:
    """What the brief fine-tune did."""
    if result.tuned is None:
        return "no fine-tune"
    looks = ", ".join(f"{look.held_back:.3f} at {look.step}" for look in result.tuned.curve)
    return f"its judges' error {looks}, step {result.tuned.kept} kept; activations alone {result.tuned.activations:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("folder", type=Path, help="of images, or a data.yaml")
    parser.add_argument("--fit", default=PRODUCT, help=f"a file fits/NAME.py, or one of {', '.join(FITS)}")
    parser.add_argument("--folds", type=int, default=1, help="sets of images held back, a fit for each")
    parser.add_argument("--held", type=int, default=48, help="images held back in each")
    parser.add_argument("--no-layers", action="store_true", help="leave J out, which takes as long as the fit")
    parser.add_argument("--samples", type=int, nargs="+", default=[128], help="images of a fit; 0 synthesises them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--target-size", type=int, help="bytes of the packed file (default: those of 4 bits)")
    parser.add_argument("--activations", choices=["int8", "float"], default="int8")
    parser.add_argument("--bits", type=int, help="of every weight (default: by layer)")
    parser.add_argument("--kds", choices=["int", "float"], default="int")
    parser.add_argument("--finetune-steps", type=int, help="of the brief fine-tune (default: as many as seem of use)")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    options = QuantizeOptions(
        imgsz=args.imgsz, bits=args.bits, target_bytes=args.target_size, activations=args.activations, kds=args.kds,
        finetune_steps=args.finetune_steps,
    )  # fmt: skip
    try:
        fit, network = named(args.fit), Network.of(args.checkpoint)
        divisions = folds(calibration_images(args.folder), args.held, args.folds)
        watching = [None if args.no_layers else network.watched(held, options) for _, held in divisions]
    except InputError as error:
        parser.error(str(error))
    for count in args.samples:
        for seed in args.seeds:
            chosen = replace(options, samples=count or 128, seed=seed)
            results = [
                measured(network, rest if count else [], held, on, chosen, fit)
                for (rest, held), on in zip(divisions, watching, strict=True)
            ]
            print("" if args.no_layers else "\n".join(table(results)) + "\n", end="")
            found = map(torch.cat, zip(*(result.errors for result in results), strict=True))
            ends = "; in layout openvino ".join(map(said, found))
            tunes = "; ".join(tuned(result.made) for result in results)
            seconds = sum(result.seconds for result in results)
            print(f"{args.fit}, {count} images, seed {seed}: error {ends}; {seconds:.0f} s; {tunes}", flush=True)


if __name__ == "__main__":
    main()
