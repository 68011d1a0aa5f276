"""The page in a real browser (headless Chromium), from disk and from the server; nothing else is asked for."""

from __future__ import annotations

import json
import threading
import time

import pytest

import chromium
from moekit.report import collect, write
from moekit.report.server import TEXT_CHARACTERS, ReportServer
from synthetic import synthetic_trace

HOSTILE = "</script><script>window.pwned=1</script><img src=x onerror='window.pwned=1'>"
VIEWS = (
    "usage specialisation text cards flow coactivation similarity balance confidence super ablation against unlearning"
)
SHAPE = {"tokens": 400, "decode": True, "domains": [HOSTILE, "prose", "math"], "vocabulary": [HOSTILE, " a"]}
DRAWN = """((id) => {
  const section = document.getElementById(id);
  const all = (what) => [...section.querySelectorAll(what)];
  const drawn = (canvas) => {
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return new Set(new Uint32Array(data.buffer)).size > 1;
  };
  return {
    canvases: all("canvas").map(drawn),
    charts: all("svg.chart").map((x) => x.querySelectorAll("path, circle, rect").length),
    rows: all("tbody tr").length,
    words: all(".words span").length,
    cards: all(".card").length,
    see: all(".see")[0].textContent,
    how: all(".how")[0].textContent,
    text: section.innerText,
  };
})"""
pytestmark = pytest.mark.skipif(chromium.binary() is None, reason="no Chromium here: apt install chromium")


@pytest.fixture(scope="module")
def page():
    with chromium.browser() as tab:
        yield tab


