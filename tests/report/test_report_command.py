"""`dsconvert report` as a user types it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import torch
from click.testing import CliRunner
from conftest import HANGS
from report_case import make_case

from dsconvert.base.errors import InputError
from dsconvert.commands.cli import cli
from dsconvert.commands.shared import option
from dsconvert.convert import exporting
from dsconvert.export.weights.layouts import layout_named
from dsconvert.report.gather import ReportOptions, gather
from dsconvert.report.page import page_bytes


def dsconvert(*args: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dsconvert", *map(str, args)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=HANGS)


def test_report_from_the_command_line(tmp_path, call):
    model = make_case(tmp_path)
    peer = tmp_path / "peer.onnx"
    peer.write_bytes(exporting.onnx_bytes(model, layout_named("int8"), None))
    args = ["report", model, "--data", tmp_path / "data.yaml", "--against", peer]
    shown = call(*args, cwd=tmp_path)
    assert shown.code == 0, shown.err
    page = tmp_path / "q/report.html"
    assert "q/report.html" in shown.out
    html = page.read_text()
    assert html.count("Latency") >= 2
    assert "peer.onnx" in html

    refused = CliRunner().invoke(cli, list(map(str, args)))
    assert isinstance(refused.exception, InputError)
    assert "--force" in refused.exception.said(option)
    assert page.read_text() == html

    # another process, the same bytes
    done = dsconvert(*args, "--no-latency", "--threads", torch.get_num_threads(), "--out", "b.html", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    here = page_bytes(
        gather(ReportOptions(model, tmp_path / "data.yaml", tmp_path / "best.pt", (peer,), latency=False))
    )
    assert (tmp_path / "b.html").read_bytes() == here
    assert not re.search(r"\bms\b", re.sub(r"<style>.*?</style>", "", here.decode(), flags=re.S))


def test_help_fits_80_columns_and_shows_an_example(tmp_path):
    shown = CliRunner().invoke(cli, ["report", "--help"]).output
    assert max(map(len, shown.splitlines())) <= 80
    assert "Example: dsconvert report" in shown
