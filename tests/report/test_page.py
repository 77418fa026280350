"""The page in a real browser: no error, no request, the figures that matter, the slider, hostile names."""

import json
import re

import pytest
from helpers_report import HOSTILE, pruning

from llmshearing.report.figures import MOST, thinned
from llmshearing.report.page import FRAMES, draw, embedded, frames, page
from llmshearing.report.read import read_run
from llmshearing.report.record import Recorder

TEXTS = "[...document.querySelectorAll('figure.chart figcaption')].map(e => e.textContent)"
MAPS = "[...document.querySelectorAll('figure.map')]"
CELLS = f"{MAPS}.map(e => [...e.querySelectorAll('path')].map(p => p.getAttribute('d')).join())"
BOX = "document.querySelector('figure.chart svg').getBoundingClientRect()"
PLACE = f"(b => [b.left + b.width / 2, b.top + b.height / 2])({BOX})"


@pytest.fixture(scope="module")
def opened(browser, tmp_path_factory):
    """The browser with the page of a pruning run."""
    path = draw(pruning(tmp_path_factory.mktemp("page") / 'run & "co" <b>'))
    browser.problems.clear()
    browser.requests.clear()
    browser.open(path)
    return browser


def test_the_page_draws_without_an_error_and_asks_for_nothing(opened):
    assert opened.do("document.documentElement.dataset.drawn") == "yes"
    assert opened.problems == []
    assert len(opened.requests) == 1 and opened.requests[0].startswith("file:")


def test_the_figures_that_matter_are_there(opened):
    titles = opened.do(TEXTS)
    for wanted in ("Open units: hidden", "λ₁", "λ₂", "Loss in training", "Loss at evaluations", "Mixture", "Speed"):
        assert any(wanted in title for title in titles), (wanted, titles)
    assert "other" in titles  # what nobody knows is drawn too
    kinds = opened.do("[...document.querySelectorAll('figure.map')].map(e => e.dataset.kind)")
    assert kinds == ["hidden", "intermediate", "layer"]
    drawn = opened.do("[...document.querySelectorAll('path.line')].every(e => e.getTotalLength() > 20)")
    assert drawn is True
    label = opened.do("document.querySelector('figure.chart svg').getAttribute('aria-label')")
    assert label == "Open units: hidden. wanted: from 4 to 4; expected: from 7.8 to 4"


def test_the_slider_moves_the_maps_by_keyboard(opened):
    opened.do("document.querySelector('input[type=range]').focus()")
    states, batches = [], []
    for key in ("End", "ArrowLeft", "ArrowLeft", "Home"):
        opened.key(key)
        states.append(opened.do(CELLS)[:2])
        batches.append(opened.do("document.querySelector('output').textContent"))
    assert batches == ["20", "15", "10", "5"]
    assert len({json.dumps(state) for state in states}) == 4
    caption = opened.do("document.querySelector('figure.map figcaption').textContent")
    assert caption == "hidden  7 of 8"
    shown = opened.do("document.querySelector('figure.map[data-kind=layer] svg').getAttribute('aria-label')")
    assert shown == "layer, kept, without noise: layer 0 100 %, layer 1 100 %, layer 2 0 %"


def test_the_other_view(opened):
    before = opened.do(CELLS)
    opened.do("document.querySelector('input[value=open]').click()")
    assert opened.do(CELLS) != before
    opened.do("document.querySelector('input[value=kept]').click()")
    assert opened.do(CELLS) == before


def test_a_tooltip_by_mouse_and_by_keyboard(opened):
    opened.do("window.scrollTo(0, document.querySelector('figure.chart').getBoundingClientRect().top + window.scrollY)")
    opened.move(*opened.do(PLACE))
    said = opened.do("document.getElementById('tip').textContent")
    assert re.fullmatch(r"batch 1[12]\nwanted  4\nexpected  5\.[68]", said), said
    opened.do("document.querySelector('figure.chart svg').focus()")
    opened.key("Home")
    assert opened.do("document.getElementById('tip').textContent") == "batch 1\nwanted  4\nexpected  7.8"
    opened.key("ArrowRight")
    assert opened.do("document.getElementById('tip').textContent").startswith("batch 2\n")


def test_hostile_names_are_text(opened):
    assert opened.do("document.title") == 'run & "co" <b> – llmshearing'
    assert opened.do("document.querySelectorAll('img').length") == 0
    assert opened.do("document.querySelectorAll('script').length") == 2
    assert opened.do("document.querySelector('h1').textContent") == 'run & "co" <b>'
    assert HOSTILE in opened.do("document.querySelector('.remark').textContent")


def test_dark_where_it_is_wanted(opened):
    paper = []
    for scheme in ("light", "dark"):
        opened.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        paper.append(opened.do("getComputedStyle(document.body).backgroundColor"))
    assert paper == ["rgb(251, 251, 249)", "rgb(22, 24, 27)"]


def test_several_runs_in_a_browser(browser, tmp_path):
    runs = [read_run(pruning(tmp_path / name, batches, title=name)) for name, batches in (("one", 20), ("two", 10))]
    (tmp_path / "both.html").write_text(page(runs))
    browser.problems.clear()
    browser.open(tmp_path / "both.html")
    assert browser.problems == []
    names = "[...document.querySelectorAll('[data-compared] figure')].map(e => e.querySelectorAll('path.line').length)"
    assert browser.do(names)[:3] == [2, 2, 2]
    assert browser.do("document.querySelectorAll('section').length") == 3
    assert browser.do("[...document.querySelectorAll('thead th')].slice(0, 2).map(e => e.textContent)") == [
        "one",
        "two",
    ]
    cells = browser.do("[...document.querySelectorAll('tbody tr')].map(e => e.textContent)")
    assert "batches2010" in cells and "tokens2,0001,000" in cells


def test_json_in_the_page_cannot_end_its_element():
    text = embedded({"a": [HOSTILE, "<!--", float("nan"), float("inf"), "\u2028"]})
    assert "<" not in text and ">" not in text and json.loads(text) == {"a": [HOSTILE, "<!--", None, None, "\u2028"]}


def test_a_long_run_stays_small(tmp_path):
    points = [(float(at), float(at % 7)) for at in range(100_000)]
    found = thinned(points)
    assert len(found) == MOST and found[0] == points[0] and found[-1] == points[-1]
    assert sum(y for _, y in found[1:-1]) / (MOST - 2) == pytest.approx(3.0, abs=0.01)  # means of all of them
    record = Recorder(tmp_path).start("train", "long")
    for batch in range(200):
        record.maps(batch, {"kept": {"layer": {"units": 1, "rows": ["A"], "sums": [0.0]}}})
    kept = [frame["batch"] for frame in frames(read_run(tmp_path))["frames"]]
    assert len(kept) == FRAMES and kept[0] == 0 and kept[-1] == 199 and kept == sorted(set(kept))
