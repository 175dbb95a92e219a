"""J by layer: how far a converted network's layers are from the float network's, on photographs of any kind.

J of a layer is the objective of its fit (`dsconvert.fit.gptq`): the squared error of its outputs, summed over output
channels. The layer gets the quantized network's own inputs. Positions are drawn as for a fit, and each is weighted by
its importance to the network's result. Unlike in the fit, CDSb is given: means that do not match count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from dsconvert.base.kept import Room
from dsconvert.base.size import Size
from dsconvert.dsconv.format import WeightFormat
from dsconvert.fit.layer import Batches
from dsconvert.fit.lockstep import fit_lockstep
from dsconvert.fit.seen import Drawn, Seen
from dsconvert.graph.integer import QConv
from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.graph.ops import conv
from dsconvert.measure.calibration import Images, calibrate, photographs_of
from dsconvert.measure.importance import Part
from dsconvert.measure.outputs import Detections
from dsconvert.model.model import DSModel
from dsconvert.yolo.network import Head


@dataclass(frozen=True)
class Watched:
    """Photographs, and what was drawn from them."""

    images: Images
    drawn: Mapping[str, Drawn]  # by convolution name


def watched(
    graph: Graph, params: Mapping[str, ConvParams], head: Head, paths: Sequence[Path], size: Size, seed: int
) -> Watched:
    """The photographs as they are, without views; positions drawn from them as `quantize` does."""
    pictures, room = photographs_of(paths, size), Room()
    pixels = room.kept(len(pictures), size.image, torch.uint8)
    for index, picture in enumerate(pictures):
        pixels.put(index, picture)
    images = Images(pixels, Part(0, len(pictures), len(pictures)), size, len(pictures))
    found = calibrate(graph, params, Detections(head), images, {}, seed, "cpu", False, lambda *_: None, room)
    return Watched(images, found.drawn)


def layer_sums(model: DSModel, params: Mapping[str, ConvParams], on: Watched) -> dict[str, Tensor]:
    """By convolution name, (images, 3) float64: weighted squared errors, weighted squares of the float network's
    outputs, and weights, each summed over an image's positions."""
    look = _Look(model, {})
    formats = {name: made.weight.format for name, made in model.convs.items()}
    on_them = on.images.pixels, on.drawn, on.images.part.mine
    fit_lockstep(model.graph, params, look, formats, model.activations, *on_them)
    return look.found


@dataclass(frozen=True)
class _Look:
    """A fit that fits nothing, and sums up what its layers see."""

    model: DSModel
    found: dict[str, Tensor]  # by convolution name

    def layer(self, node: Node, weight: Tensor, format: WeightFormat, batches: Batches) -> QConv:
        made = self.model.convs[node.name]
        self.found[node.name] = torch.stack([_sums(node, made, seen) for seen in batches()])
        return made


def _sums(node: Node, made: QConv, seen: Seen) -> Tensor:
    outputs = conv(node, seen.real(seen.input)[None], made.weight.weight(), made.bias)[0].flatten(1)[:, seen.picks]
    wanted, weights = seen.float_output.double(), seen.weights.double()
    error = ((outputs.double() - wanted).square() @ weights).sum()
    return torch.stack((error, (wanted.square() @ weights).sum(), weights.sum()))


@dataclass(frozen=True)
class LayerError:
    """J of a layer over some images."""

    j: float  # squared error of its outputs, summed over output channels
    uncertainty: float  # standard error over images
    share: float  # of the second moment of the float network's outputs


def layer_error(sums: Tensor) -> LayerError:
    """From the sums of each image (images, 3), see `layer_sums`."""
    error, square, weight = sums.sum(0).tolist()
    j = error / max(weight, 1e-30)
    apart = (sums[:, 0] - j * sums[:, 2]).square().sum().sqrt()  # of a quotient of two sums
    return LayerError(j, float(apart) / max(weight, 1e-30), error / max(square, 1e-30))
