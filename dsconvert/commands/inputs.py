"""Options that say which input an ONNX file wants."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from dsconvert.commands.shared import Numbers
from dsconvert.onnxfile.presets import Preset, named_preset
from dsconvert.photos.form import FITS, SCALES

# The parameters that the options fill, as `chosen_input` takes them.
INPUT_OPTIONS = ("input", "mean", "std", "bgr", "scale", "fit", "pad")
_OPTIONS = (
    click.option("--input", metavar="NAME", help="Of an .onnx: whose input it wants (yolov5, yolox, nanodet, picodet, "
                 "imagenet, ...), or FILE.yaml:NAME."),
    click.option("--mean", type=Numbers(), metavar="R,G,B",
                 help="Of an .onnx: (pixel / scale - mean) / std; images are cropped unless --fit says else."),
    click.option("--std", type=Numbers(), metavar="R,G,B", help="See --mean."),
    click.option("--bgr/--rgb", "bgr", default=None, help="Of an .onnx: which channel comes first."),
    click.option("--scale", type=click.Choice([str(s) for s in SCALES]),
                 help="Of an .onnx: pixels are divided by it; 1: they stay 0..255."),
    click.option("--fit", type=click.Choice(FITS), help="Of an .onnx: how images fill its input."),
    click.option("--pad", type=click.IntRange(0, 255), help="Of an .onnx: grey around images."),
)  # fmt: skip


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the options to a command, which hands them to `chosen_input`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_input(options: dict[str, Any]) -> Preset | None:
    """The preset of --input (default: YOLOv5's) with what was said besides in its place; None where nothing was said.

    --mean and --std alone are a classifier's: then images are cropped."""
    said = {name: options[name] for name in INPUT_OPTIONS if options[name] is not None}
    if not said:
        return None
    name = said.pop("input", None)
    preset = Preset() if name is None else named_preset(name)
    if name is None and said.keys() & {"mean", "std"}:
        said = {"fit": "crop", **said}
    if "scale" in said:
        said["scale"] = int(said["scale"])
    return replace(preset, form=replace(preset.form, **said))
