"""A quantize that is stopped and goes on: the same bytes as one that was never stopped."""

from __future__ import annotations

import pytest
import torch
from formats import free

from dsconvert.base.errors import InputError
from dsconvert.base.sealed import run_key
from dsconvert.convert.options import QuantizeOptions
from dsconvert.convert.quantize import quantize
from dsconvert.convert.resume import read_unfinished, usable, write_unfinished
from dsconvert.fit.layer import GPTQ
from dsconvert.model.file import model_bytes
from dsconvert.yolo.checkpoint import load_checkpoint


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def run(folder, stop_after=None, resume=False, by=GPTQ, **options):
    """The model's bytes; with `stop_after`, the run is ended when so many nodes were done."""

    def progress(stage, done, total):
        if stage == "fit" and done == stop_after:
            raise Killed

    wanted = QuantizeOptions(calib=folder / "images", imgsz=64, **options)
    kept = folder / "unfinished.safetensors"
    return model_bytes(quantize(load_checkpoint(folder / "best.pt"), wanted, "", progress, kept, resume, by=by).model)


def test_the_same_bytes_wherever_it_stopped(folder):
    whole = run(folder)
    for stop_after in (2, 9, 20):
        with pytest.raises(Killed):
            run(folder, stop_after)
        fits: list[str] = []

        class Noting(GPTQ):
            def layer(self, node, *given, fits=fits):
                fits.append(node.name)
                return super().layer(node, *given)

        assert run(folder, resume=True, by=Noting) == whole
        assert fits
        assert "model.0.conv" not in fits  # what was fitted is not fitted again


def test_codes_along_a_trellis_are_kept_too(folder):
    whole = run(folder, bits=2)
    assert b".code" in whole
    with pytest.raises(Killed):
        run(folder, 9, bits=2)
    assert run(folder, resume=True, bits=2) == whole


def test_real_shifts_are_kept_too(folder):
    options = {"activations": "float", "kds": "float"}
    whole = run(folder, **options)
    with pytest.raises(Killed):
        run(folder, 9, **options)
    assert run(folder, resume=True, **options) == whole


@pytest.mark.usefixtures("small")
def test_a_run_with_other_options_or_images_is_refused(folder):
    with pytest.raises(Killed):
        run(folder, 7)
    for other in ({"bits": 4}, {"seed": 1}):
        with pytest.raises(InputError, match="start again without resuming"):
            run(folder, resume=True, **other)
    (folder / "images" / "0.png").unlink()
    with pytest.raises(InputError, match="start again without resuming"):
        run(folder, resume=True)
    (folder / "unfinished.safetensors").write_bytes(b"12345678")
    with pytest.raises(InputError, match="damaged"):
        run(folder, resume=True)
    (folder / "unfinished.safetensors").unlink()
    with pytest.raises(InputError, match="nothing to resume"):
        run(folder, resume=True)


def test_layers_come_back_as_they_were_and_only_up_to_another_width(converted, tmp_path):
    path = tmp_path / "kept.safetensors"
    write_unfinished(path, "key", converted.convs)
    back = read_unfinished(path, "key", {n: c.weight.vqk.shape for n, c in converted.convs.items()})
    for name, conv in converted.convs.items():
        got = back[name]
        assert torch.equal(got.weight.merged(), conv.weight.merged())
        assert torch.equal(got.weight.cds_w, conv.weight.cds_w)
        assert torch.equal(got.bias, conv.bias)
    wanted = [(n, free(c.weight.bits, c.weight.block_size)) for n, c in converted.convs.items()]
    assert list(usable(back, wanted)) == [n for n, _ in wanted]
    changed = [*wanted[:3], (wanted[3][0], free(2, 8)), *wanted[4:]]
    assert list(usable(back, changed)) == [n for n, _ in wanted[:3]]


def test_the_key_tells_runs_apart():
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    first = run_key({"bits": 4}, "sha", images)
    assert first == run_key({"bits": 4}, "sha", images.clone())
    assert len({first, run_key({"bits": 5}, "sha", images), run_key({"bits": 4}, "sha", images + 1)}) == 3
