"""Turn gathered figures into the page: draw charts, write sentences, and fill one template."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from dsconvert.report import plots
from dsconvert.report.gather import Report, Row
from dsconvert.report.layers import ActivationView, Layer, WeightView
from dsconvert.report.photos import SAME_IOU, Box, Photo
from dsconvert.report.placing import Spot, place
from dsconvert.report.svg import COLOURS
from dsconvert.report.text import plain
from dsconvert.scoring.accuracy import CONFIDENT, OVERLAP
from dsconvert.scoring.contest import nothing_found
from dsconvert.scoring.curves import ClassCurve, mean_curve

PR_CLASSES = 12  # most classes with a chart of their own; the classes that lose most are taken
FACTS = {
    "command": "Command", "dsconvert": "Version", "source": "Checkpoint", "source_sha256": "Its SHA-256",
    "calib": "Calibrated on", "samples": "Most images", "imgsz": "Image size, pixels", "bits": "Bits",
    "target_bytes": "Largest file, bytes", "block_size": "Block size", "blocks": "Blocks", "scope": "Scope",
    "activations": "Activations", "seed": "Seed", "device": "Device",
}  # fmt: skip
FEW_IMAGES = 500  # with fewer images, differences of a point are noise


def page_bytes(report: Report) -> bytes:
    """Return the HTML page, one file that loads nothing. Equal figures give equal bytes."""
    style, script = (_resource(f) for f in ("style.css", "script.js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    template = _environment().from_string(_resource("page.html"))
    html = template.render(
        style=Markup(style), script=Markup(script), script_hash=digest, r=report, **_context(report)
    )  # fmt: skip
    return html.encode()


def _resource(name: str) -> str:
    return (files("dsconvert.report") / "templates" / name).read_text(encoding="utf-8")


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        plain=plain,
        mb=lambda n: f"{n / 1e6:.2f}",
        points=lambda d: f"{100 * d:+.2f}".replace("-", "\N{MINUS SIGN}"),
        shape=lambda s: "×".join(map(str, s)),
    )
    return environment


def _context(r: Report) -> dict[str, Any]:
    """Return what the template shows besides the report itself."""
    colours = _colours(r.rows)
    models = [{"row": row, "colour": COLOURS[c]} for row, c in zip(r.rows, colours, strict=True)]
    return {
        "title": f"{r.rows[0].label}, converted to DSConv",
        "models": models,
        "what": "mAP50-95" if r.labelled else "agreement (mAP50-95)",
        "few": len(r.differing) < FEW_IMAGES,
        "measured": _measured(r),
        "gap": _accuracy(r.rows[1]) - _accuracy(r.rows[0]),
        "nothing": nothing_found("The float model"),
        "same_images": sum(n == 0 for n in r.differing),
        "shifted": r.scores.warning("float", "DSConv"),
        "bars": _bars(r, colours),
        "photos": [_photo(r, p) for p in r.photos],
        "confident": CONFIDENT,
        "overlap": OVERLAP,
        "same_iou": SAME_IOU,
        "classes": _classes(r),
        "pr": _pr(r, colours),
        "layer_chart": Markup(plots.layer_chart(r.layers, "layers", _layers_alt(r.layers))),
        "harmful": any(row.damage is not None for row in r.layers),
        "worst": max((row.damage or 0.0) for row in r.layers) or 1.0,
        "activations_float": all(row.activation_db is None for row in r.layers),
        "weights": [_weights(v, i) for i, v in enumerate(r.weights)],
        "activation_charts": [_activations(v, i) for i, v in enumerate(r.activations)],
        "facts": _facts(r.provenance),
        "finetune": Markup(plots.finetune_chart(r.finetune, "finetune", _finetune_alt(r.finetune)))
        if r.finetune
        else None,
    }


def _facts(provenance: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what the model file says about its origin, as names and texts; paths lose their folders, except in the
    command.
    """
    options = provenance.get("options")
    known = {**(options if isinstance(options, Mapping) else {}), **provenance}
    facts = [(FACTS.get(k, k), k, v) for k, v in known.items() if k in FACTS and v is not None]
    facts.sort(key=lambda fact: list(FACTS).index(fact[1]))
    return [(label, plain(_fact(k, v), 2000)) for label, k, v in facts]


def _fact(key: str, value: object) -> object:
    """Return a value as it is shown: only the name of a file, and a size that is not square as 384x640."""
    if key == "imgsz" and isinstance(value, (list, tuple)):
        return "x".join(map(str, value))
    return Path(str(value)).name if key in ("source", "calib") else value


def _colours(rows: Sequence[Row]) -> list[str]:
    return [plots.colour_of(row.role, index - 2) for index, row in enumerate(rows)]


def _bars(r: Report, colours: Sequence[str]) -> list[dict[str, Any]]:
    """Return charts of size, accuracy and latency.

    Without labels the float model is the reference and has no accuracy.
    """
    rows = list(zip(r.rows, colours, strict=True))
    judged = rows if r.labelled else rows[1:]
    found = [
        ("File, MB", rows, [row.size_bytes / 1e6 for row, _ in rows], "{:.2f}"),
        ("mAP50-95" if r.labelled else "Agreement with float, mAP50-95", judged,
         [_accuracy(row) for row, _ in judged], "{:.3f}"),
    ][: 1 + _measured(r)]  # fmt: skip
    if all(row.latency for row in r.rows):
        times = [row.latency.median_ms for row, _ in rows if row.latency]
        found.append(("Latency, ms", rows, times, "{:.1f}"))
    charts = []
    for index, (heading, shown, values, form) in enumerate(found):
        texts, labels = [form.format(v) for v in values], [row.label for row, _ in shown]
        alt = f"Bars, {heading}: " + ", ".join(f"{plain(n)} {t}" for n, t in zip(labels, texts, strict=True)) + "."
        svg = plots.bars(labels, values, [c for _, c in shown], texts, f"bars{index}", alt)
        charts.append({"heading": heading, "svg": Markup(svg)})
    return charts


