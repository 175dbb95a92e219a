"""The report in headless Chromium: no console error, everything clickable works, readable light, dark and on a phone.

Needs Debian's chromium and chromium-driver; skips, saying so, where they are not installed."""

from __future__ import annotations

from itertools import product

import pytest
from headless import chromium_browser, needs_chromium
from report_case import HOSTILE, make_case

from dsconvert.report.gather import ReportOptions, gather
from dsconvert.report.page import page_bytes

pytestmark = [pytest.mark.long, needs_chromium]


@pytest.fixture(scope="module")
def chromium():
    with chromium_browser() as made:
        yield made


@pytest.fixture
def browser(chromium):
    chromium.get("about:blank")
    chromium.get_log("browser")  # what an earlier test left
    return chromium


@pytest.fixture(scope="module")
def url(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("report")
    page = page_bytes(gather(ReportOptions(make_case(folder), folder / "data.yaml", folder / "best.pt", latency=False)))
    (folder / "report.html").write_bytes(page)
    return (folder / "report.html").as_uri()


def emulate(browser, width: int, scheme: str, media: str = "") -> None:
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},  # what is clicked must not be gliding along
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": media, "features": features})


# [colour, background, text] of every element that shows text of its own, as the browser computes them
TEXTS = """
const shown = e => [...e.childNodes].some(n => n.nodeType == 3 && n.textContent.trim()) && e.getClientRects().length;
const behind = e => { for (; e; e = e.parentElement) {
  const c = getComputedStyle(e).backgroundColor; if (!c.endsWith(', 0)')) return c; } return 'rgb(255, 255, 255)'; };
return [...document.body.querySelectorAll('*')].filter(e => !e.closest('script, .box, .skip') && shown(e))
  .map(e => [getComputedStyle(e)[e.closest('svg') ? 'fill' : 'color'], behind(e), e.textContent.trim()]);
"""


def contrast(one: str, two: str) -> float:
    """WCAG's contrast ratio of two colours as rgb(r, g, b)."""

    def luminance(colour: str) -> float:
        parts = [float(v) / 255 for v in colour[colour.index("(") + 1 : -1].split(",")[:3]]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_report_in_a_browser(browser, url):
    from selenium.webdriver.common.keys import Keys

    def find(css):
        return browser.find_elements("css selector", css)

    def click(element):
        browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", element)
        element.click()

    emulate(browser, 1280, "light")
    browser.get(url)
    assert browser.title.endswith("dsconvert report")

    # every link of the navigation leads to its section
    for link in find("nav a"):
        link.click()  # where it is: always in view
        target = link.get_attribute("href").split("#")[1]
        assert browser.execute_script("return document.querySelector(':target').id") == target

    # tables sort both ways, by number and by name
    for details in find("details:not([open]) > summary"):
        click(details)
    table = find("table.layers")[0]

    def column(index):
        rows = "return [...arguments[0].tBodies[0].rows].map(r => r.cells[arguments[1]].textContent.trim())"
        return browser.execute_script(rows, table, index)

    heads = table.find_elements("css selector", "thead th")
    errors = next(i for i, h in enumerate(heads) if "weights" in h.text)
    before = column(errors)
    button = heads[errors].find_element("css selector", "button")
    click(button)
    assert heads[errors].get_attribute("aria-sort") == "ascending"
    assert column(errors) == sorted(before, key=float)
    button.send_keys(Keys.ENTER)  # by keyboard too
    assert heads[errors].get_attribute("aria-sort") == "descending"
    assert column(errors) == sorted(before, key=float, reverse=True)
    click(heads[0].find_element("css selector", "button"))  # the layers' names sort in the order of the network
    assert column(errors) == before
    assert heads[errors].get_attribute("aria-sort") == "none"
    for other in find("thead button"):
        click(other)

    # printing opens what is folded, and folds it again
    click(find("#layers summary")[0])
    for event, wanted in (("beforeprint", []), ("afterprint", ["layers"])):
        browser.execute_script("dispatchEvent(new Event(arguments[0]))", event)
        closed = "return [...document.querySelectorAll('details:not([open])')].map(d => d.closest('section').id)"
        assert browser.execute_script(closed) == wanted

    # the photos' button hides the boxes both models have, and brings them back
    toggle = find("button.toggle")[0]
    common = browser.execute_script("return document.querySelectorAll('.box:not(.alone)').length")
    visible = "return [...document.querySelectorAll('.box')].filter(b => b.getBoundingClientRect().width).length"
    everything = browser.execute_script(visible)
    assert common
    click(toggle)
    assert toggle.get_attribute("aria-pressed") == "true"
    assert browser.execute_script(visible) == everything - common
    click(toggle)
    assert browser.execute_script(visible) == everything

    # photos are really drawn, on both sides; names are text
    assert browser.execute_script("return [...document.images].length") == 0  # all in SVG
    for side in find(".pair svg"):
        assert side.size["height"] > 50
    assert HOSTILE[0] in find("#classes table")[0].text

    # the keyboard gets everywhere, and one sees where it is
    browser.get(url)
    seen = set()
    for _ in range(12):
        browser.switch_to.active_element.send_keys(Keys.TAB)
        seen.add(browser.execute_script("return document.activeElement.tagName"))
        assert browser.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert {"A", "BUTTON"} <= seen

    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_text_can_be_read_and_fits_a_phone(browser, url):
    light = "rgb(255, 255, 255)"
    for width, scheme in product((1280, 360), ("light", "dark")):
        emulate(browser, width, scheme)
        browser.get(url)
        browser.execute_script("for (const d of document.querySelectorAll('details')) d.open = true")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
        texts = browser.execute_script(TEXTS)
        assert len(texts) > 100
        faint = [(text, round(contrast(a, b), 2)) for a, b, text in texts if contrast(a, b) < 4.5]
        assert faint == []
        small = browser.execute_script(
            "return [...document.querySelectorAll('svg.plot text')].filter(t => t.getBoundingClientRect().width && "
            "parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().a + "
            "Math.abs(parseFloat(getComputedStyle(t).fontSize) * t.getScreenCTM().b) < 9).map(t => t.textContent)"
        )
        assert small == []
        background = browser.execute_script("return getComputedStyle(document.body).backgroundColor")
        assert (background == light) == (scheme == "light")
    emulate(browser, 720, "dark", "print")  # paper is white, whatever the screen
    assert browser.execute_script("return getComputedStyle(document.body).backgroundColor") == light
    assert browser.execute_script("return getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_policy_is_in_force(browser, url):
    """Were a script to slip in, it would not run; and nothing could be fetched."""
    browser.get(url)
    browser.execute_script(
        "window.ran = false; const s = document.createElement('script'); s.textContent = 'window.ran = true';"
        "document.body.append(s); const i = new Image(); i.src = 'https://example.invalid/a.png';"
        "document.body.append(i)"
    )
    assert browser.execute_script("return window.ran") is False
    refused = [entry["message"] for entry in browser.get_log("browser")]
    assert any("script" in message for message in refused)
    assert any("example.invalid" in message and "Content Security Policy" in message for message in refused)
