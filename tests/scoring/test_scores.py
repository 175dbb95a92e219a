"""Scores of a converted network are the float network's: no grid is shared by numbers of different ranges."""

from __future__ import annotations

import pytest
import torch
from conftest import SIDE, TINY, convert, randomise, smooth_picture

from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.integer import run_integer
from dsconvert.model.file import load_model, model_bytes
from dsconvert.onnxfile.compact import compact
from dsconvert.onnxfile.engines import session
from dsconvert.yolo.decode import decode
from dsconvert.yolo.network import Network, head_from_detect

LAYOUTS = ["packed", "fused", "blocked", "int8"]


def one_class(objectness: float, logit: float) -> tuple[Network, object]:
    """A network of one class whose logit is not trained: about `logit` everywhere; objectness lies around another
    number, as a detector's background has it."""
    network = Network(TINY, nc=1, na=3).eval()
    randomise(network)
    network.requires_grad_(False)
    for level in network.detect.m:
        bias = level.bias.view(3, 6)
        bias[:, 4], bias[:, 5] = objectness, logit
    return network, head_from_detect(network.detect, [4, 8], ["pothole"])


@pytest.mark.parametrize("logit", [4.0, 16.0])
def test_the_logit_of_a_single_class_is_not_clipped(logit, tmp_path):
    """The shared grid of a network like this ended at 1.6, so that the class counted 0.83 instead of 1."""
    network, head = one_class(-6.0, logit)
    model = convert(network, head, smooth_picture())
    path = tmp_path / "model.safetensors"
    path.write_bytes(model_bytes(model))
    picture = smooth_picture()
    raw = run_integer(model.graph, model.convs, model.activations, picture)
    classes = decode(raw, head)[..., 5]
    wanted = decode([t.detach() for t in network(picture)], head)[..., 5]
    # sigmoid(4) rises by 0.018 a unit, and the 4-bit layers before move a logit by up to about one; clipping cost 0.15
    assert float((classes - wanted).abs().max()) < 0.03
    loaded = load_model(path)
    for layout in LAYOUTS:
        made = compact(export_quantized(loaded, layout_named(layout), SIDE))
        out = torch.from_numpy(session(made.SerializeToString(), 1).run(None, {"images": picture.numpy()})[0])
        # sigmoids of two libraries
        torch.testing.assert_close(out[..., 4:], decode(raw, head)[..., 4:], rtol=1e-5, atol=1e-5)


def test_box_objectness_and_class_have_grids_of_their_own(tmp_path):
    network, head = one_class(-6.0, 9.0)
    model = convert(network, head, smooth_picture())
    for level in range(2):
        grids = {part: model.activations[f"model.8.m.{level}.{part}"] for part in ("box", "obj", "cls")}
        assert len({(g.scale, g.zero_point) for g in grids.values()}) == 3
        assert (255 - grids["cls"].zero_point) * grids["cls"].scale > 8
        assert grids["obj"].zero_point > 128  # most of its range lies below 0
