"""Options that describe the input of an ONNX file."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import click

from dsconvert.commands.shared import Numbers
from dsconvert.onnxfile.presets import Preset, named_preset
from dsconvert.photos.form import FITS, SCALES

# the parameters of these options, as `chosen_input` takes them
INPUT_OPTIONS = ("input", "mean", "std", "bgr", "scale", "fit", "pad")
_OPTIONS = (
    click.option("--input", metavar="NAME", help="For an .onnx: its family (yolov5, yolox, nanodet, picodet, imagenet, "
                 "...), or FILE.yaml:NAME."),
    click.option("--mean", type=Numbers(), metavar="R,G,B",
                 help="For an .onnx: (pixel / scale - mean) / std; images are cropped unless --fit is given."),
    click.option("--std", type=Numbers(), metavar="R,G,B", help="See --mean."),
    click.option("--bgr/--rgb", "bgr", default=None, help="For an .onnx: the order of colours."),
    click.option("--scale", type=click.Choice([str(s) for s in SCALES]),
                 help="For an .onnx: pixels are divided by this; 1 keeps 0..255."),
    click.option("--fit", type=click.Choice(FITS), help="For an .onnx: how images fill the input."),
    click.option("--pad", type=click.IntRange(0, 255), help="For an .onnx: grey value around images."),
)  # fmt: skip


def input_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options to a command, which hands them to `chosen_input`."""
    for option in reversed(_OPTIONS):
        command = option(command)
    return command


def chosen_input(options: dict[str, Any]) -> Preset | None:
    """Return the preset of --input (default: YOLOv5's), changed by the other options; None if no option was given.

    --mean and --std alone describe a classifier, so images are cropped then.
    """
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
