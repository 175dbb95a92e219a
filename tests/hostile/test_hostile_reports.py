"""Reports on files whose names and records nobody should trust."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from report_case import make_case
from watched import dsconvert


@pytest.fixture(scope="module")
def case(tmp_path_factory) -> Path:
    return make_case(tmp_path_factory.mktemp("report"))


def report(folder: Path, model: Path) -> tuple[int, str]:
    code, _, err = dsconvert(folder, "report", str(model), "--data", "data.yaml", "--out", "page", "--force")
    return code, err


def test_a_name_that_is_no_text_is_no_fault(case):
    """XML, which the charts are made of, has no such characters."""
    folder = case.parents[1]
    named = case.with_name("m\uffffa\ufffeb\U0001ffffc\x0bd\u2028e\ue000.safetensors")
    shutil.copy(case, named)
    code, err = report(folder, named)
    assert code == 0, err


def records(good: dict) -> dict[str, str]:
    """Text by what is wrong with it, of records that belong to the model."""
    layers, looks = good["layers"], good["finetune"]["curve"]

    def with_error(value: object) -> str:
        return json.dumps({**good, "layers": [{**layers[0], "sqnr_db": value}, *layers[1:]]})

    def with_look(**values: object) -> str:
        return json.dumps({**good, "finetune": {"curve": [{**looks[0], **values}, *looks[1:]]}})

    return {
        "deep lists": "[" * 100_000, "deep mappings": '{"a":' * 100_000, "an error of 10^400": with_error(10**400),
        "a step of 10^400": with_look(step=10**400), "a look of 10^400": with_look(held_back=10**400),
        "a curve of a number": json.dumps({**good, "finetune": {"curve": 5}}),
        "a fine-tune of a list": json.dumps({**good, "finetune": [1]}),
        "17 MB": " " * (17 << 20) + json.dumps(good), "a list": "[]", "nothing": "", "no text": "\x00",
        "an error of text": with_error("much"), "an error of a list": with_error([1]), "5000 digits": "1" * 5000,
        "layers of a number": json.dumps({**good, "layers": 5}),
    }  # fmt: skip


def test_a_record_that_cannot_be_read_is_refused(case):
    folder, place = case.parents[1], case.with_name("quantize.json")
    good = place.read_text()
    try:
        for what, text in records(json.loads(good)).items():
            place.write_text(text)
            code, err = report(folder, case)
            assert code == 2, what
            assert err.count("\n") == 1, what
            assert "is not a readable record of dsconvert quantize; remove it." in err, what
    finally:
        place.write_text(good)


@pytest.mark.long
def test_numbers_beyond_any_fit_are_not_shown(case):
    folder, place = case.parents[1], case.with_name("quantize.json")
    good = json.loads(place.read_text())
    layers, looks = good["layers"], good["finetune"]["curve"]
    try:
        for value in (1e308, -1e308, 1e39, 1e-320):
            noted = {
                **good, "layers": [{**layers[0], "sqnr_db": value}, *layers[1:]],
                "finetune": {"curve": [{"step": value, "held_back": 1.0}, {"step": 1, "held_back": value}, *looks]},
            }  # fmt: skip
            place.write_text(json.dumps(noted))
            code, err = report(folder, case)
            assert code == 0, err
            page = next((folder / "page").glob("*.html")) if (folder / "page").is_dir() else folder / "page"
            assert "e+3" not in page.read_text()
    finally:
        place.write_text(json.dumps(good))
