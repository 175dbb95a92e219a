"""Configuration files: what they may say, and what hostile ones are told."""

from __future__ import annotations

import pytest
from conftest import ROOT

from dsconvert.base.errors import InputError
from dsconvert.convert.config import read_config, recipe_names
from dsconvert.convert.quantize import QuantizeOptions

ALLOWED = ["bits", "block-size", "blocks", "calib", "imgsz"]


def read(tmp_path, text: str) -> dict[str, str]:
    (tmp_path / "c.yaml").write_text(text)
    return read_config(str(tmp_path / "c.yaml"), ALLOWED)


def test_values_stand_as_they_would_on_the_command_line(tmp_path):
    text = "# ours\nblock_size: 16\nblocks: 13,17\nbits:\nimgsz: 0640.5\n"
    assert read(tmp_path, text) == {"block-size": "16", "blocks": "13,17", "imgsz": "0640.5"}
    assert read(tmp_path, "bits: null\n") == read(tmp_path, "") == read(tmp_path, "# nothing\n") == {}


def test_images_are_found_from_the_file(tmp_path):
    assert read(tmp_path, "calib: photos\n") == {"calib": str(tmp_path / "photos")}
    assert read(tmp_path, "calib: /photos\n") == {"calib": "/photos"}


def test_recipes_go_by_their_names_and_are_those_in_calib():
    assert recipe_names() == ["balanced", "safest", "seed"]
    for name in recipe_names():
        in_repository = read_config(str(ROOT / "calib" / "recipes" / f"{name}.yaml"), [*ALLOWED, *OTHERS])
        assert read_config(name, [*ALLOWED, *OTHERS]) == in_repository != {}


def test_balanced_is_what_happens_without_a_recipe():
    for name, value in read_config("balanced", [*ALLOWED, *OTHERS]).items():
        assert value == str(getattr(QuantizeOptions(), name))


OTHERS = ["scope", "activations", "samples"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("bitz: 4", "sets bitz, which is not an option; options are bits, block-size"),
        ("block-size: 4\nblock_size: 8", "sets block-size twice"),
        ("bits: [4]", "neither a number nor a word"),
        ("bits: {a: 4}", "neither a number nor a word"),
        ("- bits", "not a list of options"),
        ("bits", "not a list of options"),
        ("[1]: 2", "not a list of options"),
        ("bits: 4\n---\nbits: 3", "not a readable YAML"),
        ("bits: {", "not a readable YAML"),
        ("bits: \x1b", "not a readable YAML"),
        ("[" * 60_000, "nested"),
        ("- " * 30_000, "nested"),
        ("bits: &a 4\nimgsz: *a", "aliases"),
        ("#" * 70_000, "longer than 64 kB"),
    ],
)
def test_what_cannot_be_used_is_named(tmp_path, text, words):
    with pytest.raises(InputError, match=words):
        read(tmp_path, text)


def test_an_alias_bomb_is_refused_before_it_goes_off(tmp_path):
    lines = ["a0: &a0 [x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 30)]
    with pytest.raises(InputError, match="aliases"):
        read(tmp_path, "\n".join(lines))


def test_tags_make_nothing(tmp_path):
    assert read(tmp_path, "bits: !!int 4") == {"bits": "4"}
    with pytest.raises(InputError, match="neither"):
        read(tmp_path, "bits: !!python/object/apply:os.system [exit]")


def test_no_file_and_no_text(tmp_path):
    with pytest.raises(InputError, match="the recipes are balanced, safest, seed\\."):
        read_config("fastest", ALLOWED)
    (tmp_path / "c.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not a readable YAML"):
        read_config(str(tmp_path / "c.yaml"), ALLOWED)