@pytest.fixture(scope="module")
def payload(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    trace = synthetic_trace(folder / "after", model=HOSTILE, **SHAPE)
    before = synthetic_trace(folder / "before", drift=0.5, **SHAPE)
    span = [0.01, 0.0, 0.02]
    row = {"experts": "2.5", "domain": "math", "control": None, "share": 0.3, "touched": 9, "change": 0.05, "low": 0.04}
    row |= {"high": 0.06, "random": span, "matched": None, "excess": None}
    run = [{"step": i, "forget": 0.7 - i / 10, "utility": 0.6, "overlap": None if i else 1} for i in range(3)]
    return collect(
        trace,
        against=before,
        ablation={"model": HOSTILE, "fingerprint": "0" * 16, "how": HOSTILE, "rows": [row]},
        unlearning={"rows": run},
    )


@pytest.fixture(scope="module")
def opened(page, payload, tmp_path_factory):
    file, _ = write(payload, tmp_path_factory.mktemp("out") / "report.html")
    page.requests.clear()
    page.open(file.as_uri())
    wait(page, "document.documentElement.dataset.views")
    return file


def wait(page, condition, seconds=20):
    """Until a JavaScript expression is true."""
    end = time.monotonic() + seconds
    while not page.run(f"!!({condition})"):
        assert time.monotonic() < end, f"{condition} never came true; problems: {page.problems}"
        time.sleep(0.02)


def test_it_opens_from_disk_and_asks_for_nothing(page, opened):
    assert page.run("document.documentElement.dataset.views") == VIEWS
    assert page.problems == []
    assert page.requests == [opened.as_uri()]


@pytest.mark.parametrize("view", VIEWS.split())
def test_every_view_is_drawn(page, opened, view):
    facts = page.run(f"{DRAWN}({view!r})")
    wanted = {
        "usage": lambda x: len(x["canvases"]) == 5,
        "specialisation": lambda x: x["rows"] == 9 and len(x["charts"]) == 1,
        "text": lambda x: x["words"] == 40,
        "cards": lambda x: x["cards"] == 12,
        "flow": lambda x: x["charts"] and x["charts"][0] > 20,
        "coactivation": lambda x: len(x["canvases"]) == 2 and x["rows"] > 3,
        "similarity": lambda x: x["charts"] and x["charts"][0] >= 8,
        "balance": lambda x: len(x["charts"]) == 5,
        "confidence": lambda x: len(x["charts"]) == 2,
        "super": lambda x: x["rows"] == 10 and x["charts"][0] > 20,
        "ablation": lambda x: x["rows"] == 1,
        "against": lambda x: len(x["canvases"]) == 4 and x["words"] == 40 and len(x["charts"]) == 1,
        "unlearning": lambda x: x["rows"] == 3 and len(x["charts"]) == 1,
    }[view]
    assert wanted(facts), facts
    assert all(facts["canvases"]), "an empty heat map"
    assert all(facts["charts"]), "an empty chart"
    assert len(facts["see"]) > 30
    assert len(facts["how"]) > 15
    assert "undefined" not in facts["text"]
    assert "[object" not in facts["text"]
    assert "NaN" not in facts["text"]


def test_names_and_tokens_are_shown_and_never_run(page, opened):
    assert page.run("window.pwned") is None
    assert page.run("document.querySelectorAll('img').length") == 0
    assert page.run("document.querySelector('h1').textContent") == f"What the experts of {HOSTILE} do"
    assert HOSTILE in page.run("document.querySelector('#usage').textContent")
    assert HOSTILE in page.run("document.querySelector('#text .words').textContent")
    assert page.run("document.title").startswith("What the experts of </script>")


def test_the_layer_slider_works_by_keys(page, opened):
    colours = "[...document.querySelectorAll('#text .words span')].map((x) => x.style.background).join()"
    page.run("document.querySelector('#text input[type=range]').focus()")
    first = page.run(colours)
    page.press("ArrowRight", 2)
    assert page.run("document.querySelector('#text output').textContent") == "3"
    assert page.run(colours) != first
    panel = page.run("document.querySelector('#text .panel').textContent")
    assert "3." in panel
    assert "Margin" in panel
    page.press("ArrowLeft", 2)
    assert page.run(colours) == first


def test_tokens_and_cells_are_read_by_keys(page, opened, payload):
    page.run("document.querySelector('#text .words').focus()")
    page.press("ArrowRight", 3)
    assert (
        page.run("[...document.querySelectorAll('#text .words span')].findIndex((x) => x.classList.contains('on'))")
        == 3
    )
    page.run("document.querySelector('#usage .maps canvas').focus()")
    page.press("ArrowRight", 2)
    page.press("ArrowDown")
    tip = page.run("document.getElementById('tip').textContent")
    assert tip.startswith("expert 2.2, all domains")
    share = 100 * payload["usage"]["all"].values[1, 2]
    assert f"{share:.1f}%" in tip
    page.press("Enter")
    assert page.run("document.querySelector('#cards .card h3').textContent").startswith("2.2")
    assert page.run("document.querySelectorAll('#cards .card').length") == 1


def test_everything_that_works_by_mouse_can_be_focused(page, opened):
    lost = page.run(
        "[...document.querySelectorAll('canvas, svg.chart')].filter((x) => !x.closest('.legend') && x.tabIndex < 0"
        " && !x.querySelector('[tabindex]')).length"
    )
    assert lost == 0
    unnamed = page.run(
        "[...document.querySelectorAll('select, input, button, canvas[tabindex], svg[tabindex]')]"
        ".filter((x) => !(x.labels?.length || x.getAttribute('aria-label') || x.textContent.trim())).length"
    )
    assert unnamed == 0


def test_the_difference_changes_the_maps(page, opened):
    pixels = "document.querySelector('#usage .maps figure:nth-child(2) canvas').toDataURL()"
    before = page.run(pixels)
    box = "document.querySelector('#usage select')"
    choose = f"(n) => {{ {box}.value = n; {box}.dispatchEvent(new Event('change')); }}"
    page.run(f"({choose})(1)")
    assert page.run(pixels) != before
    assert "points" in page.run("document.querySelector('#usage .legend').textContent")
    page.run(f"({choose})(0)")
    assert page.run(pixels) == before


def test_themes(page, opened):
    background = "getComputedStyle(document.body).backgroundColor"
    page.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    wait(page, f"{background} === 'rgb(18, 21, 26)'")
    page.run("document.querySelector('nav button').click()")
    assert page.run("document.querySelector('nav button').textContent") == "theme: light"
    assert page.run(background) == "rgb(255, 255, 255)"
    page.run("for (let i = 0; i < 2; i++) document.querySelector('nav button').click()")
    assert page.run(background) == "rgb(18, 21, 26)"
    page.send("Page.printToPDF")  # prints light, and comes back
    assert page.run("document.documentElement.dataset.theme") == "dark"
    page.send("Emulation.setEmulatedMedia", features=[])
    assert page.problems == []


def test_it_fits_a_small_screen(page, opened):
    page.send("Emulation.setDeviceMetricsOverride", width=400, height=800, deviceScaleFactor=1, mobile=True)
    assert page.run("document.documentElement.scrollWidth") <= 400
    page.send("Emulation.clearDeviceMetricsOverride")


def test_without_scripts_the_page_says_so(page, opened):
    page.send("Emulation.setScriptExecutionDisabled", value=True)
    page.open(opened.as_uri())
    text = page.send("DOM.getOuterHTML", nodeId=page.send("DOM.getDocument")["root"]["nodeId"])["outerHTML"]
    tree = page.send("Accessibility.getFullAXTree")["nodes"]
    page.send("Emulation.setScriptExecutionDisabled", value=False)
    assert "<noscript>" in text
    assert any("scripts are switched off" in str(x.get("name", {}).get("value")) for x in tree)


def test_typed_text_is_traced(page, payload):
    asked = []

    def trace_text(text):
        asked.append(text)
        words = text.split(" ")
        return {
            "tokens": words,
            "ids": [[[(i + layer) % 8, 7] for i, _ in enumerate(words)] for layer in range(4)],
            "weights": [[[0.75, 0.25]] * len(words)] * 4,
            "margin": [[0.125] * len(words)] * 4,
            "seconds": 0.5,
        }

    with ReportServer(payload, trace_text) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page.requests.clear()
        page.open(server.url)
        wait(page, "document.documentElement.dataset.views")
        text = f"one two {HOSTILE}"
        page.run(f"document.querySelector('#live textarea').value = {json.dumps(text)}")
        page.run("document.querySelector('#live button').click()")
        wait(page, "document.querySelector('#live .words span')")
        assert asked == [text]
        assert page.run("document.querySelector('#live .words').textContent") == text.replace(" ", "")
        panel = page.run("document.querySelector('#live .panel').textContent")
        assert "1.0" in panel
        assert "0.75" in panel
        assert "0.125" in panel or "0.13" in panel
        assert page.run("window.pwned") is None
        assert {x.removeprefix(server.url) for x in page.requests} == {"", "trace"}
        assert page.problems == []
        page.run(f"document.querySelector('#live textarea').value = 'x'.repeat({TEXT_CHARACTERS + 1})")
        page.run("document.querySelector('#live button').click()")
        wait(page, "document.querySelector('#live [role=status]').textContent.includes('did not work')")
        server.shutdown()
    page.problems.clear()  # the browser logs the refusal
