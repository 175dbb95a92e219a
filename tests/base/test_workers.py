"""Two processes with a part of the images each: the same as one, to the bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from conftest import HANGS, ROOT, write_work

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.kept import Room
from dsconvert.base.size import Size
from dsconvert.measure.calibration import decoded
from dsconvert.measure.views import WANTED
from dsconvert.model.file import load_model

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


@pytest.fixture
def folder(tiny, tmp_path):
    """best.pt, ten pictures, and one that cannot be read."""
    write_work(tmp_path, tiny, 10)
    (tmp_path / "images" / "bad.png").write_bytes(b"no picture")
    return tmp_path


def run(folder, processes, *arguments):
    """stdout and stderr of a command, by itself or under torchrun."""
    line = [sys.executable, "-m"]
    if processes > 1:
        line += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    line += ["dsconvert", *arguments, "--threads", "1"]
    done = subprocess.run(line, cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS)
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("share", [slice(0, 11), slice(4, 8)])
def test_shares_are_all_items_once_and_in_order(monkeypatch, share):
    items = list(range(11))[share]
    for count in (1, 2, 3, 5, 11):
        monkeypatch.setattr(workers, "count", lambda n=count: n)
        for unit in (1, 2, 4):
            taken = []
            for number in range(count):
                monkeypatch.setattr(workers, "number", lambda n=number: n)
                taken.append(items[workers.share(len(items), unit)])
            assert [x for part in taken for x in part] == items
            if len(items) >= unit * count:
                assert all(len(part) % unit == 0 for part in taken[:-1])
                assert all(taken)


def quantized(folder, processes):
    """`run` of quantize on all images, to the folder m1 or m2."""
    options = ("--calib", "images", "--imgsz", "64", "--out", f"m{processes}", "-q")
    return run(folder, processes, "quantize", "best.pt", *options)


@pytest.mark.long
def test_two_processes_fit_what_one_fits(folder):
    for processes in (1, 2):
        status, out, err = quantized(folder, processes)
        assert status == 0, err
        assert out.split() == [f"m{processes}/model.safetensors"]  # one speaks for both
        assert "1 images could not be read" in err
    one, two = (json.loads((folder / f"m{n}/quantize.json").read_text()) for n in (1, 2))
    assert two["calibration_images"] == one["calibration_images"] == 10
    assert two["layers"] == one["layers"]
    alone, together = (load_model(folder / f"m{n}/model.safetensors") for n in (1, 2))
    assert together.activations == alone.activations
    for name, conv in alone.convs.items():
        other = together.convs[name]
        assert bool((conv.weight.vqk == other.weight.vqk).all())
        assert bool((conv.weight.m == other.weight.m).all())
        # float64 sums in another order, rounded to float32
        np.testing.assert_allclose(conv.weight.cds_w, other.weight.cds_w, rtol=3e-7)
        np.testing.assert_allclose(conv.bias, other.bias, rtol=3e-6, atol=1e-6)


@pytest.mark.long
def test_two_processes_with_an_image_each(tiny, tmp_path):
    # every second image says what widths cost: here one process has none of those
    write_work(tmp_path, tiny, 2)
    for processes in (1, 2):
        status, _, err = quantized(tmp_path, processes)
        assert status == 0, err
    one, two = (json.loads((tmp_path / f"m{n}/quantize.json").read_text()) for n in (1, 2))
    assert two["calibration_images"] == 2
    # moments are taken about process 0's first batch, one image or both: of so few, integers round another way
    kept = [[{k: v for k, v in layer.items() if k != "sqnr_db"} for layer in made["layers"]] for made in (one, two)]
    assert kept[1] == kept[0]
    assert any("damage" in layer for layer in kept[0])


def test_a_process_leaves_the_others_before_python_ends(tmp_path):
    # what is registered first runs last, so after the leaving that start has registered
    (tmp_path / "ends.py").write_text(
        "import atexit, os, torch\n"
        "from torch import distributed as dist\n"
        "from dsconvert.base import workers\n"
        "atexit.register(lambda: os.write(1, f'{len(sums)} sums, with others: {dist.is_initialized()}\\n'.encode()))\n"
        "workers.start()\n"
        "sums = [workers.summed(torch.ones(3)) for _ in range(20)]\n"
        "assert all(s.tolist() == [2.0] * 3 for s in sums)\n"
    )
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ends.py"]
    done = subprocess.run(
        line, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=HANGS, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["20 sums, with others: False"] * 2


def test_two_processes_measure_what_one_measures(folder, call):
    command = ("eval", "best.pt", "best.pt", "--data", "images", "--imgsz", "64", "--json")
    alone, together = call(*command, cwd=folder), run(folder, 2, *command)
    assert alone.code == together[0] == 0, (alone.err, together[2])
    found = [json.loads(out)["models"] for out in (alone.out, together[1])]
    for row in ("map50_95", "map50", "precision", "recall", "images", "skipped"):
        assert [m[row] for m in found[0]] == [m[row] for m in found[1]]


def test_a_process_without_images_is_one_sentence(folder, monkeypatch):
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "number", lambda: 1)
    monkeypatch.setattr(workers, "gathered", lambda item: [type(item)(), item])  # the other one has nothing
    with pytest.raises(InputError, match="32 calibration images are too few for 2 processes"):
        decoded([folder / "images" / "0.png"] * WANTED, Size.of(64), 0, lambda *_: None, Room())
