"""The documentation: links lead somewhere, commands parse, the reference has everything, the site builds."""

from __future__ import annotations

import ast
import importlib
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
from loaded import load

import dsconvert
from dsconvert.base import kept, threads
from dsconvert.commands.cli import cli
from dsconvert.convert import division
from dsconvert.convert.config import recipe_names
from dsconvert.dsconv.codes import trellis_search
from dsconvert.dsconv.format import M_MAX, PAIR_MAX
from dsconvert.export.weights.layouts import LAYOUTS, run_by
from dsconvert.fit import channels, draws, moments
from dsconvert.measure import calibration, importance, views
from dsconvert.model.file import VERSION
from dsconvert.scoring import drop
from dsconvert.scoring.compare import MOST_SHIFT
from dsconvert.tune import distil
from dsconvert.yolo.lower import PARTS

DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", *sorted(DOCS.glob("*.md"))]
ACTION = ROOT / "examples/github-action.yml"
DOCKERFILE = ROOT / "Dockerfile"
hooks = load(DOCS / "hooks.py")


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
    text = hooks.reference()
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
    assert hooks.MARKER in (DOCS / "reference.md").read_text()
    assert set(dsconvert.__all__) >= set(re.findall(r"dsconvert\.(\w+)\(", (DOCS / "tutorial.md").read_text()))


def test_the_navigation_lists_what_exists_in_its_groups():
    found = hooks.navigation(["zebra.md", "faq.md", "index.md", "apple.md", "method.md"])
    assert found == [{"Use": ["index.md", "faq.md"]}, {"Method": ["method.md"]}, "apple.md", "zebra.md"]


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


# --- what the pages say of the code -----------------------------------------------------------------------------------

NOT_OURS = {"train.py", "val.py", "detect.py", "export.py"}  # scripts of YOLOv5's tree
NOT_OPTIONS_OF_OURS = {"--user", "--require-hashes", "--weights"}  # docker's, pip's, YOLOv5's
NOT_OPTIONS_OF_OURS |= {"--augment", "--visualize", "--update", "--dnn"}  # of YOLOv5, named as left out
PACKAGES = sorted(p.parent.name for p in (ROOT / "dsconvert").glob("*/__init__.py"))
OPTIONS = {
    name: {o for p in command.params if isinstance(p, click.Option) for o in (*p.opts, *p.secondary_opts)} | {"--help"}
    for name, command in cli.commands.items()
}


def spans(text: str) -> list[str]:
    """What stands in single back quotes, on one line each."""
    text = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    return [" ".join(found.split()) for found in re.findall(r"`([^`]+)`", text)]


def missing_file(span: str) -> bool:
    """Whether a span is a path or name of a source file that is not there."""
    if not re.fullmatch(r"[\w./-]*\w\.(?:py|cpp|lock|toml|cjs)", span) or span in NOT_OURS:
        return False
    if "/" in span:
        return not any((ROOT / home / span).exists() for home in ("", "dsconvert"))
    homes = ("dsconvert", "benchmarks", "docs", "tests")
    return not (ROOT / span).exists() and not any(True for home in homes for _ in (ROOT / home).rglob(span))


def missing_name(span: str) -> bool:
    """Whether a span is a dotted name of ours, such as `fit.gptq` or `yolo.boxes.Boxes`, that is not there."""
    full = span.removeprefix("dsconvert.")
    short = full.split(".")[0] in {*PACKAGES} - {"torch"} and "." in full
    if re.match(r"model\.\d", span):  # a layer's name
        return False
    if not re.fullmatch(r"[\w.]+\w", span) or span in NOT_OURS or span.endswith(".html") or not (full != span or short):
        return False
    home: object = dsconvert
    for part in full.split("."):
        try:
            module = f"{home.__name__}.{part}" if hasattr(home, "__path__") else ""
            home = importlib.import_module(module) if module else getattr(home, part)
        except (ImportError, AttributeError):
            if not hasattr(home, part):
                return True
            home = getattr(home, part)
    return False


def script_options(path: str) -> set[str]:
    """Options of a script of ours, as its source has them."""
    return {*re.findall(r'"(--[\w-]+)"', (ROOT / path).read_text())}


