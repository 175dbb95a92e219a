"""quantize --cfg: a model yaml's DSConv2D_C3 rows choose the layers."""

from __future__ import annotations

import json

import fake_yolov5
import pytest
import yaml
from conftest import TINY, randomise

from dsconvert.base.errors import InputError
from dsconvert.yolo.cfgfile import OURS, chosen_blocks, read_rows
from dsconvert.yolo.network import Network

NAME = "yolov5s_DSConv2D_C3.yaml"
KINDS = Network(TINY, 2, 3).kinds


def dump(config: dict) -> str:
    """Without aliases for what occurs twice."""
    return yaml.safe_dump(json.loads(json.dumps(config)))


def tiny_cfg(**changed) -> dict:
    rows = [*TINY["head"]]
    rows[2] = [-1, 3, "DSConv2D_C3", [96, False]]
    return {**TINY, "head": rows, **changed}


def test_our_yaml_is_yolov5s_with_dsconv_at_13_17_20_23():
    config = yaml.safe_load((OURS / NAME).read_text())
    rows = read_rows(OURS / NAME)
    assert [i for i, kind in enumerate(rows) if kind == "DSConv2D_C3"] == [13, 17, 20, 23]
    assert (config["nc"], len(rows)) == (6, 25)
    # yolov5s has 7,235,389 parameters for the 80 classes of COCO, as its authors publish; Detect's 255 channels for 80
    # become 33 for 6, over 128, 256 and 512 channels and a bias each
    six = Network(config, 6, 3)
    count = sum(p.numel() for p in six.parameters())
    assert count == 7_235_389 - (255 - 33) * (128 + 256 + 512 + 3)
    assert [six.kinds[i] for i in (13, 17, 20, 23)] == ["C3"] * 4
    assert sum(p.numel() for p in Network(config, 80, 3).parameters()) == 7_235_389


def test_it_trains_in_a_registered_tree():
    from dsconvert.torch import DSConv2D_C3, register

    with fake_yolov5.tree() as yolo:
        register(yolo)
        config = {**yaml.safe_load((OURS / NAME).read_text()), "width_multiple": 0.125}
        layers, _ = yolo.parse_model(config, [3])
        assert [i for i, layer in enumerate(layers) if isinstance(layer, DSConv2D_C3)] == [13, 17, 20, 23]


def test_quantize_converts_what_the_file_names(work, call):
    (work / "ours.yaml").write_text(dump(tiny_cfg()))
    options = ["--imgsz", "64", "--bits", "4", "--cfg", "ours.yaml", "--json"]  # by damage a layer could get 8
    done = call("quantize", "best.pt", "--calib", "images", *options, cwd=work)
    assert done.code == 0, done.err
    layers = json.loads(done.out)["layers"]
    assert [r["name"] for r in layers if r["kind"] == "DSConv"] == ["model.7.m.0.cv1", "model.7.m.0.cv2"]


@pytest.mark.parametrize(
    ("cfg", "more", "words"),
    [
        ("ours.yaml", ["--blocks", "head"], "--cfg and --blocks each choose the layers"),
        ("ours.yaml", ["--scope", "all"], "--cfg and --scope each choose the layers"),
        ("ours.yaml", ["--config", "seed"], "each choose the layers"),
        ("missing.yaml", [], f"no readable model yaml at missing.yaml; dsconvert brings {NAME}"),
        (NAME, [], "has 25 layers, the checkpoint 9"),
    ],
)
def test_conflicts_and_other_models_are_one_sentence(work, call, cfg, more, words):
    (work / "ours.yaml").write_text(dump(tiny_cfg()))
    done = call("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--cfg", cfg, *more, cwd=work)
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert len(done.err.strip().splitlines()) == 1
    assert not (work / "runs").exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a: [", "readable YAML"),
        ("- 1", "needs a backbone and a head"),
        ("", "needs a backbone and a head"),
        ("backbone: []\nhead: []", "needs a backbone and a head"),
        ("backbone: [[-1, 1, C3]]\nhead: [[-1, 1, C3, []]]", "Layer 0 of"),
        ("backbone: [[-1, 1, 7, []]]\nhead: [[-1, 1, C3, []]]", "Layer 0 of"),
        ("backbone: &a [*a]\nhead: []", "aliases"),
        ("backbone: " + "[" * 5000, "nested"),
        ("backbone: !!python/object/apply:os.system [touch canary]\nhead: [1]", "readable YAML"),
        ("nc: 2001-99-99", "readable YAML"),
        ("nc: " + "9" * 9000, "readable YAML"),
        ("? [1]\n: 2", "readable YAML"),
        ("#" * (64 << 10) + "\n", "longer than 64 kB"),
        ("nc: \x00", "readable YAML"),
        (dump({**tiny_cfg(), "backbone": [[-1, 1, "C3", [8]] for _ in range(300)]}), "more than 200"),
        (dump(TINY), "no DSConv2D_C3"),
        (dump(tiny_cfg(backbone=[TINY["backbone"][1], *TINY["backbone"][1:3], TINY["backbone"][4],
                                           list(TINY["backbone"][4])])), "Layer 3 is SPPF in .*, but Conv"),
        (dump(tiny_cfg(backbone=[[-1, 1, "DSConv2D", [32, 6, 2, 2]], *TINY["backbone"][1:]])),
         "Layer 0 of .* is DSConv2D;"),
    ],
)  # fmt: skip
def test_hostile_and_unfit_files_are_one_sentence(tmp_path, monkeypatch, text, words):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        chosen_blocks(path, KINDS)
    assert not (tmp_path / "canary").exists()


def test_a_checkpoint_with_dsconv_rows_converts(tmp_path, work, call):
    """One trained in a registered tree: its own yaml names DSConv2D_C3."""
    from pt_writer import yolov5_bytes

    from dsconvert.yolo.checkpoint import load_checkpoint
    from dsconvert.yolo.network import head_from_detect

    network = Network(tiny_cfg(), 2, 3).eval()
    randomise(network)
    (work / "best.pt").write_bytes(yolov5_bytes(network, head_from_detect(network.detect, [4, 8], ["cat", "dog"])))
    assert load_checkpoint(work / "best.pt").network.kinds == KINDS
    done = call("quantize", "best.pt", "--calib", "images", "--imgsz", "64", "--bits", "4", "--quiet", cwd=work)
    assert done.code == 0, done.err
