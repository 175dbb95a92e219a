"""The speed benchmark's own arithmetic: counts, profiles, peaks, growth points, and the page."""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager

import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import ROOT, TINY
from pt_writer import yolov5_bytes

from dsconvert.graph.ir import ConvParams, Graph, Node
from dsconvert.measure.calibration import FEW
from dsconvert.yolo.checkpoint import Checkpoint, load_checkpoint
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Network, head_from_detect

sys.path.insert(0, str(ROOT / "benchmarks"))

import conversion
import growth
import performance_page
import profiles
import speed


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
    float_path.write_bytes(export_float(*lower(network.fused()), head, 64).SerializeToString())
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
    for i in range(FEW + 1):  # beside fewer than FEW, images would be synthesised
        noise = np.random.default_rng(i).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        cv2.imwrite(str(tmp_path / "images" / f"{i}.png"), noise)
    found = growth.point(tmp_path / "best.pt", tmp_path / "images", 64, FEW, 1, 4)
    assert found["images"] == FEW
    assert found["seconds"] > 0
    assert found["peak_bytes"] > 100 << 20  # torch alone
    with pytest.raises(SystemExit, match="ended with"):
        growth.point(tmp_path / "none.pt", tmp_path / "images", 64, 2, 1, None)


def times(median: float, ratio: float) -> tuple[dict, dict]:
    return (
        {"median_ms": median, "min_ms": median - 1, "spread_ms": 0.5, "runs": 9},
        {"value": ratio, "low": ratio - 0.1, "high": ratio + 0.1},
    )


def about() -> dict:
    return {
        "command": "python speed.py", "date": "2026-01-02",
        "machine": {"cpu": "Some CPU", "int8": "no VNNI", "threads": 2, "imgsz": 640, "checkpoint": "n.pt", "load": 0.1,
                    "versions": {"onnxruntime": "1"}},
    }  # fmt: skip


def results() -> dict:
    timed = {n: times(10.0 * (i + 1), 1.0 + i / 2) for i, n in enumerate(("float32", "packed"))}
    models, ratios = ({n: t[k] for n, t in timed.items()} for k in (0, 1))
    sizes = {"packed": 1000, "ort-convs": 2000, "ort-all": 2500, "nncf weights": 4000, "checkpoint": 10000}
    return {
        "sizes": {**about(), "bytes": sizes},
        "latency": {**about(), "base": "float32", "models": models, "ratios": ratios, "faster peer": "ort-all",
                    "packed / faster peer": times(1, 0.8)[1]},
        "load": {**about(), "base": "float32", "models": models, "ratios": ratios,
                 "peak bytes": {"float32": 1 << 20, "packed": 2 << 20}},
        "roofline": {**about(), "macs": 2_000_000_000, "peak GMAC/s": {"best": 400.0, "other": 300.0},
                     "packed ms": 20.0, "QLinearConv ms": 10.0},
    }  # fmt: skip


def conversions() -> dict:
    """Results of everything that times `quantize` or a start."""
    start = {"now": times(100, 1)[0], "before": times(101, 1)[0], "ratio": {"value": 1.01, "low": 0.99, "high": 1.02}}
    slower = {**start, "ratio": {"value": 1.05, "low": 1.02, "high": 1.08}}
    busy = {"a core": 1, "seconds": [24.0, 30.0], "idle seconds": [10.0, 10.0], "ratio": 2.7, "turns": [2.4, 3.0]}
    sizes = [("n", 2.0, 10.0), ("s", 7.0, 24.0), ("m", 21.0, 70.0), ("x", 87.0, 240.0)]
    return {
        "quantize": {**about(), "seconds": [20.0, 22.0, 30.0], "nncf seconds": [10.0, 8.0, 9.0], "decoding": 1.0,
                     "images": 128, "nncf": "3", "ratio": 22 / 9, "turns": [2.0, 30 / 9]},
        "busy": {**about(), "cores": 2, "samples": 64, "by neighbours": [busy, {**busy, "a core": 3, "ratio": 5.9}]},
        "many": {**about(), "imgsz": 640, "points": [
            {"images": 128, "seconds": [10.0], "peak_bytes": 1 << 30, "ratio": 1.0, "turns": [1.0, 1.0]},
            {"images": 512, "seconds": [24.0], "peak_bytes": 2 << 30, "ratio": 2.4, "turns": [2.4, 2.4]}]},
        "memory": {**about(), "imgsz": 640, "samples": 1024, "seconds": 100.0, "peak_bytes": 5 << 30},
        "networks": {**about(), "imgsz": 320, "by size": [
            {"size": n, "parameters": p * 1e6, "images": 8, "seconds": s, "peak_bytes": 1 << 30} for n, p, s in sizes]},
        "start": {**about(), "starts": {"dsconvert --help": start, "import dsconvert": slower}, "processes": 41},
    }  # fmt: skip


