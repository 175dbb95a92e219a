"""finetune: what stays, what changes, stopping and going on, two processes, the file it makes, the command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace

import cv2
import numpy as np
import onnxruntime as ort
import pytest
import torch
from conftest import HANGS, ROOT, convert, smooth_picture, tiny_network

from dsconvert.base import workers
from dsconvert.base.errors import InputError
from dsconvert.base.size import Size
from dsconvert.convert.exporting import onnx_bytes
from dsconvert.export.weights.layouts import layout_named
from dsconvert.graph.integer import run_integer
from dsconvert.model.file import load_model, model_bytes
from dsconvert.model.model import DSModel
from dsconvert.scoring.coco import Metrics
from dsconvert.tune import finetune as module
from dsconvert.tune.finetune import FinetuneOptions, finetune
from dsconvert.tune.latents import start
from dsconvert.tune.loop import Student, sum_gradients
from dsconvert.tune.loss import Gains
from dsconvert.tune.schedule import LAST, follow, rate_share
from dsconvert.tune.state import SETS, State
from dsconvert.yolo.decode import decode


@pytest.fixture(scope="module")
def model() -> DSModel:
    return convert(*tiny_network(), smooth_picture())


@pytest.fixture
def folder(model, tmp_path):
    """m.safetensors, six labelled train and two val images, data.yaml."""
    (tmp_path / "m.safetensors").write_bytes(model_bytes(model))
    rng = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 2)):
        for kind in ("images", "labels"):
            (tmp_path / kind / split).mkdir(parents=True)
        for i in range(count):
            picture = cv2.resize(rng.integers(0, 256, (8, 10, 3), dtype=np.uint8), (100, 80))
            cv2.imwrite(str(tmp_path / f"images/{split}/{i}.png"), picture)
            (tmp_path / f"labels/{split}/{i}.txt").write_text("0 0.5 0.5 0.4 0.4\n1 0.3 0.3 0.2 0.2\n")
    (tmp_path / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames: [cat, dog]\n")
    return tmp_path


@pytest.fixture
def rising(monkeypatch):
    """Every measurement is better than the one before: a random network finds nothing in either."""
    seen = []

    def measure(predictors, paths, side, nc, labelled, progress):
        seen.append(len(seen))
        return [Metrics(seen[-1] / 100, 0.0, 0.0, 0.0, len(paths), {})]

    monkeypatch.setattr(module, "evaluate_predictors", measure)
    return seen


def options(folder, **given):
    return FinetuneOptions(folder / "data.yaml", **{"epochs": 3, "batch": 3, "rate": 0.05, **given})


@pytest.mark.parametrize("train", ["shifts", "shifts+bias", "all"])
def test_the_integers_stay_and_the_loss_falls(folder, model, rising, train):
    done = finetune(folder / "m.safetensors", options(folder, train=train, epochs=6, augment=False))
    assert done.log[-1]["loss"] < 0.9 * done.log[1]["loss"]
    assert done.best_epoch == 6
    changed = {"vqk": 0, "m": 0, "cds_w": 0, "bias": 0}
    for name, conv in model.convs.items():
        new = done.model.convs[name]
        for part in ("vqk", "m", "cds_w"):
            changed[part] += not torch.equal(getattr(new.weight, part), getattr(conv.weight, part))
        changed["bias"] += not torch.equal(new.bias, conv.bias)
    count = len(model.convs)
    assert changed["vqk"] == 0 if train != "all" else changed["vqk"] > 0
    assert changed["m"] > 0
    assert changed["cds_w"] == count
    assert changed["bias"] == (0 if train == "shifts" else count)
    assert done.model.activations == model.activations
    assert done.model.graph == model.graph


def test_the_file_exports_and_computes_the_integers(folder, rising):
    done = finetune(folder / "m.safetensors", options(folder))
    path = folder / "n.safetensors"
    path.write_bytes(model_bytes(done.model))
    back = load_model(path)
    x = smooth_picture()
    wanted = decode(run_integer(back.graph, back.convs, back.activations, x), back.head).numpy()
    before = load_model(folder / "m.safetensors")
    old = decode(run_integer(before.graph, before.convs, before.activations, x), back.head).numpy()
    assert np.abs(old - wanted).max() > 1
    for layout in ("packed", "int8"):
        data = onnx_bytes(path, layout_named(layout), None)  # which compares with torch, too
        (found,) = ort.InferenceSession(data).run(None, {"images": x.numpy()})
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-3)


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


@pytest.mark.parametrize("steps", [1, 4])
def test_a_stopped_run_goes_on_to_the_same_bytes(folder, rising, steps):
    chosen = options(folder)
    whole = model_bytes(finetune(folder / "m.safetensors", chosen).model)
    taken, kept = [], folder / "kept"

    def stop(stage, done, total):
        taken.append(stage)
        if taken.count("train") == steps:
            raise Killed

    rising.clear()
    with pytest.raises(Killed):
        finetune(folder / "m.safetensors", chosen, "", stop, unfinished=kept)
    assert len(rising) == 1 + (steps - 1) // 2  # two steps an epoch
    assert model_bytes(finetune(folder / "m.safetensors", chosen, unfinished=kept, resume=True).model) == whole
    for other in ({"rate": 0.04}, {"seed": 1}, {"train": "shifts"}):
        with pytest.raises(InputError, match="start again without resuming"):
            finetune(folder / "m.safetensors", replace(chosen, **other), unfinished=kept, resume=True)
    (folder / "labels/train/0.txt").write_text("")
    with pytest.raises(InputError, match="start again without resuming"):
        finetune(folder / "m.safetensors", chosen, unfinished=kept, resume=True)
    kept.write_bytes(b"12345678")
    with pytest.raises(InputError, match="damaged"):
        finetune(folder / "m.safetensors", chosen, unfinished=kept, resume=True)


def test_it_stops_early_and_keeps_the_best(folder, model, monkeypatch):
    maps = iter([0.1, 0.3, 0.2, 0.3, 0.9])
    monkeypatch.setattr(
        module, "evaluate_predictors", lambda *rest: [Metrics(next(maps), 0.0, 0.0, 0.0, 1, {})]
    )  # fmt: skip
    done = finetune(folder / "m.safetensors", options(folder, epochs=9, patience=2))
    assert [e["map50_95"] for e in done.log] == [0.1, 0.3, 0.2, 0.3]
    assert done.best_epoch == 1
    maps = iter([0.1, 0.3])  # the rate's way down depends on the epochs planned, so stop by patience again
    monkeypatch.setattr(module, "evaluate_predictors", lambda *rest: [Metrics(next(maps, 0.0), 0.0, 0.0, 0.0, 1, {})])
    again = finetune(folder / "m.safetensors", options(folder, epochs=9, patience=1))
    for name, conv in again.model.convs.items():
        assert torch.equal(conv.weight.cds_w, done.model.convs[name].weight.cds_w)
    monkeypatch.setattr(module, "evaluate_predictors", lambda *rest: [Metrics(0.5, 0.0, 0.0, 0.0, 1, {})])
    nothing = finetune(folder / "m.safetensors", options(folder, epochs=9, patience=1))
    assert nothing.best_epoch == 0
    assert model_bytes(replace(nothing.model, provenance={})) == model_bytes(model)


def test_the_rate_rises_and_falls_and_the_average_follows():
    assert rate_share(0, 101, 10) == pytest.approx(0.1)
    assert rate_share(50, 101, 10) == pytest.approx(LAST + (1 - LAST) / 2)
    assert rate_share(25, 101, 0) == pytest.approx(LAST + (1 - LAST) * (1 + 0.5**0.5) / 2)
    assert rate_share(100, 101, 10) == pytest.approx(LAST)
    average = {"a": torch.zeros(1)}
    for step in (1, 2):
        follow(average, {"a": torch.ones(1)}, step)
    # 2/11 of 0 and 9/11 of 1; then a quarter of that and three of 1
    assert average["a"].item() == pytest.approx(0.25 * 9 / 11 + 0.75)


def test_the_gradients_of_two_halves_are_those_of_the_batch(model, monkeypatch):
    images = torch.cat([smooth_picture(), smooth_picture().flip(3), smooth_picture().flip(2)])
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.3], [1, 0, 0.3, 0.6, 0.2, 0.2], [2, 1, 0.6, 0.4, 0.4, 0.2]])
    layers, latents = start(model, "all", "cpu")
    student = Student(model.graph, layers, model.activations, model.head, "cpu")

    def gradients(first, last):
        mine = targets[first:last].clone()
        mine[:, 0] -= first
        for u in latents.values():
            u.grad = None
        student.loss(latents, images[first:last], mine, Gains()).backward()
        return torch.cat([u.grad.flatten() for u in latents.values()])

    whole = gradients(0, 3)
    counts = []
    monkeypatch.setattr(workers, "summed", lambda c: counts.append(c) or c)
    gradients(0, 1), gradients(1, 3)
    everyone = sum(counts)
    monkeypatch.setattr(workers, "summed", lambda c: everyone)
    parts = [gradients(0, 1), gradients(1, 3)]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "summed", lambda mine: mine + parts[0])
    sum_gradients(list(latents.values()))
    torch.testing.assert_close(torch.cat([u.grad.flatten() for u in latents.values()]), parts[0] + parts[1])


def other_pixels(path) -> None:
    """Another picture of as many bytes."""
    data = bytearray(path.read_bytes())
    data[-20] ^= 1  # of the checksum behind the pixels, which no reader here looks at, or of the pixels
    path.write_bytes(bytes(data))


CHANGES = {
    "a label of val": lambda f: (f / "labels/val/1.txt").write_text("0 0.5 0.5 0.4 0.4\n0 0.3 0.3 0.2 0.2\n"),
    "a label of val is gone": lambda f: (f / "labels/val/1.txt").unlink(),
    "a label of train": lambda f: (f / "labels/train/1.txt").write_text("0 0.5 0.5 0.4 0.4\n0 0.3 0.3 0.2 0.2\n"),
    "an image of val": lambda f: other_pixels(f / "images/val/1.png"),
    "an image of train": lambda f: other_pixels(f / "images/train/5.png"),
    "images exchanged": lambda f: [
        (f / "images/val/0.png").rename(f / "x"), (f / "images/val/1.png").rename(f / "images/val/0.png"),
        (f / "x").rename(f / "images/val/1.png"),
    ],
    "the classes' order": lambda f: (f / "data.yaml").write_text(
        "path: .\ntrain: images/train\nval: images/val\nnames: [dog, cat]\n"),
    "an image more": lambda f: (f / "images/val/2.png").write_bytes((f / "images/val/1.png").read_bytes()),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_run_with_other_images_labels_or_classes_has_another_key(folder, change):
    """All of them are read by what is in them: sizes and names stay as they were."""

    def key() -> str:
        data = module.read_data_yaml(folder / "data.yaml")
        rules = module.label_rules(data, data.names, "the model", False)
        photos = module.open_photos(data.images("train"), rules, Size.of(64))
        judging = module.read_labelled(data.images("val"), rules)
        options = FinetuneOptions(folder / "data.yaml")
        return module._key(folder / "m.safetensors", options, photos, judging, data.names)

    before = key()
    assert key() == before
    CHANGES[change](folder)
    assert key() != before


@pytest.mark.long
def test_two_processes_learn_what_one_learns(folder):
    found = []
    for processes in (1, 2):
        line = [sys.executable, "-m"]
        if processes > 1:
            line += ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
        line += ["dsconvert", "finetune", "m.safetensors", "--data", "data.yaml", "--epochs", "2", "--batch", "3",
                 "--out", f"o{processes}", "--threads", "1", "-q"]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            line, cwd=folder, env=environment, capture_output=True, text=True, timeout=HANGS, check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout.split() == [f"o{processes}/model.safetensors"]  # one speaks for both
        found.append(json.loads((folder / f"o{processes}/finetune.json").read_text()))
    assert len(found[0]["epochs"]) == len(found[1]["epochs"]) == 2
    for a, b in zip(found[0]["epochs"], found[1]["epochs"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3)
        assert a["map50_95"] == pytest.approx(b["map50_95"], abs=1e-3)


def test_every_process_goes_on_from_the_first_one_s_state(model, monkeypatch):
    _, latents = start(model, "shifts", "cpu")
    first, other = (State.new({k: v.clone().detach().requires_grad_() for k, v in latents.items()}) for _ in range(2))
    for number, name in enumerate(SETS, 1):
        for value in getattr(first, name).values():
            value.detach().fill_(number)
    first.steps, first.log = 7, [{"map50_95": 0.5}]
    monkeypatch.setattr(workers, "count", lambda: 2)
    monkeypatch.setattr(workers, "number", lambda: 1)
    monkeypatch.setattr(workers, "gathered", lambda item: [module._plain(first), item])
    got = module._spread(other)
    assert (got.steps, got.log) == (7, first.log)
    for number, name in enumerate(SETS, 1):
        assert all((value == number).all() for value in getattr(got, name).values())
    assert all(v.requires_grad and v.is_leaf for v in got.latents.values())


LINE = ["finetune", "m.safetensors", "--data", "data.yaml", "--epochs", "1", "--batch", "3"]


def test_the_command_writes_a_model_its_record_and_what_to_do_next(folder, call, rising):
    done = call(*LINE, cwd=folder)
    assert done.code == 0, done.err
    out = folder / "runs/dsconvert/m-finetuned"
    assert sorted(p.name for p in out.iterdir()) == ["finetune.json", "model.safetensors"]
    assert "reading images: 6 in" in done.err
    assert "training: 2 in" in done.err
    assert "before training: mAP50-95 0.0000" in done.err
    assert "epoch 1 of 1: loss " in done.err
    assert "Wrote runs/dsconvert/m-finetuned/model.safetensors" in done.out
    assert call("export", "--onnx", cwd=folder).code == 0  # the newest model is the finetuned one
    document = json.loads(call(*LINE, "--json", "--train", "shifts", cwd=folder).out)
    assert document["path"] == "runs/dsconvert/m-finetuned2/model.safetensors"
    assert document["best_epoch"] == 1
    assert document["map50_95"] > document["map50_95_before"]
    assert 0 < document["trained_share"] < 0.3
    quiet = call(*LINE, "-q", "--out", "o", cwd=folder)
    assert (quiet.out, quiet.err) == ("o/model.safetensors\n", "")
    assert load_model(folder / "o/model.safetensors").provenance["finetune"]["options"]["epochs"] == 1


def test_the_command_resumes_what_was_stopped(folder, call, rising, monkeypatch):
    original = module.write_state

    def stopping(*given):
        original(*given)
        if len(rising) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_state", stopping)
    two = [*LINE[:5], "2", *LINE[6:]]
    assert call(*two, cwd=folder).code == 130
    left = folder / "runs/dsconvert/m-finetuned"
    assert [p.name for p in left.iterdir()] == ["finetuning.safetensors"]
    done = call(*two, "--resume", cwd=folder)
    assert done.code == 0, done.err
    assert sorted(p.name for p in left.iterdir()) == ["finetune.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--epochs", "0"], "at least 1"),
        (["--batch", "0"], "at least 1"),
        (["--rate", "0"], "--rate must be above 0"),
        (["--mosaic", "2"], "--mosaic from 0 to 1"),
        (["--warmup", "9"], "--warmup from 0 to --epochs"),
        (["--train", "everything"], "--train"),
        (["--data", "other.yaml"], "no data file"),
        (["--data", "three.yaml"], "2 classes, three.yaml has 3"),
        (["--data", "unjudged.yaml"], "names no val images"),
        (["--resume"], "nothing to resume"),
        (["--resume", "--out", "new"], "nothing to resume"),
        (["--out", "there"], "already exists"),
    ],
)
def test_what_cannot_be_used_is_one_sentence_and_exit_2(folder, call, change, words):
    text = (folder / "data.yaml").read_text()
    (folder / "three.yaml").write_text(text.replace("dog", "dog, cow"))
    (folder / "unjudged.yaml").write_text(text.replace("val: images/val\n", ""))
    (folder / "there").mkdir()
    (folder / "there/model.safetensors").write_bytes(b"mine")
    done = call(*LINE, *change, cwd=folder)
    assert done.code == 2
    assert words in done.err
    assert "Traceback" not in done.err
    assert (folder / "there/model.safetensors").read_bytes() == b"mine"
    assert not (folder / "runs/dsconvert/m-finetuned").exists()


def test_a_checkpoint_or_a_missing_model_is_refused(folder, call):
    (folder / "best.pt").write_bytes(b"PK\x03\x04")
    assert "not a .safetensors file" in call("finetune", "best.pt", *LINE[2:], cwd=folder).err
    done = call("finetune", "none.safetensors", *LINE[2:], cwd=folder)
    assert (done.code, "no model file" in done.err) == (2, True)
    if not torch.cuda.is_available():
        done = call(*LINE, "--device", "cuda", cwd=folder)
        assert (done.code, "not available" in done.err) == (2, True)