def strange_options(text: str) -> list[str]:
    """Options in the spans of a text that their command, or without a command any, does not have. In an item of a list
    that begins with a command, all are that command's, unless the span names another one."""
    every, strange = set().union(*OPTIONS.values(), NOT_OPTIONS_OF_OURS, {"--version"}), []
    for item in re.split(r"\n(?=- |\n|\|)", text):
        begins = re.match(r"\s*- `(\w+)[^`.]*`(?!,)", item)
        subject = begins[1] if begins and begins[1] in OPTIONS else ""
        scripts = {name: script_options(name) for name in re.findall(r"`python (benchmarks/\w+\.py)", item)}
        for span in spans(item):
            words = [*span.removeprefix("dsconvert ").split(), "", ""]
            command, known = subject, OPTIONS.get(subject, every.union(*scripts.values()))
            if words[1] in scripts:
                command, known = words[1], scripts[words[1]]
            elif words[0] in OPTIONS:
                command, known = words[0], OPTIONS[words[0]]
            elif not words[0].startswith("-"):
                continue  # another program
            found = re.findall(r"(?<![\w-])--[a-z][\w-]+", span)
            strange += [f"{option} of {command or 'no command'}" for option in found if option not in known]
    for option, listed in re.findall(r"`(--[\w-]+)` of ((?:`\w+`(?:, | and )?)+)", text):
        strange += [f"{option} of {c}" for c in re.findall(r"\w+", listed) if c in OPTIONS and option not in OPTIONS[c]]
    return strange


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_files_names_and_options_in_the_text_exist(page):
    text = page.read_text()
    found = spans(text)
    assert not [s for s in found if missing_file(s)]
    assert not [s for s in found if missing_name(s)]
    assert not strange_options(text)
    for target in re.findall(r"\bmake ([a-z]+(?:-[a-z]+)?)(?=`|    )", text):
        assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE), target


def test_the_check_of_the_text_can_fail():
    assert missing_file("dsconvert/nothing.py")
    assert missing_file("fit/nothing.py")
    assert missing_file("nothing.py")
    assert not missing_file("dsconvert/fit/gptq.py")
    assert not missing_file("fit/gptq.py")
    assert not missing_file("gptq.py")
    assert missing_name("fit.nothing")
    assert missing_name("dsconvert.fit.gptq.nothing")
    assert not missing_name("fit.gptq.fit_weight_gptq")
    assert not missing_name("dsconvert.scoring")
    assert strange_options("see `--calibrate`") == ["--calibrate of no command"]
    assert strange_options("`eval --calib photos`") == ["--calib of eval"]
    assert strange_options("- `eval` takes `--calib`, as\n  `quantize --calib` does") == ["--calib of eval"]
    assert strange_options("`--calib` of `quantize` and `eval`") == ["--calib of eval"]
    assert strange_options("`python benchmarks/flips.py --often 7`") == ["--often of benchmarks/flips.py"]
    assert strange_options("`dsconvert eval --data d.yaml`, `--calib`, `detect.py --dnn`") == []


def rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the first table whose first column has that heading, without the heading."""
    part = text.split(f"\n| {heading} |")[1].split("\n\n")[0]
    return [[c.strip() for c in line.strip("|").split(" | ")] for line in part.splitlines()[2:]]


def test_contributing_has_a_table_of_folders_with_every_package_once():
    table = rows((DOCS / "contributing.md").read_text(), "folder")
    named = [name for row in table for name in spans(row[0])]
    assert sorted(n for n in named if re.fullmatch(r"dsconvert/\w+", n)) == [f"dsconvert/{p}" for p in PACKAGES]
    for name in named:
        assert (ROOT / name).exists(), name
    tops = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith((".", "__"))}
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split("\n")
    kept = {line.split("/")[0] for line in tracked if "/" in line} or tops
    assert {n.split("/")[0] for n in named} >= {t for t in tops & kept}


def test_layouts_and_engines_are_those_of_the_code():
    page = (DOCS / "compatibility.md").read_text()
    heads = [c.strip() for c in re.search(r"^\| engine \| packed.*$", page, re.MULTILINE)[0].strip("|").split("|")]
    runs = {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows(page, "engine")}
    assert list(LAYOUTS) == heads[1 : 1 + len(LAYOUTS)]
    for engine in ("ONNX Runtime", "OpenVINO"):
        assert [layout for layout in LAYOUTS if runs[engine][layout] == "yes"] == run_by(engine)
    refused = [layout for layout in LAYOUTS if layout not in run_by("OpenVINO")]
    assert refused
    faq = (DOCS / "faq.md").read_text().split("## Does it run in OpenVINO?\n\n")[1]
    howto = (DOCS / "howto.md").read_text().split("- OpenVINO reads ")[1]
    for before, after in (faq.split(";", 1), howto.split("but not", 1)):
        assert [s for s in spans(before) if s in LAYOUTS] == run_by("OpenVINO")
        assert [s for s in spans(after) if s in LAYOUTS][: len(refused)] == refused
    for path in PAGES:
        assert not re.search(r"OpenVINO[^.]*\b(reads|runs|takes) (all|every) layouts?", path.read_text())


def test_layouts_are_spelled_as_many_times_as_there_are():
    page = (DOCS / "onnx.md").read_text()
    assert [row[0] for row in rows(page, "layout")] == list(LAYOUTS)
    assert [int(row[2].split(",")[0]) for row in rows(page, "layout")] == [x.opset for x in LAYOUTS.values()]
    counted = {4: "four", 5: "five", 6: "six", 7: "seven"}[len(LAYOUTS)]
    assert f"{counted} layouts (`dsconvert/export/weights/layouts.py`)" in " ".join(page.split())


def test_exit_codes_are_those_of_the_code():
    tree, codes = ast.parse((ROOT / "dsconvert/commands/cli.py").read_text()), set()
    for call in (n for n in ast.walk(tree) if isinstance(n, ast.Call)):
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        if name in ("exit", "_exit", "_fail"):
            codes |= {a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, int)}
    page = [int(row[0]) for row in rows((DOCS / "command-line.md").read_text(), "code")]
    assert page == sorted(codes)
    assert codes >= {0, 1, 2, 3}
    for text in ((ROOT / "README.md").read_text(), cli.help):
        said = text.split("Exit codes: ")[1].split("a limit missed")[0]
        assert {int(n) for n in re.findall(r"\b\d\b", said)} == {0, 1, 2, 3}


def test_recipes_in_the_pages_are_those_there_are():
    page = rows((DOCS / "command-line.md").read_text(), "recipe")
    assert sorted(re.match(r"\[(\w+)\]", row[0])[1] for row in page) == recipe_names()
    assert f"`--config {'|'.join(recipe_names())}`" in (DOCS / "command-line.md").read_text()


def test_the_readme_names_the_way_for_other_networks():
    assert "`quantize model.onnx" in (ROOT / "README.md").read_text()


def test_one_module_reads_pickles_and_the_pages_name_it():
    reads = re.compile(r"^import pickle$|pickle\.loads?\(|torch\.load\(", re.MULTILINE)
    modules = [p.relative_to(ROOT) for p in (ROOT / "dsconvert").rglob("*.py") if reads.search(p.read_text())]
    assert [str(m) for m in modules] == ["dsconvert/yolo/archive.py"]
    assert f"Only `{modules[0]}` reads a pickle" in (DOCS / "contributing.md").read_text()
    assert "`dsconvert/yolo/archive.py`: `LAYERS`" in " ".join((DOCS / "contributing.md").read_text().split())
    assert "dsconvert/yolo/archive.py" in (DOCS / "security.md").read_text()
    assert not [p.name for p in PAGES if "weights_only" in p.read_text()]


@pytest.mark.parametrize(
    ("page", "pattern", "value"),
    [
        ("command-line.md", r"network on (\d+) of its images", drop.SCORED),
        ("command-line.md", r"warns where the mean best score shifts by more than ([\d.]+\d)", MOST_SHIFT),
        ("command-line.md", r"stays in memory up to (\d+) GiB", kept.MEMORY >> 30),
        ("method.md", r"stay in memory up to (\d+) GiB", kept.MEMORY >> 30),
        ("method.md", r"Each image gives (\d+) positions", draws.POSITIONS),
        ("method.md", r"each gives fewer, together ([\d,]+), and", draws.TOGETHER),
        ("method.md", r", and at least (\d+) \(`dsconvert/fit/draws", draws.FEWEST),
        ("method.md", r"more than (\d+) images it ends before the last", importance.BRIEFLY),
        ("method.md", r"(\d+) of 128 to 512", importance.THOROUGH),
        ("method.md", r"Fewer than (\d+) photos get views", views.WANTED),
        ("method.md", r"Fewer than (\d+) photos also get synthesised", calibration.FEW),
        ("method.md", r"The share is (\d+) / n for n photos", moments.SURE),
        ("method.md", r"photos, but at least ([\d.]+\d) and at most", moments.DAMPING),
        ("method.md", r"photos, but at least [\d.]+ and at most (\d+)\.", moments.MOST_DAMPING),
        ("method.md", r"fitted in up to (\d+) groups", channels.PARTS),
        ("method.md", r"search has gone (\d+) columns further", trellis_search.AHEAD),
        ("method.md", r"an integer from 1 to (\d+) for each block", M_MAX),
        ("method.md", r"`\|w1 \+ w2\| <= (\d+)`", PAIR_MAX),
        ("training.md", r"Adam takes (\d+) images a step", distil.IMAGES),
        ("training.md", r"They are (\d+) photos beyond `--samples`", division.JUDGES),
        ("training.md", r"every eighth of (\d+) or more photos", division.FEWEST),
        ("method.md", r"There are (\d+) images of 320 pixels", calibration.SYNTHETIC_IMAGES),
        ("training.md", r"The rate is ([\d.]+\d) for factors", distil.RATE),
        ("reliability.md", r"Layers of fewer than ([\d,]+) weights", threads.FEW),
        ("../CHANGELOG.md", r"Model files are of version (\d+)", VERSION),
    ],
)
def test_numbers_in_the_text_are_the_codes(page, pattern, value):
    found = re.search(pattern, " ".join((DOCS / page).read_text().split()))
    assert found, pattern
    assert float(found[1].replace(",", "")) == value


@pytest.mark.parametrize(
    ("page", "pattern", "command", "option"),
    [
        ("howto.md", r"The default is `--samples (\d+)`", "quantize", "samples"),
        ("command-line.md", r"among them `--conf-thres ([\d.]+)`", "detect", "conf_thres"),
        ("command-line.md", r"`--iou-thres ([\d.]+)` and `--save-conf`", "detect", "iou_thres"),
        ("command-line.md", r"`eval --conf-thres` \(([\d.]+)\)", "eval", "conf_thres"),
        ("report.md", r"`--images N` sets the number of photos \((\d+)\)", "report", "images"),
        ("training.md", r"The default of ([\d.]+) is meant for its \d+ epochs", "finetune", "rate"),
        ("training.md", r"is meant for its (\d+) epochs", "finetune", "epochs"),
        ("training.md", r"is meant for its \d+ epochs of (\d+) images", "finetune", "batch"),
    ],
)
def test_defaults_in_the_text_are_the_commands(page, pattern, command, option):
    found = re.search(pattern, " ".join((DOCS / page).read_text().split()))
    assert found, pattern
    (parameter,) = (p for p in cli.commands[command].params if p.name == option)
    assert float(found[1]) == parameter.default


def test_detects_convolutions_are_named_as_they_are():
    page = " ".join((DOCS / "compatibility.md").read_text().split())
    said = re.search(r"Detect's convolutions is in three parts, (.+?), of segmentation .+? with (.+?);", page)
    assert tuple(part.removeprefix(".") for part in spans(f"{said[1]} {said[2]}")) == PARTS


def test_every_page_has_its_place_in_the_navigation():
    groups = hooks.GROUPS
    assert list(groups) == ["Use", "Reference", "Method", "Trust", "Contribute"]
    assert sorted(page for pages in groups.values() for page in pages) == sorted(p.name for p in DOCS.glob("*.md"))
