"""The error of a fit on training images that it never saw: what every choice about the fit is made by.

    python benchmarks/heldback.py --checkpoint yolov5n.pt --data coco500.yaml --samples 4 16 128 --seeds 0 1

v are the numbers of `yolo.decode.detection_measure`: scores, and box centres and sizes as far as they count. The error
is the sum of squared differences of v over an image, float network against converted one, both run in torch. Held-back
images are the same for every fit of a run: a spread over the training images, which none of the fits has.
Prints one line a fit: the mean over the held-back images with its standard error, the median, the same of layout
openvino, seconds, and the brief fine-tune's curve.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from dsconvert.export.layouts import layout_named
from dsconvert.export.onnx import in_layout
from dsconvert.fit.threads import in_order
from dsconvert.graph.integer import real_params, run_integer
from dsconvert.graph.run import run_float
from dsconvert.model import DSModel
from dsconvert.options import QuantizeOptions
from dsconvert.pipeline import quantize
from dsconvert.record import Quantized
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.dataset import calibration_images
from dsconvert.yolo.decode import detection_measure
from dsconvert.yolo.images import letterbox, read_image, spread, to_tensor
from dsconvert.yolo.lower import lower, split_detect


def apart(paths: Sequence[Path], held: int) -> tuple[list[Path], list[Path]]:
    """The images that fits may have, and `held` images that none of them has, evenly spread."""
    away = spread(paths, held)
    gone = set(away)
    return [path for path in paths if path not in gone], away


def said(found: torch.Tensor) -> str:
    """Mean with its standard error, and median, of the errors on some images."""
    return (
        f"{float(found.mean()):.3f} +- {float(found.std()) / len(found) ** 0.5:.3f}, median {float(found.median()):.3f}"
    )


def errors(checkpoint: Checkpoint, model: DSModel, paths: Sequence[Path]) -> torch.Tensor:
    """The error of v on each image, float64."""
    graph, params = split_detect(*lower(checkpoint.network.fused()), checkpoint.head)

    def one(path: Path) -> float:
        x = to_tensor([letterbox(read_image(path), model.imgsz)[0]])
        wanted = run_float(graph, params, x)
        if model.activations:
            made = run_integer(model.graph, model.convs, model.activations, x)
        else:
            made = run_float(model.graph, real_params(model.convs), x)
        pairs = zip(*(detection_measure(raw, wanted, checkpoint.head) for raw in (wanted, made)), strict=True)
        return sum(float((a - b).double().square().sum()) for a, b in pairs)

    return torch.tensor(list(in_order(one, paths)), dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="data.yaml or folder")
    parser.add_argument("--samples", type=int, nargs="+", default=[128], help="images of a fit; 0 synthesises them")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--held", type=int, default=48, help="images held back")
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--target-size", type=int, help="bytes of the packed file (default: those of 4 bits)")
    parser.add_argument("--activations", choices=["int8", "float"], default="int8")
    parser.add_argument("--bits", type=int, help="of every weight (default: by layer)")
    parser.add_argument("--kds", choices=["int", "float"], default="int")
    parser.add_argument("--finetune-steps", type=int, help="of the brief fine-tune (default: as many as seem of use)")
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    rest, held = apart(calibration_images(args.data), args.held)
    for count in args.samples:
        for seed in args.seeds:
            with TemporaryDirectory() as folder:
                listed = Path(folder) / "images.txt"
                listed.write_text("".join(f"{path.resolve()}\n" for path in rest))
                options = QuantizeOptions(
                    calib=listed if count else None, imgsz=args.imgsz, samples=count or 128, seed=seed, bits=args.bits,
                    target_bytes=args.target_size, activations=args.activations, kds=args.kds,
                    finetune_steps=args.finetune_steps,
                )  # fmt: skip
                began = time.perf_counter()
                result = quantize(load_checkpoint(args.checkpoint), options)
                seconds, model = time.perf_counter() - began, result.model
            found = [errors(load_checkpoint(args.checkpoint), model, held)]
            if model.activations:
                found.append(errors(load_checkpoint(args.checkpoint), in_layout(model, layout_named("openvino")), held))
            ends = "; in layout openvino ".join(map(said, found))
            print(f"{count} images, seed {seed}: error {ends}; {seconds:.0f} s; {tuned(result)}", flush=True)


def tuned(result: Quantized) -> str:
    """What the brief fine-tune did."""
    if result.tuned is None:
        return "no fine-tune"
    looks = ", ".join(f"{look.held_back:.3f} at {look.step}" for look in result.tuned.curve)
    return f"its judges' error {looks}, step {result.tuned.kept} kept; activations alone {result.tuned.activations:.3f}"


if __name__ == "__main__":
    main()
