"""Extend `mkdocs build`: order the pages in groups, rewrite links out of docs/, and fill reference.md from the code.

A new page is listed in one of GROUPS. A page that is in no group stands behind the last one.
"""

from __future__ import annotations

import inspect
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

GROUPS = {
    "Use": ("index.md", "ten-minutes.md", "tutorial.md", "howto.md", "datasets.md", "detectors.md", "modules.md",
            "training.md", "faq.md"),
    "Reference": ("reference.md", "command-line.md", "report.md", "compatibility.md", "glossary.md"),
    "Method": ("method.md", "onnx.md", "classification.md", "notebook.md"),
    "Trust": ("accuracy.md", "performance.md", "coverage.md", "reliability.md", "security.md"),
    "Contribute": ("contributing.md",),
}  # fmt: skip
MARKER = "<!-- generated here by docs/hooks.py -->"
DOCS = Path(__file__).resolve().parent
LEAVING = re.compile(r"(?<!!)\[([^\]]*)\]\((\.\./[^)\s]+)\)")
log = logging.getLogger("mkdocs.hooks.dsconvert")


def navigation(found: list[str]) -> list[Any]:
    """The navigation of these pages as mkdocs wants it: a title and its pages for each group, then other pages."""
    groups = {title: [page for page in pages if page in found] for title, pages in GROUPS.items()}
    known = {page for pages in groups.values() for page in pages}
    return [*({title: pages} for title, pages in groups.items() if pages), *sorted(set(found) - known)]


def on_config(config: Any) -> Any:
    """Set the navigation; mkdocs calls this once."""
    config["nav"] = navigation([p.name for p in DOCS.glob("*.md")])
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replace a link to a file outside of docs/ by its path, as the site lacks it; mkdocs calls this for a page."""
    for target in (m[2] for m in LEAVING.finditer(markdown)):
        if not (DOCS / target.split("#")[0]).exists():
            log.warning("%s links to %s, which is not there.", page.file.src_path, target)
    markdown = LEAVING.sub(lambda m: f"{m[1]} (`{os.path.normpath('docs/' + m[2])}`)", markdown)
    return markdown.replace(MARKER, reference()) if MARKER in markdown else markdown


def reference() -> str:
    """Write every command's --help and every name of the Python API as Markdown."""
    from dsconvert.commands.cli import cli

    lines = ["## Commands", "", *_help("dsconvert", cli, None)]
    return "\n".join([*lines, "", "## Python", "", *_api()])


def _help(name: str, command: click.Command, parent: click.Context | None) -> Iterator[str]:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=80, **command.context_settings)
    yield from (f"### {context.command_path}", "", "```text", command.get_help(context), "```", "")
    for below in getattr(command, "commands", {}).values():
        yield from _help(below.name, below, context)


def _api() -> Iterator[str]:
    import dsconvert

    for name in dsconvert.__all__:
        thing = getattr(dsconvert, name)
        if inspect.isfunction(thing):
            yield from _described("###", f"dsconvert.{name}", thing)
        elif inspect.isclass(thing) and thing.__module__ in ("dsconvert.api.models", "dsconvert.api.photos"):
            yield from (f"### dsconvert.{name}", "", inspect.getdoc(thing) or "", "")
            for member, value in vars(thing).items():
                if isinstance(value, property):
                    yield f"- `.{member}`: {' '.join((inspect.getdoc(value) or '').split())}"
                elif inspect.isfunction(value) and not member.startswith("_"):
                    yield from ("", *_described("####", f"{name}.{member}", value))
            yield ""


def _described(level: str, name: str, function: Any) -> Iterator[str]:
    signature = re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(function)).replace("self, ", ""))
    yield from (f"{level} {name}", "", "```python", _broken(f"{name}{signature}"), "```", "")
    yield from (inspect.getdoc(function) or "", "")


def _broken(call: str) -> str:
    """Break a long signature into a line for every parameter."""
    if len(call) <= 100:
        return call
    start, end = call.index("("), call.rindex(")")
    parts, depth, begin = [], 0, start + 1
    for i in range(start + 1, end):
        depth += {"[": 1, "(": 1, "]": -1, ")": -1}.get(call[i], 0)
        if call[i] == "," and depth == 0:
            parts.append(call[begin:i].strip())
            begin = i + 1
    parts.append(call[begin:end].strip())
    return call[: start + 1] + "".join(f"\n    {p}," for p in parts) + "\n" + call[end:]