def held(r: dict) -> dict[tuple[str, str], str]:
    """The last cells of every figure: found, its spread, whether it holds."""
    return {(f.what, f.against): f.row.split(" | ", 3)[3].removesuffix(" |") for f in performance_page.figures(r)}


def test_figures_are_held_against_their_targets():
    found = {(f.what, f.against): f for f in performance_page.figures(results())}
    assert found["packed file", "ONNX Runtime int8 file"].value == 0.5  # against the smallest one
    assert found["packed file", "ONNX Runtime int8 file"].row.endswith("| **no** |")
    assert found["packed file", "NNCF int8 weights"].row.endswith("| 0.48 | 0.25 |  | yes |")
    assert found["packed file", "the checkpoint `.pt`"].value == 0.1
    assert found["session load, packed", "float32"].row.endswith("| 1.50 | 1.50 | 1.40 to 1.60 | yes |")
    assert len(found) == 6  # nothing is said about what was not measured


def test_what_converting_takes_is_held_against_its_targets():
    found = held(conversions())
    assert found == {
        ("quantize, 128 decoded images", "NNCF post-training quantization"): "2.44 | 2.00 to 3.33 | yes",
        ("the demo's quantize beside 1 busy process a core", "the same, idle"): "2.70 | 2.40 to 3.00 | **no**",
        ("the demo's quantize beside 3 busy processes a core", "the same, idle"): "5.90 | 2.40 to 3.00 | yes",
        ("quantize, 512 images", "128 images"): "2.40 | 2.40 to 2.40 | yes",
        ("peak memory of quantize, 1024 images at 640", "GiB"): "5.00 |  | **no**",
        ("quantize, yolov5s", "yolov5n"): "2.40 |  | yes",
        ("quantize, yolov5m", "yolov5n"): "7.00 |  | **no**",
        ("quantize, yolov5x", "yolov5n"): "24.00 |  | yes",
        ("`dsconvert --help`", "before numba"): "1.01 | 0.99 to 1.02 | yes",  # not slower, but for chance
        ("`import dsconvert`", "before numba"): "1.05 | 1.02 to 1.08 | **no**",
    }


def test_engines_are_compared_in_one_precision(tmp_path):
    """NNCF's file and ours, both with float parts in f32, make the figure; what the engine chooses is in the table."""
    timed = {"nncf in f32": times(20, 1), "blocked in f32": times(19, 0.9), "float32 in bf16": times(18, 0.8)}
    models, ratios = ({n: t[k] for n, t in timed.items()} for k in (0, 1))
    measured = {"openvino": {**about(), "base": "nncf in f32", "models": models, "ratios": ratios}}
    performance_page.write_page(measured, tmp_path / "performance.md")
    text = (tmp_path / "performance.md").read_text()
    assert list(held(measured).values()) == ["0.90 | 0.80 to 1.00 | yes"]
    assert "| dsconvert blocked, its float parts in f32 | 19.0 |" in text
    assert "| float32 ONNX, in bf16 | 18.0 |" in text
    del models["blocked in f32"], ratios["blocked in f32"]
    assert held(measured) == {}


