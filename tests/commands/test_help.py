"""Help, completion and version: what a user sees before the first model."""

from __future__ import annotations

import re
import shlex

import click
import pytest
from conftest import ROOT

from dsconvert.commands.cli import cli
from dsconvert.commands.quantize import CONFIGURABLE
from dsconvert.convert.config import recipe_names

COMMANDS = sorted(cli.commands)


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_80_columns_and_shows_an_example_that_is_right(name, call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # a wide terminal is no excuse
    done = call(name, "--help", cwd=tmp_path)
    assert done.code == 0
    assert max(map(len, done.out.splitlines())) <= 80
    examples = re.findall(rf"^ *(?:Examples?: )?(dsconvert {name} .+)$", done.out, re.MULTILINE)
    assert examples
    for example in examples:
        words = shlex.split(example)[2:]
        known = {option for p in cli.commands[name].params for option in p.opts}
        assert {w for w in words if w.startswith("-")} <= known
        # the parser takes it: nothing missing, nothing left over
        cli.commands[name].make_parser(click.Context(cli.commands[name])).parse_args(words)


def test_help_of_the_whole_names_every_command_and_exit_code(call, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    done = call("--help", cwd=tmp_path)
    assert max(map(len, done.out.splitlines())) <= 80
    for name in COMMANDS:
        assert re.search(rf"^  {name} ", done.out, re.MULTILINE)
    assert "..." not in done.out.split("Commands:")[1]  # no description is cut short
    for code in ("0 done", "1 a fault", "2 bad input", "3 a limit missed"):
        assert code in done.out
    for name in re.findall(r"^  dsconvert (\w+)", done.out, re.MULTILINE):
        assert name in cli.commands


def test_the_shell_completes_commands_and_options(call, tmp_path, monkeypatch):
    monkeypatch.setenv("_DSCONVERT_COMPLETE", "bash_source")
    script = call(cwd=tmp_path)
    assert "complete -o nosort -F _dsconvert_completion dsconvert" in script.out
    monkeypatch.setenv("_DSCONVERT_COMPLETE", "bash_complete")
    for words, wanted in {"dsconvert qu": "quantize", "dsconvert detect --save-": "--save-txt"}.items():
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        assert f"plain,{wanted}" in call(cwd=tmp_path).out.splitlines()


def test_every_option_and_recipe_in_the_document_exists():
    text = (ROOT / "docs" / "command-line.md").read_text()
    known = {option for command in cli.commands.values() for p in command.params for option in p.opts}
    left_out = {"--augment", "--visualize", "--update", "--dnn"}  # of YOLOv5's, and said to be
    assert set(re.findall(r"--[a-z][a-z-]+", text)) <= known | left_out | {"--help", "--nproc-per-node"}  # torchrun's
    assert all(f"[{name}](../calib/recipes/{name}.yaml)" in text for name in recipe_names())
    assert all(f"`{key}`" in text for key in CONFIGURABLE)


def test_version(call, tmp_path):
    assert re.fullmatch(r"dsconvert, version \d+\.\d+\.\d+\n", call("--version", cwd=tmp_path).out)


def test_words_of_the_user_are_escaped_too(call, tmp_path):
    done = call("\x1b[31m", cwd=tmp_path)
    assert done.code == 2
    assert "\x1b" not in done.err
