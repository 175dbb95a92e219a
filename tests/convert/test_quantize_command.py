"""dsconvert quantize as a user meets it: stages, warnings, the closing table, recipes."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import subprocess
import sys
import time

import pytest
from rich.console import Console

from dsconvert.commands import shared
from dsconvert.convert import quantize as pipeline
from dsconvert.convert.options import QuantizeOptions

QUANTIZE = ["quantize", "best.pt", "--calib", "images", "--imgsz", "64"]


def test_stages_warnings_the_table_and_a_next_command_that_works(work, call):
    (work / "split.yaml").write_text("train: images\nval: images/val\nnames: [cat, dog]\n")
    done = call("quantize", "best.pt", "--calib", "split.yaml", "--imgsz", "64", cwd=work)
    assert done.code == 0, done.err
    lines = done.err.splitlines()
    # four photographs, 28 views of them, and eight synthesised images
    stages = [r"synthesising images: [\d.]+ s$", r"reading images: 4 in ", r"measuring importance: 40 in ",
              r"choosing ranges and widths: ", r"fitting layers: \d+ in [\d.]+ s, [\d.]+/s$"]  # fmt: skip
    assert [bool(re.match(p, line)) for p, line in zip(stages, lines, strict=False)] == [True] * 5
    assert next(line for line in lines if line.startswith("Warning: ")).endswith(
        "give --calib about 100 photos of what the model will see (no labels needed)."
    )
    rows = {line.split()[1]: line.split() for line in done.out.splitlines() if re.match(r"^\W+(float|DSConv)\b", line)}
    model = work / "runs/dsconvert/best/model.safetensors"
    assert rows["float"][7] == f"{(work / 'best.pt').stat().st_size / 1e6:.2f}"
    assert rows["DSConv"][7] == f"{model.stat().st_size / 1e6:.2f}"
    assert rows["float"][3] == rows["DSConv"][3]
    assert float(rows["DSConv"][5]) < 8 < float(rows["float"][5])
    for _ in ("export", "eval"):
        shown = re.findall(r"^Next: dsconvert (.+)$", done.out, re.MULTILINE)
        assert len(shown) == 1
        done = call(*shlex.split(shown[0]), cwd=work)
        assert done.code == 0, done.err
    assert "best.pt" in done.out
    assert "model-packed.onnx" in done.out


def test_quiet_leaves_the_path_and_the_warnings_and_verbose_adds_the_layers(work, call):
    done = call(*QUANTIZE, "--quiet", cwd=work)
    assert done.out == "runs/dsconvert/best/model.safetensors\n"
    assert done.err
    assert all(line.startswith("Warning: ") for line in done.err.splitlines())
    layers = call(*QUANTIZE, "-v", cwd=work).out
    assert "SQNR" in layers
    assert "model.7.cv1" in layers


def options_of(call, monkeypatch, work, *args: str) -> QuantizeOptions:
    """The options that quantize would have been called with."""
    seen = []

    def stop(checkpoint, options, *rest):
        seen.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "quantize", stop)
    done = call("quantize", "best.pt", *args, cwd=work)
    assert done.code == 130, done.err
    return seen[0]


def test_recipes_are_what_they_say(work, call, monkeypatch):
    def of(*args: str) -> QuantizeOptions:
        return options_of(call, monkeypatch, work, *args)

    assert of("--config", "balanced") == of() == QuantizeOptions()
    assert of("--config", "seed") == QuantizeOptions(blocks="head", scope="bottleneck", bits=4, block_size=32)
    assert of("--config", "safest") == QuantizeOptions(bits=8, activations="float")


def test_the_command_line_wins(work, call, monkeypatch):
    (work / "ours.yaml").write_text("bits: 3\nblock_size: 16\ncalib: images\nseed: 7\n")
    (work / "size.yaml").write_text("target-size: 0.5MB\n")

    def of(*args: str) -> QuantizeOptions:
        return options_of(call, monkeypatch, work, *args)

    ours = of("--config", "ours.yaml", "--seed", "1")
    assert (ours.bits, ours.block_size, ours.seed, str(ours.calib)) == (3, 16, 1, "images")
    assert of("--seed", "1", "--config", "ours.yaml") == ours  # in any order
    assert of("--config", "ours.yaml", "--bits", "5").bits == 5
    # one excludes the other, so the typed one replaces it
    assert of("--config", "ours.yaml", "--target-size", "1MB").bits is None
    assert of("--config", "size.yaml").target_bytes == 500_000
    typed = of("--config", "size.yaml", "--bits", "4")
    assert (typed.bits, typed.target_bytes) == (4, None)
    assert of("--config", "size.yaml", "--target-map-drop", "1").target_bytes is None


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bitz: 4", "sets bitz, which is not an option"),
        ("force: true", "sets force, which is not an option"),
        ("bits: 9", "--bits"),
        ("bits: yes", "--bits"),
        ("imgsz: 64.5", "--imgsz"),
        ("scope: everything", "--scope"),
        ("bits: 4\ntarget-size: 1MB", "give one of them"),
    ],
)
def test_a_wrong_recipe_is_one_sentence_and_exit_2(work, call, text, words):
    (work / "ours.yaml").write_text(text)
    done = call("quantize", "best.pt", "--calib", "images", "--config", "ours.yaml", cwd=work)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert not (work / "runs").exists()


def test_seed_converts_the_heads_bottlenecks_only(work, call):
    done = call(*QUANTIZE, "--config", "seed", "--json", cwd=work)
    assert done.code == 0, done.err
    report = json.loads(done.out)
    assert [r["name"] for r in report["layers"] if r["kind"] == "DSConv"] == ["model.7.m.0.cv1", "model.7.m.0.cv2"]
    assert len(report["warnings"]) >= 1


def screen(monkeypatch) -> io.StringIO:
    """What a terminal of 100 columns is sent."""
    sent = io.StringIO()
    monkeypatch.setattr(shared, "console", lambda stderr=False: Console(file=sent, force_terminal=True, width=100))
    return sent


def test_a_terminal_sees_bars_with_a_rate_and_the_time_left(monkeypatch):
    sent = screen(monkeypatch)
    with shared.bars(lines=True) as report:
        for done in range(1, 4):
            report("fit", done, 9)
            time.sleep(0.2)  # bars are drawn ten times a second
        report("evaluate", 2, 2)  # the first stage ends short of its total
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", sent.getvalue())
    assert re.search(r"fitting layers .*3/9 .*\d:\d\d:\d\d", text)
    assert re.search(r"[\r\n]fitting layers: 3 in [\d.]+ s, [\d.e+]+/s", text)
    assert re.search(r"evaluating: 2 in ", text)


def test_quiet_shows_no_bars(monkeypatch):
    sent = screen(monkeypatch)
    with shared.bars(quiet=True, lines=True) as report:
        report("fit", 1, 2)
        report("fit", 2, 2)
    assert sent.getvalue() == ""


def test_no_color_means_plain_ascii(work, call, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    for command in (["info", "best.pt"], ["eval", "best.pt", "--data", "data.yaml", "--imgsz", "64", "-v"]):
        done = call(*command, cwd=work)
        assert done.code == 0, done.err
        assert done.out.isascii()
    assert "+-" in done.out


def test_an_ascii_terminal_is_no_reason_to_fail(work):
    """Class and file names that it cannot show are escaped; tables are drawn with - and |."""
    (work / "images/val/0.jpg").rename(work / "images/val/日本.jpg")
    (work / "images/val/日本.jpg").write_bytes(b"broken")
    command = [sys.executable, "-m", "dsconvert", "detect", "best.pt", "images", "--imgsz", "64", "--nosave", "-v"]
    done = subprocess.run(command, cwd=work, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert rb"\u65e5\u672c.jpg" in done.stderr
    assert done.stdout.isascii()
