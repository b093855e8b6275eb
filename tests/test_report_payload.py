"""What a report page holds: the checks on its payload, its JSON, its numbers, and how it is written."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetrace.errors import FinetraceError
from finetrace.reporting.island import best_control, page_data, rounded, to_json
from finetrace.reporting.page import cell, render, write_report
from finetrace.reporting.payload import ExampleView, Interval, Report
from sample_reports import large, method, small


def test_json_is_inert_inside_a_script_element() -> None:
    value = {"text": "</script><!-- & \u2028\u2029 \ud800 \0"}
    text = to_json(value)
    assert not re.search("[<>&\u2028\u2029\ud800]", text)
    assert json.loads(text) == value


def test_scores_are_rounded_to_six_digits_and_what_is_not_finite_is_null() -> None:
    values = np.array([12345678.0, -0.00012345678, 0.0, np.nan, np.inf, -np.inf])
    assert rounded(values) == [12345700.0, -0.000123457, 0.0, None, None, None]
    assert f"{rounded(np.array([0.7444992]))[0]:.3f}" == "0.744"  # by way of 0.7445 it would be 0.745
    with pytest.raises(ValueError, match="not JSON compliant"):
        to_json(float("nan"))


def test_lists_rank_exact_scores_and_leave_out_what_is_not_finite() -> None:
    report = small()
    scores = np.zeros((4, 30))
    scores[0, :4] = [1.0, 1.0000001, np.nan, np.inf]
    island = page_data(replace(report, methods=[replace(report.methods[0], scores=scores)])).island
    top = island["methods"][0]["top"][0]
    assert top["rows"][:2] == [1, 0]  # equal after rounding, not before
    assert top["scores"][:2] == [1.0, 1.0]
    assert top["tied"] == list(range(2, 27))  # the zeros alone, up to the last but one of 28 rows
    assert not {2, 3} & set(top["rows"])
    assert island["methods"][0]["missing"] == [2, 0, 0, 0]
    to_json(island)


def test_columns_are_ordered_by_label_then_row_with_the_target_first() -> None:
    island = page_data(small()).island
    assert [(group["label"], group["start"], group["stop"]) for group in island["columns"]["groups"]] == [
        ("bad", 0, 10),
        ("good", 10, 30),
    ]
    assert island["columns"]["names"][:3] == ["t0", "t3", "t6"]
    assert island["methods"][0]["cells"][0][:3] == [0.0, 3.0, 6.0]
    assert [group["label"] for group in island["rows"]["groups"]] == ["bad", "good", None]


def test_large_reports_are_binned_within_labels_and_say_what_is_left_out() -> None:
    report = large()
    data = page_data(report)
    columns = data.island["columns"]
    assert columns["binned"]
    assert len(columns["names"]) <= 402
    first = columns["groups"][1]["start"]  # first bin of "class 1"
    rows = range(1, 5000, 3)[: int(columns["names"][first].split()[2])]
    assert data.island["methods"][2]["cells"][5][first] == pytest.approx(report.methods[2].scores[5, rows].mean(), 1e-3)
    referenced = {
        row
        for each in data.island["methods"]
        for side in ("top", "bottom")
        for listed in each[side]
        for row in listed["rows"]
    }
    assert {int(row) for row in data.island["examples"]} == referenced
    assert data.island["examples"]["7"]["prompt_cut"] == 5000
    text = " ".join(data.notes)
    assert all(
        words in text for words in ("binned", f"{data.island['kept']} highest", "in none of these", "cut at 4,000")
    )


def test_lists_get_shorter_when_their_texts_would_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetrace.reporting.island.LIST_BUDGET", 1)
    data = page_data(large(300))
    assert data.island["kept"] == 10
    assert "cut at 500 characters" in " ".join(data.notes)
    assert "the 10 highest and 10 lowest" in " ".join(data.notes)


def test_many_queries_are_binned_even_where_training_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetrace.reporting.island.MAX_CELLS", 6 * 24 * 30)
    assert len(page_data(large(300)).island["columns"]["names"]) == 30


def test_best_control_has_the_best_accuracy() -> None:
    report = small()
    assert best_control(report.methods) == "tfidf"
    assert best_control(report.methods[:2]) is None


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": [method("exact", np.zeros((4, 29)))]}, r"shape \(4, 29\)"),
        ({"methods": []}, "methods"),
        ({"verdict": []}, "verdict"),
        ({"default_method": "nobody"}, "nobody"),
        ({"methods": [method("exact", np.zeros((4, 30)))] * 2}, "2 times"),
        ({"methods": [method("exact", np.zeros((4, 30)), accuracy=93.0)]}, "between 0 and 1"),
    ],
)
def test_impossible_payloads_are_refused_in_words(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(FinetraceError, match=words):
        replace(small(), **changes)


@pytest.mark.parametrize(
    ("interval", "metric", "text"),
    [
        (Interval(0.93, 0.881, 0.97), "accuracy", "93.0 [88.1, 97.0]"),
        (Interval(0.923, 0.9, 1.0), "auroc", ".923 [.900, 1.000]"),
        (Interval(0.5), "coverage", "50.0"),
        (Interval(float("nan"), 0.1, 0.2), "auprc", "n/a"),
        (None, "auprc", "n/a"),
        (Interval(12.3456), "other", "12.3"),
    ],
)
def test_intervals_read_as_in_the_paper(interval: Interval | None, metric: str, text: str) -> None:
    assert cell(interval, metric).text == text


def test_a_failed_write_leaves_the_old_page_and_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "report.html"
    path.write_text("old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(FinetraceError, match="disk full"):
        write_report(path, small())
    assert path.read_text() == "old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]
    with pytest.raises(FinetraceError, match="is a folder"):
        write_report(tmp_path, small())


def test_a_report_without_labels_or_behaviour_renders() -> None:
    train = [ExampleView(f"t{i}", None, "p\ud800", "") for i in range(3)]
    queries = [ExampleView("q", None, "p", "")]
    text = render(Report("T", ["H."], {}, train, queries, [method("exact", np.full((1, 3), np.nan))], "exact"))
    assert "no ground truth here to measure the methods against. Controls" in " ".join(text.split())
    assert "Behaviour" not in text


def test_the_page_says_over_how_many_queries_its_metrics_are() -> None:
    report = small()
    assert f"over {len(report.queries)} queries" in " ".join(
        render(replace(report, judged=len(report.queries))).split()
    )
    some = " ".join(render(replace(report, judged=2)).split())
    assert (
        f"over 2 of {len(report.queries)} queries (of the others none or all of the training examples have the class)"
        in some
    )
    assert "in brackets; so few queries cannot tell methods apart. Accuracy" in some
    assert "in brackets. Accuracy" in " ".join(render(large(30)).split())  # 24 queries
