"""--input and the options that stand in the place of what it says."""

from __future__ import annotations

import re

import pytest
from conftest import DEMO

from dsconvert.base.errors import InputError
from dsconvert.commands.inputs import INPUT_OPTIONS, chosen_input
from dsconvert.onnxfile.presets import Preset, presets
from dsconvert.photos.form import InputForm


def chosen(**said: object) -> Preset | None:
    return chosen_input({**dict.fromkeys(INPUT_OPTIONS), **said})


def test_what_is_said_stands_in_the_place_of_the_presets():
    assert chosen() is None
    assert chosen(input="yolox") == presets()["yolox"]
    yolox = chosen(input="yolox", bgr=False, pad=0, scale="255")
    assert yolox == Preset(InputForm(fit="corner", pad=0), "yolox")
    assert chosen(scale="1").form == InputForm(scale=1)
    assert chosen(bgr=False).form == InputForm()
    assert chosen(input="picodet", mean=(0.5,)).form == InputForm((0.5,), (0.229, 0.224, 0.225), fit="stretch")


def test_means_alone_are_a_classifiers():
    assert chosen(mean=(0.5,)).form == InputForm((0.5,), fit="crop")
    assert chosen(std=(0.5,), fit="letterbox").form == InputForm(std=(0.5,))
    assert chosen(std=(0.5,), input="yolov5").form == InputForm(std=(0.5,))


@pytest.mark.parametrize("mean", [(0.1, 0.2), ()])
def test_what_means_nothing_is_one_sentence(mean):
    with pytest.raises(InputError, match="three numbers"):
        chosen(mean=mean)


WRONG = {
    (
        "--input",
        "nothing",
    ): r"--input 'nothing' is neither one of yolov5, .*, imagenet nor a YAML file such as my\.yaml:name",
    ("--input", "my.yaml:a"): r"no file at my\.yaml, which --input names",
    ("--scale", "2"): "Invalid value for '--scale'",
    ("--fit", "middle"): "Invalid value for '--fit'",
    ("--pad", "300"): "Invalid value for '--pad'",
    ("--mean", "1,2"): "--mean and --std must be one or three numbers",
}


@pytest.mark.parametrize("options", WRONG)
def test_wrong_options_end_with_exit_code_2(options, call, tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"\x08\x09")
    done = call("quantize", "net.onnx", "--calib", DEMO / "data.yaml", *options, cwd=tmp_path)
    assert done.code == 2
    assert re.search(WRONG[options], done.err), done.err
    assert "Traceback" not in done.err


@pytest.mark.parametrize("options", [("--input", "yolox"), ("--rgb",), ("--scale", "1"), ("--pad", "0")])
def test_a_checkpoint_has_an_input_of_its_own(options, call, tmp_path):
    done = call("quantize", DEMO / "demo.pt", *options, cwd=tmp_path)
    assert done.code == 2
    assert f"{options[0].replace('rgb', 'bgr')} is for an ONNX file" in done.err
