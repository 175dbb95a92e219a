"""Model files, data.yaml, labels and ONNX files from strangers: nothing runs, small memory, one sentence."""

from __future__ import annotations

import os
import random
from dataclasses import replace
from pathlib import Path

import onnx
import pytest
from case import SHARES, Case
from conftest import SIDE, convert, smooth_picture, tiny_network
from fuzz_damage import resealed
from graphs import onnx_files
from modelfiles import model_files
from texts import labels, yamls
from watched import dsconvert, problems, run_child, unharmed, write_cases

from dsconvert.base.errors import InputError
from dsconvert.export.onnx import export_quantized
from dsconvert.export.weights.layouts import layout_named
from dsconvert.model.file import model_bytes
from dsconvert.model.model import DSModel
from dsconvert.photos.dataset import image_paths, read_data_yaml
from dsconvert.photos.images import read_image
from dsconvert.photos.labels import read_labels
from dsconvert.scoring.bench import bench


@pytest.fixture(scope="module")
def model() -> DSModel:
    converted = convert(*tiny_network(), smooth_picture())
    return replace(converted, provenance={"source": "best.pt", "options": {"calib": None}})


@pytest.mark.parametrize("share", SHARES)
def test_every_kind_of_bad_file(model, tmp_path, share):
    good = {"model": model_bytes(model), "yaml": b"names: [a, 2001-01-01]\n", "labels": b"0 0.5 0.5 0.1 0.1\n"}
    graph = export_quantized(model, layout_named("packed"), SIDE)
    good["onnx"] = graph.SerializeToString()
    (tmp_path / "onnx").mkdir()
    corpora = {
        "model": (model_files(good["model"]), ".safetensors"), "yaml": (yamls(), ".yaml"), "labels": (labels(), ".txt"),
        "onnx": (onnx_files(graph, tmp_path / "onnx"), ".onnx"),
    }  # fmt: skip
    cases: dict[Path, Case] = {}
    files, warm = [], []
    count = 0
    for reader, (made, suffix) in corpora.items():
        every = list(made)
        count += len(every)
        written = write_cases(every[::share], tmp_path / reader, suffix)
        cases |= written
        files += [(reader, path) for path in written]
        warm.append((reader, tmp_path / f"good{suffix}"))
        warm[-1][1].write_bytes(good[reader])
    assert count > 200
    flips = flipped_headers(good["model"], tmp_path / "flips", 150 // share)
    beside = tmp_path / "beside/m.onnx"  # weights beside an ONNX file are its own
    beside.parent.mkdir()
    onnx.save(graph, beside, save_as_external_data=True, location="m.bin", size_threshold=1024)
    assert (beside.parent / "m.bin").stat().st_size > 1000
    *results, last = run_child(warm, [*files, *(("model", p) for p in flips), ("onnx", beside)])
    found = problems(cases, results)
    assert not found, found
    for result in results[len(cases) :]:
        assert not unharmed(result, "" if result["error"] else None), result
    assert sum(r["error"] is None for r in results[len(cases) :]) < len(flips) / 2
    assert not unharmed(last, None)


@pytest.mark.parametrize("share", SHARES)
def test_info_reads_bad_files_harmlessly(model, tmp_path, share):
    """It parses ONNX files without an engine: what ONNX Runtime would refuse may pass."""
    graph = export_quantized(model, layout_named("packed"), SIDE)
    (tmp_path / "onnx").mkdir()
    graphs, models = (
        list(made)[::share] for made in (onnx_files(graph, tmp_path / "onnx"), model_files(model_bytes(model)))
    )
    files = [("info", p) for p in write_cases(graphs, tmp_path / "onnx", ".onnx")]
    files += [("info", p) for p in write_cases(models, tmp_path / "model", ".safetensors")]
    warm = [("info", tmp_path / f"good{suffix}") for suffix in (".onnx", ".safetensors")]
    for (_, path), data in zip(warm, (graph.SerializeToString(), model_bytes(model)), strict=True):
        path.write_bytes(data)
    for result in run_child(warm, files):
        assert not unharmed(result, "" if result["error"] else None), result
        assert result["error"] or not result["text"], result


def flipped_headers(good: bytes, folder: Path, count: int) -> list[Path]:
    """Copies of a model file with one bit of the header flipped, where it has a digest that is right again where it can
    be read at all: they load or are refused."""
    folder.mkdir()
    rng, files = random.Random(0), []
    header = int.from_bytes(good[:8], "little")
    for index in range(count):
        data = bytearray(good)
        data[rng.randrange(header)] ^= 1 << rng.randrange(8)
        files.append(folder / f"{index}.safetensors")
        files[-1].write_bytes(resealed(bytes(data), "dsconvert"))
    return files


def test_bench_follows_no_data_out_of_the_folder(model, tmp_path):
    good = export_quantized(model, layout_named("packed"), SIDE)
    case = next(c for c in onnx_files(good, tmp_path) if c.name == "external data: up")
    (tmp_path / "x.onnx").write_bytes(case.data)
    with pytest.raises(InputError, match="outside of its own folder"):
        bench([tmp_path / "x.onnx"], ["onnxruntime"], 1, 2)


def test_pipes_and_devices_are_not_read(tmp_path):
    """Reading either would never end."""
    os.mkfifo(tmp_path / "list.txt")
    os.mkfifo(tmp_path / "image.jpg")
    for source in (Path("/dev/zero"), tmp_path / "list.txt", tmp_path / "image.jpg"):
        with pytest.raises(InputError, match="neither a folder, an image"):
            image_paths(source)
    with pytest.raises(InputError, match="not a readable label file: it is a pipe"):
        read_labels(tmp_path / "list.txt", 1)
    os.mkfifo(tmp_path / "data.yaml")
    with pytest.raises(InputError, match="not a readable YAML file: it is a pipe"):
        read_data_yaml(tmp_path / "data.yaml")
    with pytest.raises(InputError, match="it is not an ordinary file"):
        read_image(tmp_path / "image.jpg")


@pytest.mark.parametrize("name", ["[bold].onnx", "\x1b[31m.onnx", "\x1b[31m.safetensors", "new\nline.pt", "data.yaml"])
def test_a_files_own_name_does_nothing(tmp_path, name):
    (tmp_path / name).write_bytes(b"nothing")
    command = ["eval", name, "--data", "."] if name != "data.yaml" else ["quantize", name]
    code, _, err = dsconvert(tmp_path, *command)
    assert code == 2
    assert "Traceback" not in err
    assert err.removesuffix("\n").isprintable()


def test_messages_quote_what_is_in_files_without_its_effect():
    assert str(InputError("Füße 字 <script>")) == "Füße 字 <script>"
    assert str(InputError("red\x1b[31m\n\u202e\ud800")) == r"red\x1b[31m\x0a\u202e\ud800"
    assert len(str(InputError("x" * 10_000))) == 2000
