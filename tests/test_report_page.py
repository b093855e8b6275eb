"""What the report page does in a browser: no network, no injected script, and every control works."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetrace.reporting.page import write_report
from finetrace.reporting.payload import Interval
from sample_reports import ATTACK, large, small

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    programs = list(filter(None, map(shutil.which, BROWSERS)))
    if not programs:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed")
    arguments = ["--headless", "--no-sandbox", "--no-first-run"]
    arguments += [f"--disable-{name}" for name in ("gpu", "background-networking", "component-update", "sync")]
    with sync_api.sync_playwright() as playwright:
        for program in programs:
            try:
                running = playwright.chromium.launch(executable_path=program, args=arguments)
                break
            except sync_api.Error:  # a script that only says how to install it, say
                if program == programs[-1]:
                    raise
        yield running
        running.close()


@pytest.fixture(scope="module")
def small_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_report(tmp_path_factory.mktemp("small") / "new folder" / "report.html", small())


@pytest.fixture
def opened(browser: Any, small_page: Path) -> Iterator[Any]:
    """The small page in a browser; on leaving, nothing was logged, thrown or requested from a network."""
    yield from _open(browser, small_page)


def _open(browser: Any, path: Path) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    page = context.new_page()
    page.set_default_timeout(120_000)
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith("file://") else problems.append(request.url))
    page.goto(path.as_uri())
    page.wait_for_selector("#map .main-svg")
    yield page
    context.close()
    assert [problem[:200] for problem in problems if not problem.startswith("data:")] == []


def listed(page: Any, name: str = "exact") -> list[str]:
    found: list[str] = page.eval_on_selector_all(f"[data-method={name}] .item", "nodes => nodes.map(n => n.dataset.id)")
    return found


def first_cells(page: Any) -> list[float]:
    cells: list[float] = page.evaluate("document.getElementById('map').data[0].z[0].slice(0, 3)")
    return cells


def choose_query(page: Any, number: int) -> None:
    page.select_option("#query", value=str(number))


def test_the_page_opens_with_verdict_tables_map_and_cards(opened: Any) -> None:
    assert opened.inner_text(".headline") == "Headline."
    assert "Not validated" in opened.inner_text(".validation")
    assert opened.inner_text("tr[data-method=exact] td.number >> nth=0") == "93.0 [88.0, 97.0]"
    assert "Positive score = proponent" in opened.inner_text("main")
    cards = opened.eval_on_selector_all(".card", "nodes => nodes.map(n => n.dataset.method)")
    assert cards == ["exact", "repsim", "tfidf"]  # the default, and beside it repsim and the best control
    assert "control" in opened.inner_text("tr[data-method=tfidf] th")


def test_the_rows_stand_before_the_table_of_methods(opened: Any) -> None:
    order = opened.eval_on_selector_all("h2[id]", "nodes => nodes.map(n => n.id)")
    assert order == [f"{name}-title" for name in ("facts", "behaviour", "map", "examples", "methods")]
    # the controls stay in sight within their parent alone, so not over the table
    held = "document.getElementById('controls').parentElement.contains(document.getElementById('methods'))"
    assert not opened.evaluate(held)


def test_a_query_changes_the_list_and_opponents_turn_it_round(opened: Any) -> None:
    choose_query(opened, 0)
    assert listed(opened) == [f"t{i}" for i in range(29, 19, -1)]
    opened.check("input[value=bottom]")
    assert listed(opened) == [f"t{i}" for i in range(10)]
    assert "10 of these lowest scores are not negative" in opened.inner_text("[data-method=exact] .tally")
    choose_query(opened, 1)
    assert listed(opened)[:2] == ["t29", "t28"]
    opened.select_option("#count", "25")
    assert len(listed(opened)) == 25


def test_the_method_drives_the_map_and_the_first_card(opened: Any) -> None:
    choose_query(opened, 0)
    before = first_cells(opened)  # first row is q1, "bad"
    assert before == [0, -3, -6]
    opened.select_option("#method", label="repsim")
    assert first_cells(opened) == [0, 3, 6]
    assert opened.get_attribute(".card >> nth=0", "data-method") == "repsim"
    assert listed(opened, "repsim")[0] == "t0"
    opened.check("#ranks")
    assert first_cells(opened) == pytest.approx([0, 300 / 29, 600 / 29])
    assert "percentile" in opened.inner_text("#map-caption")


def test_cards_are_chosen_by_checkboxes(opened: Any) -> None:
    opened.get_by_role("checkbox", name="random").check()
    opened.get_by_role("checkbox", name="tfidf").uncheck()
    cards = opened.eval_on_selector_all(".card", "nodes => nodes.map(n => n.dataset.method)")
    assert cards == ["exact", "repsim", "random"]
    assert opened.get_by_role("checkbox", name="exact").is_disabled()


def test_the_map_names_what_is_under_the_pointer_and_a_click_chooses_the_query(opened: Any) -> None:
    opened.locator("#map").scroll_into_view_if_needed()
    box = opened.locator("#map .nsewdrag").bounding_box()
    x, y = box["x"] + box["width"] * 0.5 / 30, box["y"] + box["height"] * 1.5 / 4
    opened.mouse.move(x + 30, y)
    opened.mouse.move(x, y)
    named = ["query q0 (good)", "train t0 (bad)", "score 0"]
    opened.wait_for_function("text => document.getElementById('tip').textContent === text", arg="\n".join(named))
    assert opened.is_visible("#tip")
    opened.mouse.click(x, y)
    opened.wait_for_function("document.getElementById('query').value === '0'")
    assert listed(opened)[0] == "t29"


def test_markup_in_the_data_stays_text(opened: Any) -> None:
    choose_query(opened, 1)
    assert ATTACK in opened.inner_text("#asked")
    choose_query(opened, 0)
    assert ATTACK in opened.inner_text("[data-method=exact] .item >> nth=0")
    opened.click("summary")
    assert ATTACK in opened.inner_text(".probe")
    assert opened.evaluate("window.pwned") is None
    assert opened.locator("main img").count() == 0


def test_the_policy_blocks_a_script_that_is_not_the_page_own(browser: Any, small_page: Path) -> None:
    page = browser.new_page()
    page.goto(small_page.as_uri())
    page.evaluate("document.body.append(Object.assign(document.createElement('script'), {text: 'window.pwned = 1'}))")
    assert page.evaluate("window.pwned") is None
    page.close()


def test_words_shared_with_the_query_are_marked_but_not_stop_words(opened: Any) -> None:
    choose_query(opened, 0)
    marks = opened.eval_on_selector_all(
        "[data-method=exact] .item:first-child mark", "nodes => nodes.map(n => n.textContent)"
    )
    assert marks == ["Open", "LOCK", "pins"]  # "turn" is not "turns"; "the", "don't" and "they" are stop words
    assert opened.locator("[data-method=exact] .item:nth-child(2) mark").count() == 0


def test_the_table_sorts_by_its_headers_and_keeps_controls_together(opened: Any) -> None:
    def order() -> list[str]:
        rows: list[str] = opened.eval_on_selector_all("#methods tbody tr", "rows => rows.map(r => r.dataset.method)")
        return rows

    opened.get_by_role("button", name="Method").focus()
    opened.keyboard.press("Enter")
    assert order() == ["exact", "repsim", "random", "tfidf"]
    opened.get_by_role("button", name="Accuracy").click()
    assert order() == ["exact", "repsim", "tfidf", "random"]
    opened.get_by_role("button", name="Accuracy").click()
    assert order() == ["repsim", "exact", "random", "tfidf"]
    assert opened.get_attribute("#methods th >> nth=2", "aria-sort") == "ascending"


def test_scores_that_are_not_finite_are_counted_and_shown_as_na(opened: Any) -> None:
    choose_query(opened, 3)
    assert "2 training examples have no finite score (n/a)" in opened.inner_text("[data-method=exact] .tally")
    assert opened.evaluate("document.getElementById('map').data[0].z[2][0]") is None


def test_rows_tie_where_their_scores_do_and_not_their_rounding(browser: Any, tmp_path: Path) -> None:
    report, close = small(), np.full((4, 30), 0.75)
    close[0] += np.arange(30) * 2.0**-24  # not equal, but to six digits
    methods = [replace(report.methods[0], scores=close), *report.methods[1:]]
    view = _open(browser, write_report(tmp_path / "report.html", replace(report, methods=methods)))
    page = next(view)
    choose_query(page, 0)
    assert "ties with" not in page.inner_text("[data-method=exact]")
    choose_query(page, 2)
    assert "Rank 11 ties with rank 10" in page.inner_text("[data-method=exact] .tally")
    assert next(view, None) is None


@pytest.mark.parametrize("width", [400, 1400])
def test_nothing_is_wider_than_the_window(opened: Any, width: int) -> None:
    opened.set_viewport_size({"width": width, "height": 800})
    opened.wait_for_timeout(300)  # the map is redrawn 120 ms after a resize, and later where the machine is busy
    opened.wait_for_function("width => document.documentElement.scrollWidth <= width", arg=width)


def test_a_long_method_name_wraps_and_every_column_is_seen(browser: Any, tmp_path: Path) -> None:
    report = small()
    metrics = {name: Interval(0.5, 0.25, 0.75) for name in ("accuracy", "coverage", "auroc", "auprc")}
    name = "ekfac cosine response+probe:I'm sorry all+last-fifth damping=0.1"
    report = replace(report, methods=[replace(each, metrics=metrics) for each in report.methods])
    report = replace(
        report, methods=[replace(report.methods[0], method=name), *report.methods[1:]], default_method=name
    )
    for page in _open(browser, write_report(tmp_path / "long.html", report)):
        table, room = (
            page.evaluate(f"document.querySelector('#methods').{what}")
            for what in ("offsetWidth", "parentElement.clientWidth")
        )
        assert table <= room


def test_a_large_page_stays_small_and_says_it_is_binned(browser: Any, tmp_path: Path) -> None:
    path = write_report(tmp_path / "large.html", large())
    assert path.stat().st_size < 12e6
    for page in _open(browser, path):
        assert "binned" in page.inner_text("#map-caption")
        assert "binned" in page.inner_text("footer")
        choose_query(page, 0)
        assert listed(page, "m0")[0] == "t7"
        assert "5,000 more characters are not on this page" in page.inner_text(".item >> nth=0")