def test_the_page_has_what_was_measured_and_a_plot_only_of_growth(tmp_path):
    target = tmp_path / "docs" / "performance.md"
    performance_page.write_page(results(), target)
    text = target.read_text()
    assert text.count("Some CPU") == 1  # one machine, named once
    assert "| latency | n.pt, 640 pixels | 2026-01-02 | 0.1 | `python speed.py` |" in text
    assert "| the whole packed file | 20.00 | 100 | 0.25 |" in text
    assert "| its QLinearConv nodes | 10.00 | 200 | 0.50 |" in text
    assert "Growth" not in text
    pytest.importorskip("matplotlib")
    performance_page.write_page(conversions(), target)
    text = target.read_text()
    assert "| 3 | 24.0, 30.0 | 10.0, 10.0 | 5.90 | 2.40 to 3.00 | 4 |" in text  # beside three, a quarter is fair
    assert "| 512 | 24.0 | 2.40 | 2.00 |" in text
    assert "held 5.00 GiB at its peak and took 100 s" in text
    assert "| `import dsconvert` | 100 | 101 | 1.050 | 1.020 to 1.080 |" in text
    points = [{"images": n, "seconds": 2.0 * n, "peak_bytes": 1 << 30} for n in (2, 4, 8)]
    performance_page.write_page({"growth": {**about(), "imgsz": 320, "by images": points}}, target)
    assert "Seconds grow with images to the power 1.00." in target.read_text()
    assert target.with_suffix(".svg").exists()


def test_the_published_page_is_that_of_the_published_results(tmp_path):
    pytest.importorskip("matplotlib")
    page = tmp_path / "performance.md"
    published = (ROOT / "docs" / "performance.md").read_text()
    page.write_text(published)  # for the notes
    performance_page.write_page(json.loads((ROOT / "docs" / "performance.json").read_text()), page)
    assert page.read_text() == published, "run benchmarks/speed.py --sections"


def test_exponent_of_a_power_law():
    assert performance_page.exponent([1, 2, 4], [3, 12, 48]) == pytest.approx(2)


def test_a_busy_time_stands_against_the_idle_ones_around_it():
    """Turns of: idle, beside one, idle, beside three, idle. The machine slows down by a half in the meantime."""
    clock = iter([10.0, 24.0, 14.0, 66.0, 30.0, 30.0, 60.0, 10.0, 80.0, 10.0])
    began = []

    @contextmanager
    def beside(count):
        began.append(count)
        yield

    one, three = conversion.busy_turns(2, (1, 3), beside, lambda: next(clock))
    assert began == [1, 3, 1, 3]
    assert one == {
        "a core": 1, "seconds": [24.0, 60.0], "idle seconds": [12.0, 20.0], "ratio": 2.5, "turns": [2.0, 3.0]
    }  # fmt: skip
    assert three["idle seconds"] == [22.0, 10.0]
    assert three["ratio"] == 5.5
    assert three["turns"] == [3.0, 8.0]


def test_seconds_in_turns_are_compared_by_their_medians():
    assert conversion.turned([6.0, 9.0, 12.0], [3.0, 3.0, 2.0]) == {"ratio": 3.0, "turns": [2.0, 6.0]}


def test_a_section_takes_the_place_of_its_last_result_alone(tmp_path):
    kept = tmp_path / "docs" / "performance.json"
    for name, value in (("load", 1), ("busy", 2), ("load", 3)):
        speed.keep_result(kept, name, {"value": value})
    assert speed.read_results(kept) == {"busy": {"value": 2}, "load": {"value": 3}}
    assert list(speed.read_results(kept)) == ["busy", "load"]  # in the order of the page's list, not of measuring


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--sections", "load"], "--checkpoint and --data are needed"),
        (["--sections", "start"], "start compares with --before"),
        (["--sections", "speed"], "invalid choice"),
    ],
)
def test_a_section_says_what_it_needs(monkeypatch, capsys, given, said):
    monkeypatch.setattr(sys, "argv", ["speed.py", *given])
    with pytest.raises(SystemExit):
        speed.parse()
    assert said in capsys.readouterr().err


def test_busy_needs_nothing_and_what_is_given_is_taken(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["speed.py", "--sections", "busy", "--neighbours", "2", "--turns", "1",
                                      "--out", str(tmp_path / "a.md")])  # fmt: skip
    bench, sections, out = speed.parse()
    assert (bench.neighbours, bench.turns, sections, out) == ((2,), 1, ["busy"], tmp_path / "a.md")
    assert set(speed.SECTIONS) == set(performance_page.SECTIONS) | {"growth", "networks"}  # all of them are shown
