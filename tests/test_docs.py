"""The documentation: links lead somewhere, commands parse, the reference has everything, the site builds."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys

import click
import pytest
import torch
import yaml
from conftest import HANGS, ROOT

import dsconvert
from dsconvert.cli import cli

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ACTION = ROOT / "examples/github-action.yml"
DOCKERFILE = ROOT / "Dockerfile"


def hooks():
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    return made


def commands(text: str) -> list[str]:
    """Lines of shell blocks (fenced, indented) and console blocks that are dsconvert commands, without comments."""
    found, fenced = [], False
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced and line.strip("` ") in ("", "sh", "bash", "shell")
        elif line.startswith("$ dsconvert "):  # of a console block
            found.append(line[2:].strip())
        elif (fenced or line.startswith("    ")) and line.strip().startswith("dsconvert "):
            found.append(line.strip().split(" #")[0].strip())
    return found


def parse(line: str) -> None:
    """As the command line would, but run nothing. A configuration file is read while parsing; a recipe stands in."""
    name, *arguments = shlex.split(re.sub(r"--config \S+\.yaml", "--config balanced", line))[1:]
    if (name, arguments) == ("--version", []):  # an option of the group
        return
    if name not in cli.commands:
        raise click.UsageError(f"no command {name}")
    threads = torch.get_num_threads()
    try:
        cli.commands[name].make_context(name, arguments)
    except click.exceptions.Exit:  # --help
        pass
    finally:
        torch.set_num_threads(threads)  # the option sets them while it is parsed


def anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, part = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert part in map(anchor, headings), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_pages_exist_with_their_options(page):
    for line in commands(page.read_text()):
        try:
            parse(line)
        except click.ClickException as error:
            pytest.fail(f"{page.name}: {line}: {error.format_message()}")


def test_the_check_of_commands_can_fail():
    text = "```sh\ndsconvert eval a # why\n```\n    dsconvert info b\n\ndsconvert says c.\n"
    text += "```console\n$ dsconvert d e\nx\n```\n"
    assert commands(text) == ["dsconvert eval a", "dsconvert info b", "dsconvert d e"]
    for wrong in ("dsconvert eval --nothing", "dsconvert fly", "dsconvert export --layout tight"):
        with pytest.raises(click.ClickException):
            parse(wrong)


def test_the_example_workflow_calls_commands_that_exist():
    steps = yaml.safe_load(ACTION.read_text())["jobs"]["convert"]["steps"]
    lines = [line for s in steps for line in str(s.get("run", "")).splitlines() if line.startswith("dsconvert ")]
    assert [line.split()[1] for line in lines] == ["quantize", "export", "eval", "compare"]
    for line in lines:
        parse(line)


def container_commands(text: str) -> list[str]:
    """What a Dockerfile's `docker run ... dsconvert ...` comments and its CMD have the container run."""
    shown = re.findall(r"^# docker run .* (dsconvert .+)$", text, re.MULTILINE)
    default = re.findall(r"^CMD (\[.*\])$", text, re.MULTILINE)
    return shown + [shlex.join(["dsconvert", *json.loads(words)]) for words in default]


def test_the_dockerfile_calls_commands_that_exist():
    text = DOCKERFILE.read_text()
    assert re.search(r'^ENTRYPOINT \[".*/dsconvert"\]$', text, re.MULTILINE)
    shown, default = container_commands(text)
    parse(shown)
    assert default == "dsconvert --help"  # of the group: it has no command to parse
    wrong = text.replace("--calib", "--calibrate-on")
    assert wrong != text
    with pytest.raises(click.ClickException):
        parse(container_commands(wrong)[0])


def test_the_reference_has_every_command_option_and_function():
    text = hooks().reference()
    for name, command in cli.commands.items():
        assert f"### dsconvert {name}\n" in text
        section = text.split(f"### dsconvert {name}\n")[1].split("\n### ")[0]
        for parameter in command.params:
            if isinstance(parameter, click.Option) and not parameter.hidden:
                assert parameter.opts[0] in section
        assert max(map(len, section.splitlines())) <= 80
    for part in (
        "### dsconvert.quantize\n",
        "### dsconvert.evaluate\n",
        "#### QuantizedModel.export\n",
        "    bits: ",
    ):
        assert part in text
    assert hooks().MARKER in (DOCS / "reference.md").read_text()
    assert set(dsconvert.__all__) >= set(re.findall(r"dsconvert\.(\w+)\(", (DOCS / "tutorial.md").read_text()))


def test_the_navigation_lists_what_exists_known_pages_first():
    order = hooks().page_order(["zebra.md", "faq.md", "index.md", "apple.md"])
    assert order == ["index.md", "faq.md", "apple.md", "zebra.md"]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANGS)
    assert done.returncode == 0, done.stderr
    built = {p.name for p in (tmp_path / "site").glob("*.html")}
    assert built >= {p.with_suffix(".html").name for p in DOCS.glob("*.md")}
    assert not list((tmp_path / "site").rglob("*.py*"))
    for page in (tmp_path / "site").glob("*.html"):  # readable with no network
        assert not re.search(r"<(?:script|link rel=.stylesheet.)[^>]*(?:src|href)=.?https?:", page.read_text())
    assert "dsconvert bench [OPTIONS]" in (tmp_path / "site/reference.html").read_text()


@pytest.mark.parametrize("page", ["compatibility", "coverage", "reliability", "security"])
def test_tests_named_as_proof_exist(page):
    text = (ROOT / "docs" / f"{page}.md").read_text()
    named = re.findall(r"`(tests/[a-z_/0-9]+\.py)(?:::(test_\w+))?`", text)
    assert named
    for path, name in named:
        source = (ROOT / path).read_text()
        assert not name or f"def {name}(" in source, f"{path}::{name}"
