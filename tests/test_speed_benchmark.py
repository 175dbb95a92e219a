"""The speed benchmark's own arithmetic: counts, profiles, peaks, growth points, and the page."""

from __future__ import annotations

import sys

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, TINY

from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint, yolov5_bytes
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Network, head_from_detect

sys.path.insert(0, str(ROOT / "benchmarks"))

import growth
import performance_page
import profiles


def test_multiplications_of_hand_counted_convolutions():
    nodes = (
        Node("conv", "a", ("images",), {"stride": 2, "padding": 1, "dilation": 1, "groups": 1}),
        Node("conv", "b", ("a",), {"stride": 1, "padding": 0, "dilation": 1, "groups": 2}),
    )
    params = {
        "a": ConvParams(torch.zeros(4, 3, 3, 3), torch.zeros(4)),
        "b": ConvParams(torch.zeros(6, 2, 1, 1), torch.zeros(6)),
    }
    # a: 4 x 8 x 8 outputs of 27 products; b: 6 x 8 x 8 of 2
    assert profiles.network_macs(Graph(nodes, ("b",)), params, 16) == 4 * 64 * 27 + 6 * 64 * 2


def test_profiles_are_medians_over_the_runs_after_the_warm_up():
    def node(kind: str, at: int, took: int) -> dict:
        return {"cat": "Node", "name": f"n_{kind}_kernel_time", "ts": at, "dur": took, "args": {"op_name": kind}}

    events = [{"cat": "Session", "name": "model_run", "ts": 1000 * i, "dur": 900} for i in range(4)]
    for i, (conv, add) in enumerate([(500, 90), (100, 10), (120, 20), (300, 30)]):
        events += [
            node("Conv", 1000 * i + 5, conv),
            node("Conv", 1000 * i + 600, 100),
            node("Add", 1000 * i + 800, add),
        ]
    events.append({"cat": "Node", "name": "n_Conv_fence_before", "ts": 5, "dur": 7, "args": {"op_name": "Conv"}})
    assert profiles.by_kind(events, 1) == {"Conv": 0.22, "Add": 0.02}


def test_profile_of_a_real_file(tmp_path, tiny):
    path = tmp_path / "chain.onnx"
    path.write_bytes(profiles.conv_chain(8, 8, 3).SerializeToString())
    running = ort.InferenceSession(str(path))
    out = running.run(None, {"x": np.full((1, 8, 8, 8), 128, np.uint8)})[0]
    assert (out == 128).all()  # zero in, zero out
    product = ort.InferenceSession(profiles.matrix_product(16).SerializeToString())
    assert np.abs(product.run(None, {"x": np.eye(16, dtype=np.uint8)})[0]).max() <= 63  # the matrix itself
    from dsconvert.export.onnx import export_float

    network, head = tiny
    float_path = tmp_path / "f.onnx"
    float_path.write_bytes(export_float(*lower(network.fuse()), head, 64).SerializeToString())
    times = profiles.op_times(float_path, 1, 3)
    assert times["Conv"] > 0
    assert list(times.values()) == sorted(times.values(), reverse=True)


def test_random_networks_grow_and_stay_alive(tmp_path):
    like = Network(TINY, nc=2, na=3).eval()
    like.detect.anchors.copy_(torch.rand(like.detect.anchors.shape) + 1)
    head = head_from_detect(like.detect, [4, 8], ["cat", "dog"])
    counts = {}
    for size in ("n", "s"):
        path = tmp_path / f"{size}.pt"
        growth.random_checkpoint(Checkpoint(like, head, path, 0, 16, ""), size, path)
        counts[size] = growth.parameters(path)
        raw = load_checkpoint(path).network(torch.rand(1, 3, 64, 64))
        assert all(0.01 < t.std() < 100 for t in raw)
    assert 3 < counts["s"] / counts["n"] < 4  # twice the width: four times the weights, but for the ends


def test_a_growth_point_is_a_process_of_its_own(tmp_path, tiny):
    import cv2

    network, head = tiny
    (tmp_path / "best.pt").write_bytes(yolov5_bytes(network, head))
    (tmp_path / "images").mkdir()
    for i in range(3):
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), noise)
    found = growth.point(tmp_path / "best.pt", tmp_path / "images", 64, 2, 1)
    assert found["images"] == 2
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 100 << 20  # torch alone
    with pytest.raises(SystemExit, match="failed"):
        growth.point(tmp_path / "none.pt", tmp_path / "images", 64, 2, 1)


def times(median: float, ratio: float) -> tuple[dict, dict]:
    return (
        {"median_ms": median, "min_ms": median - 1, "spread_ms": 0.5, "runs": 9},
        {"value": ratio, "low": ratio - 0.1, "high": ratio + 0.1},
    )


def results() -> dict:
    about = {
        "command": "python speed.py",
        "machine": {"cpu": "Some CPU", "int8": "no VNNI", "threads": 2, "imgsz": 640, "checkpoint": "n.pt",
                    "versions": {"onnxruntime": "1"}},
    }  # fmt: skip
    timed = {n: times(10.0 * (i + 1), 1.0 + i / 2) for i, n in enumerate(("float32", "packed"))}
    models, ratios = ({n: t[k] for n, t in timed.items()} for k in (0, 1))
    sizes = {"packed": 1000, "ort-convs": 2000, "ort-all": 2500, "nncf weights": 4000, "checkpoint": 10000}
    return {
        "sizes": {**about, "bytes": sizes},
        "latency": {**about, "base": "float32", "models": models, "ratios": ratios, "faster peer": "ort-all",
                    "packed / faster peer": times(1, 0.8)[1]},
        "load": {**about, "base": "float32", "models": models, "ratios": ratios,
                 "peak bytes": {"float32": 1 << 20, "packed": 2 << 20}},
        "roofline": {**about, "macs": 2_000_000_000, "peak GMAC/s": {"best": 400.0, "other": 300.0}, "packed ms": 20.0,
                     "QLinearConv ms": 10.0},
    }  # fmt: skip


def test_figures_are_held_against_their_targets():
    found = {(f.what, f.against): f for f in performance_page.figures(results())}
    assert found["packed file", "ONNX Runtime int8 file"].value == 0.5  # against the smaller one
    assert found["packed file", "ONNX Runtime int8 file"].row.endswith("| **no** |")
    assert found["packed file", "NNCF int8 weights"].row.endswith("| 0.48 | 0.25 |  | yes |")
    assert found["packed file", "the checkpoint `.pt`"].value == 0.1
    assert found["session load, packed", "float32"].row.endswith("| 1.50 | 1.50 | 1.40 to 1.60 | yes |")
    assert len(found) == 6  # nothing is said about what was not measured


def test_the_page_has_what_was_measured_and_a_plot_only_of_growth(tmp_path):
    target = tmp_path / "docs" / "performance.md"
    performance_page.write_page(results(), target)
    text = target.read_text()
    assert text.count("Some CPU") == 1  # one machine, named once
    assert "| the whole packed file | 20.00 | 100 | 0.25 |" in text
    assert "| its QLinearConv nodes | 10.00 | 200 | 0.50 |" in text
    assert "Growth" not in text
    pytest.importorskip("matplotlib")
    points = [{"images": n, "seconds": 2.0 * n, "peak_bytes": 1 << 30} for n in (2, 4, 8)]
    grown = {**results()["sizes"], "imgsz": 320, "by images": points, "by size": []}
    performance_page.write_page({"growth": grown}, target)
    assert "Seconds grow with images to the power 1.00." in target.read_text()
    assert target.with_suffix(".svg").exists()


def test_exponent_of_a_power_law():
    assert performance_page.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)
