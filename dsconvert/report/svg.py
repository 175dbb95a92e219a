"""Turn a matplotlib figure into SVG inside a page, with the page's font and its colours, light or dark."""

from __future__ import annotations

import io
import re
import warnings
from contextlib import AbstractContextManager
from typing import Any
from xml.etree import ElementTree

import matplotlib
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

# colours that matplotlib uses, and the page's colours that replace them (see style.css)
INK, MUTED, LINE = "#000001", "#000002", "#000003"
FLOAT, CONVERTED, ALARM = "#000004", "#000005", "#000006"
PEERS = ("#000007", "#000008", "#000009")
COLOURS = {
    INK: "currentColor", MUTED: "var(--muted)", LINE: "var(--line)", FLOAT: "var(--float)",
    CONVERTED: "var(--converted)", ALARM: "var(--alarm)",
    **{token: f"var(--peer{i})" for i, token in enumerate(PEERS)},
}  # fmt: skip
SVG, XLINK = "{http://www.w3.org/2000/svg}", "{http://www.w3.org/1999/xlink}"
GEOMETRY = frozenset({"d", "x", "y", "width", "height", "points", "transform"})
REFERENCE = re.compile(r"#[\w-]+")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # keeps text as text
    "svg.hashsalt": "dsconvert",
    "text.parse_math": False,  # keeps a dollar sign in a name as it is
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 11,
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.facecolor": "none",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.formatter.use_mathtext": False,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": LINE,
    "grid.linewidth": 0.8,
    "figure.facecolor": "none",
    "patch.linewidth": 0,
}


def new_figure(width: float, height: float) -> Figure:
    """Return a figure of so many CSS pixels; one unit of its SVG, and of font sizes, is one pixel."""
    pad = 2 / 72
    figure = Figure(figsize=(width / 72, height / 72), layout=ConstrainedLayoutEngine(w_pad=pad, h_pad=pad))
    FigureCanvasSVG(figure)
    return figure


def to_svg(figure: Figure, name: str, alt: str) -> str:
    """Return inline SVG. Equal figures give equal text. Call it inside `styled`, as for drawing.

    name: unique on the page; it begins all ids.
    alt: the accessible name.
    """
    stream = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the page's fonts draw the text, not matplotlib's
        figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    root = ElementTree.fromstring(stream.getvalue())
    _tidy(root)
    used = {r for e in root.iter() for v in e.attrib.values() if "#" in v for r in REFERENCE.findall(v)}
    for element in root.iter():
        element.tag = element.tag.removeprefix(SVG)
        for key, value in list(element.attrib.items()):
            del element.attrib[key]
            if key == "id" and f"#{value}" not in used:
                continue
            element.set(key.removeprefix(XLINK), _in_page(key, value, name))
    width, height = (float(v) for v in root.attrib["viewBox"].split()[2:])
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.set("class", "plot")
    root.set("style", f"--w:{width:g}px;aspect-ratio:{width:g}/{height:g}")
    root.set("role", "img")
    root.set("aria-label", alt)
    return ElementTree.tostring(root, encoding="unicode")


def _tidy(parent: ElementTree.Element) -> None:
    """Remove metadata, styles for a whole document, blank text, and groups without attributes."""
    children: list[ElementTree.Element] = []
    for child in list(parent):
        _tidy(child)
        plain_group = child.tag == f"{SVG}g" and not set(child.attrib) - {"id"}
        children += list(child) if plain_group else [child]
        child.tail = None
    parent[:] = [c for c in children if c.tag not in (f"{SVG}metadata", f"{SVG}style")]
    if parent.tag != f"{SVG}text":
        parent.text = None


def _in_page(key: str, value: str, name: str) -> str:
    """Return an attribute's value for the page: ids begin with the figure's name, colours and fonts are the page's."""
    if key == "id":
        return f"{name}-{value}"
    if key in ("href", f"{XLINK}href", "clip-path"):
        return value.replace("#", f"#{name}-")
    if key in GEOMETRY:
        return re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), value)
    if key == "style":
        value = re.sub(r"font-family:[^;]*;?|(?<=:) | (?=font)", "", value.replace("; ", ";"))
        return REFERENCE.sub(lambda m: COLOURS.get(m[0].lower(), m[0]), value)
    return value


def styled() -> AbstractContextManager[None]:
    """Return the context for drawing and saving figures."""
    return matplotlib.rc_context(STYLE)