def _measured(r: Report) -> bool:
    """Return whether there is an accuracy to show."""
    return r.rows[0].metrics is not None


def _accuracy(row: Row) -> float:
    return row.metrics.map50_95 if row.metrics else 0.0


def _photo(r: Report, photo: Photo) -> dict[str, Any]:
    """Return both sides of a photo, float and converted; boxes that differ are drawn last."""
    size = round(0.034 * photo.width, 1)
    sides = []
    for who, word, boxes in (("Float", "missing in DSConv", photo.first), ("DSConv", "new in DSConv", photo.second)):
        ordered = sorted(boxes, key=lambda b: not b.alone)
        texts = [f"{_class(r, b)} {b.score:.2f}" for b in ordered]
        spots = place([Spot(b.x, b.y, b.width, b.height) for b in ordered], texts, size, photo.width, photo.height)
        drawn = [
            {"box": b, "text": t, "x": round(s.x + 0.15 * size, 1), "y": round(s.y + 0.95 * size, 1)}
            for b, t, s in zip(ordered, texts, spots, strict=True)
        ]
        listed = ", ".join(f"{t} ({word})" if b.alone else t for b, t in zip(ordered, texts, strict=True)) or "none"
        different = [t for b, t in zip(ordered, texts, strict=True) if b.alone]
        sides.append({
            "who": who, "word": word, "drawn": drawn[::-1], "different": different,
            "alt": f"{plain(photo.name)}, boxes of {who}: {listed}.",
        })  # fmt: skip
    return {"photo": photo, "size": size, "sides": sides}


def _class(r: Report, box: Box) -> str:
    return plain(r.names[box.kind] if box.kind < len(r.names) else box.kind, 24)


def _classes(r: Report) -> list[dict[str, Any]]:
    """Return a row for each class that has objects: AP of every model, and what the converted one loses."""
    first, second = r.rows[0].curves, r.rows[1].curves
    rows = [
        {
            "kind": kind,
            "name": plain(r.names[kind] if kind < len(r.names) else kind),
            "objects": r.objects.get(kind, 0),
            "ap": [row.curves[kind].ap50_95 if kind in row.curves else 0.0 for row in r.rows],
            "ap50": second[kind].ap50,
            "change": second[kind].ap50_95 - first[kind].ap50_95,
        }
        for kind in sorted(second)
    ]
    return sorted(rows, key=lambda row: (row["change"] if r.labelled else row["ap"][1], row["kind"]))


def _pr(r: Report, colours: Sequence[str]) -> list[dict[str, Any]]:
    """Return charts of precision against recall: the mean, then the classes that lose most."""
    if not _measured(r):
        return []
    judged = list(zip(r.rows, colours, strict=True))[0 if r.labelled else 1 :]
    charts: list[tuple[str, list[ClassCurve | None]]] = [
        ("All classes, mean", [mean_curve(dict(row.curves)) for row, _ in judged])
    ]
    for row in _classes(r)[:PR_CLASSES]:
        charts.append((row["name"], [m.curves.get(row["kind"]) for m, _ in judged]))
    return [
        {
            "name": name,
            "ap50": [0.0 if c is None else c.ap50 for c in curves],
            "svg": Markup(
                plots.pr_chart(
                    [(colour, c) for (_, colour), c in zip(judged, curves, strict=True)],
                    f"pr{index}", _pr_alt(name, [m.label for m, _ in judged], curves),
                )
            ),
        }
        for index, (name, curves) in enumerate(charts)
    ]  # fmt: skip


def _pr_alt(name: str, labels: Sequence[str], curves: Sequence[ClassCurve | None]) -> str:
    each = ", ".join(f"{plain(n)} {c.ap50:.3f}" for n, c in zip(labels, curves, strict=True) if c)
    return f"Precision against recall at IoU 0.50, {name}. Area under the curve (AP50): {each}."


def _layers_alt(layers: Sequence[Layer]) -> str:
    worst = min(layers, key=lambda row: row.weight_db)
    bits = sorted({row.bits for row in layers})
    return (
        f"Chart of {len(layers)} layers: {bits[0]} to {bits[-1]} bits; weights' signal to noise is lowest in "
        f"{plain(worst.name)}, {worst.weight_db:.1f} dB. The table below has every figure."
    )


def _weights(view: WeightView, index: int) -> dict[str, Any]:
    alt = (
        f"Histogram of the weights of {plain(view.name)} over its grid of {view.high - view.low + 1} levels; "
        f"{100 * view.outside:.2g} % lie beyond the grid."
    )
    return {"view": view, "svg": Markup(plots.weight_chart(view, f"weights{index}", alt)), "name": plain(view.name)}


def _activations(view: ActivationView, index: int) -> dict[str, Any]:
    alt = (
        f"Histogram of the values that {plain(view.name)} passes on, over its grid from {view.low:.3g} to "
        f"{view.high:.3g}; {100 * view.outside:.2g} % lie beyond the grid."
    )
    svg = Markup(plots.activation_chart(view, f"activations{index}", alt))
    return {"view": view, "svg": svg, "name": plain(view.name)}


def _finetune_alt(looks: Sequence[tuple[float, float]]) -> str:
    (_, first), (step, last) = looks[0], looks[-1]
    return f"Error on held-back images: {first:.4g} before the brief fine-tune, {last:.4g} after {step:g} steps."
