"""examples/browser in headless Chromium: a packed file in onnxruntime-web finds what dsconvert finds.

Needs Debian's chromium and chromium-driver, and `npm install` in examples/browser; skips, saying so, without them."""

from __future__ import annotations

import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import onnx
import pytest
from conftest import DEMO, HANGS, ROOT
from headless import chromium_browser, needs_chromium

import dsconvert
from dsconvert.photos.images import read_image
from dsconvert.scoring.compare import match

EXAMPLE = ROOT / "examples/browser"
pytestmark = [
    pytest.mark.long,
    needs_chromium,
    pytest.mark.skipif(
        not (EXAMPLE / "node_modules/onnxruntime-web").is_dir(),
        reason="onnxruntime-web is not installed: npm install in examples/browser",
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """Nothing on the terminal."""


@pytest.fixture(scope="module")
def chromium():
    """The example, served on this machine, in Chromium."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(EXAMPLE)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with chromium_browser() as browser:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        yield browser
    server.shutdown()


@pytest.fixture
def page(chromium):
    """The page as one first sees it: choosing the file that is chosen already would be no change."""
    chromium.refresh()
    return chromium


@pytest.fixture(scope="module")
def packed(tmp_path_factory) -> Path:
    """The demo model at 4 bits, packed; one class has a name that is awkward in Python and in HTML."""
    folder = tmp_path_factory.mktemp("browser")
    calib = sorted((DEMO / "images/calib").iterdir())[0]
    made = dsconvert.quantize(DEMO / "demo.pt", calib, imgsz=320, bits=4).export(folder / "demo.onnx")
    model = onnx.load(made)
    names = {p.key: p.value for p in model.metadata_props}
    names["names"] = names["names"].replace("'ball'", '"<b>it\'s</b>"')
    onnx.helper.set_model_props(model, names)
    onnx.save(model, folder / "named.onnx")
    return folder / "named.onnx"


def choose(browser, **files: Path) -> str:
    """Choose files as a person would; returns what the page then says."""
    from selenium.webdriver.support.ui import WebDriverWait

    said = browser.find_element("id", "status")
    for name, path in files.items():
        browser.execute_script("arguments[0].textContent = ''", said)
        browser.find_element("id", name).send_keys(str(path))
        WebDriverWait(browser, HANGS).until(lambda _: said.text and not said.text.endswith("..."))
    return said.text


def rows(browser) -> list[list[str]]:
    script = "return [...document.querySelectorAll('#found tbody tr')].map(r => [...r.cells].map(c => c.textContent))"
    return browser.execute_script(script)


def check_same(browser, wanted) -> None:
    """The same objects in the same order, but for the last digit that the page shows."""
    found = rows(browser)
    assert [r[0] for r in found] == [o.name for o in wanted]
    numbers = np.array([[o.score, o.x1, o.y1, o.x2, o.y2] for o in wanted])
    np.testing.assert_allclose(np.array([r[1:] for r in found], float), numbers, atol=0.006)


@pytest.mark.parametrize("rows_of_pixels", [slice(None), slice(40, 280)], ids=["square", "wide, so padded"])
def test_the_page_finds_what_dsconvert_finds(page, packed, tmp_path, rows_of_pixels):
    """Pictures as wide as the model's input, so that nothing is scaled: the same numbers."""
    picture = tmp_path / "0.png"  # not JPEG: browsers decode those a little differently
    scene = read_image(DEMO / "images/val/0000.jpg")[rows_of_pixels]
    cv2.imwrite(str(picture), scene[..., ::-1])
    assert any(t.data_type == onnx.TensorProto.INT4 for t in onnx.load(packed).graph.initializer)
    assert choose(page, model=packed) == "Choose a picture."
    said = choose(page, picture=picture)
    wanted = dsconvert.detect(packed, picture)[0].objects
    assert len(wanted) > 2
    assert said.startswith(f"Found {len(wanted)} objects in ")
    check_same(page, wanted)
    drawn = page.execute_script("const c = document.getElementById('canvas'); return [c.width, c.height]")
    assert drawn == [320, len(scene)]
    assert [entry for entry in page.get_log("browser") if entry["level"] == "SEVERE"] == []


def test_a_larger_picture_is_scaled(page, packed, tmp_path):
    """The browser scales pictures in its own way, so boxes move: the same objects, by compare's measure."""
    picture = tmp_path / "large.png"
    scene = read_image(DEMO / "images/val/0000.jpg")[40:280]
    cv2.imwrite(str(picture), cv2.resize(scene, (480, 360))[..., ::-1])
    choose(page, model=packed, picture=picture)
    (photo,) = dsconvert.detect(packed, picture, conf_thres=0.5)
    found = [[*map(float, r[2:]), float(r[1]), photo.names.index(r[0])] for r in rows(page)]
    assert len(photo.objects) > 2
    assert len(match(photo.boxes, np.array(found, np.float32)).iou) == len(photo.objects)


def test_what_is_no_model_is_said(page, tmp_path):
    (tmp_path / "x.onnx").write_bytes(b"not a model")
    assert choose(page, model=tmp_path / "x.onnx").startswith("That did not work: ")
