"""Commands as a user types them: outputs, JSON, exit codes, one-sentence errors."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import HANGS, QUICKLY

from dsconvert.measure.calibration import FEW
from dsconvert.model.file import model_bytes

Done = subprocess.CompletedProcess[str]
QUANTIZE = ("quantize", "best.pt", "--calib", "data.yaml", "--imgsz", "64")


def process(*args: str | Path, cwd: Path, quickly: bool = False) -> Done:
    """A process of its own, as a user has it; quickly: with few synthesised images."""
    script = ["-c", f"{QUICKLY}; from dsconvert.__main__ import run; run()"] if quickly else ["-m", "dsconvert"]
    command = [sys.executable, *script, *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANGS)


@pytest.fixture
def dsconvert(call) -> Callable[..., Done]:
    """The same in this process: seconds faster."""

    def run(*args: str | Path, cwd: Path) -> Done:
        answer = call(*args, cwd=cwd)
        return Done(args, answer.code, answer.out, answer.err)

    return run


@pytest.fixture
def quantize(dsconvert) -> Callable[..., Done]:
    return lambda work, *more: dsconvert(*QUANTIZE, *more, cwd=work)


@pytest.fixture
def model(work, converted) -> Path:
    """q/model.safetensors, for tests of what is done with one."""
    (work / "q").mkdir()
    (work / "q/model.safetensors").write_bytes(model_bytes(converted))
    return work / "q/model.safetensors"


def test_the_three_commands_one_after_the_other(work, dsconvert):
    for i in range(4, FEW):  # beside fewer than FEW, images would be synthesised, which `process` does at full length
        for kind, suffix in (("images", "jpg"), ("labels", "txt")):
            shutil.copy(work / f"{kind}/val/{i % 4}.{suffix}", work / f"{kind}/val/{i}.{suffix}")
    first = process(*QUANTIZE, cwd=work)
    assert first.returncode == 0, first.stderr
    assert "Next: dsconvert export runs/dsconvert/best/model.safetensors --onnx" in first.stdout
    assert "\r" not in first.stderr  # no progress bars when stderr is no terminal
    folder = work / "runs/dsconvert/best"
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "quantize.json"]
    report = json.loads((folder / "quantize.json").read_text())
    assert report["calibration_images"] == FEW
    assert {row["kind"] for row in report["layers"]} == {"DSConv", "int8"}

    second = process("export", "--onnx", cwd=work)
    assert second.returncode == 0, second.stderr
    assert (folder / "model-packed.onnx").is_file()

    third = dsconvert("eval", "--json", cwd=work)
    assert third.returncode == 0, third.stderr
    models = json.loads(third.stdout)["models"]
    assert [m["format"] for m in models] == ["pt", "safetensors"]
    for m in models:
        assert {"path", "map50_95", "map50", "size_bytes", "latency_ms", "images"} <= set(m)
        assert m["latency_ms"]["min"] <= m["latency_ms"]["median"]
        assert m["images"] == FEW
        assert m["size_bytes"] == Path(m["path"]).stat().st_size if Path(m["path"]).is_absolute() else True

    fourth = dsconvert("info", "--json", cwd=work)
    layers = json.loads(fourth.stdout)["layers"]
    assert sum(row["bytes"] for row in layers) * 4 < sum(row["float32_bytes"] for row in layers)


def test_eval_takes_all_three_formats_in_a_table(work, dsconvert, model):
    for args in (
        ["q/model.safetensors"],  # --onnx may be left out
        ["q/model.safetensors", "--layout", "int8", "--onnx"],
        ["q/model.safetensors", "--layout", "blocked", "--onnx"],
        ["best.pt", "--imgsz", "64", "--onnx"],
    ):
        done = dsconvert("export", *args, cwd=work)
        assert done.returncode == 0, done.stderr
    names = [
        "best.pt",
        "best-float32.onnx",
        "q/model.safetensors",
        "q/model-packed.onnx",
        "q/model-int8.onnx",
        "q/model-blocked.onnx",
    ]
    done = dsconvert("eval", *names, "--data", "data.yaml", "--imgsz", "64", cwd=work)
    assert done.returncode == 0, done.stderr
    for name in names:
        assert name in done.stdout
    for name in names:
        assert dsconvert("info", name, cwd=work).returncode == 0


def test_exports_with_other_ends_have_names_of_their_own_and_are_evaluated(work, dsconvert, model):
    wanted = {
        "q/model-packed.onnx": [],
        "q/model-packed-uint8.onnx": ["--uint8-input"],
        "q/model-packed-float16-nms.onnx": ["--half-input", "--nms", "--conf-thres", "0.01", "--max-det", "9"],
    }
    for name, options in wanted.items():
        done = dsconvert("export", "q/model.safetensors", "--onnx", "--json", *options, cwd=work)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["path"] == name
    done = dsconvert("eval", *wanted, "--data", "data.yaml", "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    plain, from_bytes, _ = json.loads(done.stdout)["models"]
    assert plain["map50_95"] == from_bytes["map50_95"]


def test_same_inputs_same_bytes_and_a_new_folder_each_time(work, quantize):
    # the command line is part of the file, so it must be the same both times
    assert quantize(work, "--threads", "1").returncode == 0
    assert quantize(work, "--threads", "1").returncode == 0
    first, second = (work / f"runs/dsconvert/{name}/model.safetensors" for name in ("best", "best2"))
    assert first.read_bytes() == second.read_bytes()


def test_json_is_alone_on_stdout(work):
    line = ("quantize", "best.pt", "--imgsz", "64", "--samples", "8", "--json")
    done = process(*line, cwd=work, quickly=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["weights"] > 0
    assert "synthesised" in done.stderr  # data-free says so
    assert "--calib" in done.stderr


def test_nothing_is_overwritten_without_force(work, quantize):
    assert quantize(work, "--out", "q").returncode == 0
    before = (work / "q/model.safetensors").read_bytes()
    again = quantize(work, "--out", "q", "--bits", "8")
    assert again.returncode == 2
    assert "--force" in again.stderr
    assert (work / "q/model.safetensors").read_bytes() == before
    assert quantize(work, "--out", "q", "--bits", "8", "--force").returncode == 0
    assert (work / "q/model.safetensors").read_bytes() != before


def test_a_target_size_is_kept_and_info_says_why(work, dsconvert, quantize):
    sizes = {}
    for name, target in (("small", 31_500), ("large", 33_500)):
        assert quantize(work, "--out", name, "--target-size", f"{target / 1e3}kB").returncode == 0
        assert dsconvert("export", f"{name}/model.safetensors", "--onnx", cwd=work).returncode == 0
        sizes[name] = (work / name / "model-packed.onnx").stat().st_size
        assert sizes[name] <= target
    assert sizes["small"] < sizes["large"]
    table = dsconvert("info", "small/model.safetensors", cwd=work).stdout
    assert "harm at 4 bits" in table
    rows = json.loads(dsconvert("info", "small/model.safetensors", "--json", cwd=work).stdout)["layers"]
    mixed = [r for r in rows if r["damage"]]
    assert mixed
    # of one layer, on four images, each is right to a factor only
    few, many = (sum(r["damage"][bits] for r in mixed) for bits in "28")
    assert few > many > 0
    assert quantize(work, "--out", "uniform", "--bits", "3").returncode == 0
    uniform = json.loads((work / "uniform/quantize.json").read_text())["layers"]
    assert {r["bits"] for r in uniform if r["kind"] == "DSConv"} == {3}
    assert "harm" not in dsconvert("info", "uniform/model.safetensors", cwd=work).stdout


def test_real_shifts_from_quantize_to_eval(work, dsconvert, quantize):
    refused = quantize(work, "--kds", "float")
    assert refused.returncode == 2
    assert "--activations float" in refused.stderr
    done = quantize(work, "--kds", "float", "--activations", "float", "--out", "q")
    assert done.returncode == 0, done.stderr
    packed = dsconvert("export", "q/model.safetensors", "--onnx", cwd=work)
    assert packed.returncode == 2
    assert "--layout float" in packed.stderr
    assert dsconvert("export", "q/model.safetensors", "--onnx", "--layout", "float", cwd=work).returncode == 0
    models = ["q/model.safetensors", "q/model-float.onnx"]
    rows = json.loads(dsconvert("eval", *models, "--data", "data.yaml", "--json", cwd=work).stdout)["models"]
    assert rows[0]["map50_95"] == pytest.approx(rows[1]["map50_95"], abs=1e-3)
    assert {r["bits"] for r in json.loads((work / "q/quantize.json").read_text())["layers"]} == {4, 8}


def test_bench_in_a_table_and_in_json(work, dsconvert):
    for name in ("a.onnx", "b.onnx"):
        assert dsconvert("export", "best.pt", "--onnx", "--imgsz", "64", "--out", name, cwd=work).returncode == 0
    args = ["bench", "a.onnx", "b.onnx", "--runs", "3", "--threads", "1"]
    table = dsconvert(*args, cwd=work)
    assert table.returncode == 0, table.stderr
    assert "b.onnx" in table.stdout
    assert "1 threads" in table.stdout
    done = dsconvert(*args, "--json", cwd=work)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["threads"] == 1
    first, second = document["models"]
    assert first["ratio"] == {"value": 1, "low": 1, "high": 1}
    assert second["ratio"]["low"] <= second["ratio"]["value"] <= second["ratio"]["high"]
    assert second["peak_bytes"] > second["base_bytes"] > 0


BAD = {
    "missing checkpoint": (["quantize", "none.pt"], "no checkpoint file"),
    "not a checkpoint": (["quantize", "data.yaml"], "not a PyTorch checkpoint"),
    "missing images": (["quantize", "best.pt", "--calib", "nowhere"], "no file or folder"),
    "wrong size": (["quantize", "best.pt", "--calib", "images", "--imgsz", "65"], "must be a multiple"),
    "wrong layer": (["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--blocks", "3"], "not a C3"),
    "no GPU": (["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--device", "cuda"], "not available"),
    "bits": (["quantize", "best.pt", "--bits", "9"], "--bits"),
    "size": (["quantize", "best.pt", "--target-size", "small"], "not a size"),
    "size out of reach": (
        ["quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--target-size", "9kB"],
        "out of reach",
    ),
    "bits and size": (["quantize", "best.pt", "--bits", "4", "--target-size", "1MB"], "give one of them"),
    "nothing to export": (["export", "--onnx"], "no converted model"),
    "two inputs": (["export", "best.pt", "--onnx", "--uint8-input", "--half-input"], "one of them"),
    "limits without nms": (["export", "best.pt", "--onnx", "--max-det", "5"], "work only with --nms"),
    "limits": (["export", "best.pt", "--onnx", "--nms", "--iou-thres", "2"], "must lie in 0..1"),
    "bench nothing": (["bench"], "Missing argument"),
    "bench a checkpoint": (["bench", "best.pt"], "not an ONNX file"),
    "more threads than CPUs": (["bench", "best.pt", "--threads", "1024"], "CPUs this process may use"),
    "unknown file": (["eval", "data.yaml", "--data", "data.yaml"], "not a .pt"),
    "no such command": (["convert"], "No such command"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence_and_exit_2(work, call, case):
    args, words = BAD[case]
    if case == "no GPU" and os.path.exists("/dev/nvidia0"):
        pytest.skip("this machine has a GPU")
    done = call(*args, cwd=work)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert not (work / "runs").exists()


def test_wrong_classes_are_named(work, dsconvert):
    (work / "other.yaml").write_text("path: .\nval: images/val\nnames: [cat, dog, cow]\n")
    done = dsconvert("eval", "best.pt", "--data", "other.yaml", "--imgsz", "64", cwd=work)
    assert done.returncode == 2
    assert "2 classes" in done.stderr


def test_unreadable_images_are_counted(work, quantize):
    (work / "images/val/broken.jpg").write_bytes(b"not a jpeg")
    done = quantize(work)
    assert done.returncode == 0
    assert "1 images could not be read" in done.stderr


def test_how_many_images_were_left_out_is_said(work, call):
    done = call(*QUANTIZE, "--samples", "3", cwd=work)
    assert done.code == 0, done.err
    assert " on 3 of 4 images and 21 views of them and 8 synthesised ones" in done.out
