"""Which convolutions the words choose."""

from __future__ import annotations

import pytest
import yaml
from conftest import DEMO

from dsconvert.base.errors import InputError
from dsconvert.yolo.lower import lower
from dsconvert.yolo.network import Network
from dsconvert.yolo.plan import choose_convs, choose_layers


@pytest.fixture(scope="module")
def yolov5n() -> Network:
    return Network(yaml.safe_load((DEMO / "model.yaml").read_text()), 6, 3).fused()


def chosen(network: Network, blocks: str, scope: str) -> set[str]:
    return set(choose_convs(network, lower(network)[0], blocks, scope))


def test_blocks_by_word_and_number(yolov5n):
    assert choose_layers(yolov5n, "all") == [2, 4, 6, 8, 13, 17, 20, 23]
    assert choose_layers(yolov5n, "head") == [13, 17, 20, 23]
    assert choose_layers(yolov5n, "backbone") == [2, 4, 6, 8]
    assert choose_layers(yolov5n, "23,13") == [13, 23]


def test_published_conversion_is_the_head_bottlenecks(yolov5n):
    names = {f"model.{i}.m.0.{cv}.conv" for i in (13, 17, 20, 23) for cv in ("cv1", "cv2")}
    assert chosen(yolov5n, "head", "bottleneck") == names
    assert chosen(yolov5n, "13,17,20,23", "bottleneck") == names


def test_scopes_grow(yolov5n):
    bottleneck, c3, everything = (chosen(yolov5n, "head", s) for s in ("bottleneck", "c3", "all"))
    assert c3 - bottleneck == {f"model.{i}.{cv}.conv" for i in (13, 17, 20, 23) for cv in ("cv1", "cv2", "cv3")}
    assert everything - c3 == {f"model.{i}.conv" for i in (10, 14, 18, 21)}


def test_all_is_everything_but_stem_and_detect(yolov5n):
    names = {n.name for n in lower(yolov5n)[0].convs()}
    assert names - chosen(yolov5n, "all", "all") == {"model.0.conv", *(f"model.24.m.{i}" for i in range(3))}
    assert len(names) == 60


def test_a_list_takes_the_convs_between(yolov5n):
    layers = {int(n.split(".")[1]) for n in chosen(yolov5n, "4,8", "all")}
    assert layers == {4, 5, 6, 7, 8}


@pytest.mark.parametrize(
    ("blocks", "scope", "words"),
    [
        ("5", "all", "Layer 5 is not a C3"),
        ("neck", "all", "blocks neck"),
        ("99", "c3", "99"),
        ("all", "x", "scope x"),
    ],
)
def test_nonsense_is_refused(yolov5n, blocks, scope, words):
    with pytest.raises(InputError, match=words):
        chosen(yolov5n, blocks, scope)
