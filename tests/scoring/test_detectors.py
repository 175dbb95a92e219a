"""Trained detectors of five families find what is labelled; they are beside the project, and skipped without."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import ROOT

from dsconvert.base.errors import InputError
from dsconvert.onnxfile.presets import presets
from dsconvert.photos.dataset import images_of
from dsconvert.photos.images import spread
from dsconvert.scoring.accuracy import detect_all, evaluate_predictors
from dsconvert.scoring.candidates import load_candidate

SHARED = ROOT.parent / "shared" / "data"
FILES, DATA = SHARED / "onnx", SHARED / "coco" / "coco.yaml"
# By file: whose input it has.
DETECTORS = {
    "yolox_nano": "yolox", "picodet_s_416_coco": "picodet", "nanodet": "nanodet", "v5Lite-e-sim-320": "v5lite",
    "FastestDet": "fastestdet",
}  # fmt: skip
SOME = 6  # images
# Below this score are thousands of boxes of each class, which take seconds to suppress, and next to no mAP.
LEAST_SCORE = 0.05
LEAST = 0.25  # mAP50: on all 64 it is 0.40 to 0.55, and a decoding that is wrong has next to none


def there(name: str) -> Path:
    path = FILES / f"{name}.onnx"
    if not path.is_file() or not DATA.is_file():
        pytest.skip(f"{path} is not here")
    return path


def photos() -> list[Path]:
    return spread(images_of(DATA, ("val",)).paths, SOME)


@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_finds_what_is_labelled(name):
    candidate = load_candidate(there(name), None, preset=presets()[DETECTORS[name]])
    assert (candidate.nc, candidate.names, len(candidate.named.names)) == (80, (), 80)
    predict, size = candidate.predict, candidate.imgsz
    (found,) = detect_all([predict], photos(), size, candidate.nc, confidence=LEAST_SCORE).metrics()
    assert found.map50 > LEAST


def test_faces_are_found(call, tmp_path):
    path = there("yolov8-lite-t")
    done = call("detect", path, photos()[0].parent, "--input", "yolov8-face", "--json", "--nosave", cwd=tmp_path)
    assert done.code == 0, done.err
    assert json.loads(done.out)["detections"] > 10


@pytest.mark.parametrize(("name", "words"), [("yolox_nano", "--input yolox"), ("v5Lite-e-sim-320", "--input v5lite"),
                                             ("FastestDet", "--input fastestdet"),
                                             ("nanodet", "--input nanodet or --input picodet")])  # fmt: skip
def test_without_its_name_a_detector_is_refused_with_the_way(name, words, call, tmp_path):
    done = call("detect", there(name), photos()[0], "--nosave", cwd=tmp_path)
    assert done.code == 2
    assert words in done.err
    assert done.err.count("\n") == 1


def test_another_familys_name_is_refused():
    candidate = load_candidate(there("FastestDet"), None, preset=presets()["picodet"])
    with pytest.raises(
        InputError, match=r"does not have a map of scores and a map of distances .* but \[1, 85, 22, 22\]"
    ):
        evaluate_predictors([candidate.predict], photos(), candidate.imgsz, 80)


def test_a_detector_without_a_name_is_compared_output_by_output(call, tmp_path):
    path = there("FastestDet")
    done = call("compare", path, path, "--data", DATA, "--samples", "2", "--json", cwd=tmp_path)
    assert done.code == 0, done.err
    (output,) = json.loads(done.out)["outputs"]
    assert (output["shape"], output["relative_error"]) == ([1, 85, 22, 22], 0)
    assert output["cosine"] == pytest.approx(1)
    named = call(
        "compare", path, path, "--data", DATA, "--samples", "2", "--input", "fastestdet", "--json", cwd=tmp_path
    )
    assert json.loads(named.out)["agreement"] == 1
