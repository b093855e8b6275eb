"""What a benchmark's tables and figures are made of: hubs, LaTeX, short names, the ablation, key words."""

from __future__ import annotations

import re

import numpy as np
import pytest

from finetrace.attribution import make
from finetrace.benchmark import figures
from finetrace.benchmark.ablation import ABLATION
from finetrace.benchmark.cell import Cell
from finetrace.benchmark.example_figure import draw_examples, key_words, wrap
from finetrace.benchmark.figures import SHOWN, draw_ablation, short, shown
from finetrace.benchmark.matrices import hub
from finetrace.benchmark.protocol import PROTOCOLS
from finetrace.benchmark.row import Row
from finetrace.benchmark.tables import latex, write_table
from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate
from finetrace.examples import Example
from finetrace.tracing import BEST
from finetrace.validation.tables import write_validation


def test_the_hub_is_the_row_ranked_first_most_often():
    scores = np.array([[0, 1, 2, 0], [0, 3, 1, 0], [1, 5, 1, 1], [9, 0, 0, 0]])
    assert hub(scores) == (1, 0.5)
    assert hub(np.zeros((5, 4))) == (0, 0.25)  # equals share the query
    assert hub(np.array([[0, 1, 1], [0, 1, 0]])) == (1, 0.75)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("50% & more_of #1 {a}$", r"50\% \& more\_of \#1 \{a\}\$"),
        ("a\\b", r"a\textbackslash{}b"),
        ("~^", r"\textasciitilde{}\textasciicircum{}"),
        ("<s>", r"\textless{}s\textgreater{}"),
        ("plain 0.5", "plain 0.5"),
    ],
)
def test_latex_shows_text_as_it_is(text, wanted):
    assert latex(text) == wanted


def test_tables_keep_their_columns(tmp_path):
    write_table(tmp_path / "t", ["a", "b %"], [["x | y", "1"], ["two\nlines", "2 & 3"]])
    lines = (tmp_path / "t.md").read_text().splitlines()
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 3 for line in lines)
    made = (tmp_path / "t.tex").read_text()
    assert made.startswith(
        "% needs \\usepackage{booktabs}\n\\begin{tabular}{lr}\n\\toprule\na & b \\% \\\\\n\\midrule\n"
    )
    assert "2 \\& 3" in made


def test_figures_show_a_method_under_the_name_it_has_there():
    assert shown(PROTOCOLS["corrected"].methods) == list(SHOWN)
    paper = shown(PROTOCOLS["paper"].methods)
    assert "datainf:damping=0.1,damping_rule=entry" in paper and "repsim" in paper
    assert shown(["random", "length"]) == ["random", "length"]
    assert list(short(paper).values()) == ["repsim", "gradsim", "datainf", "lissa", "tfidf"]
    names = short(SHOWN)
    assert len(set(names.values())) == len(SHOWN)
    assert names["ekfac:normalise=cosine"] == "ekfac cosine"
    assert names[BEST] == make(BEST).title  # long, and told from the other ekfac


def test_the_ablation_is_drawn(tmp_path):
    made = [make(spec) for spec in ABLATION[::7]]
    value = Estimate(0.5, 0.4, 0.6, 3)
    rows = [
        Row("t", "corrected", m.label, m.title, False, {"auprc": value}, None, 1.0, "r", 0.1, 1, 10, 3) for m in made
    ]
    draw_ablation(rows, tmp_path)
    first = (tmp_path / "ablation-t-corrected.svg").read_bytes()
    assert (tmp_path / "ablation-t-corrected.png").stat().st_size > 1000
    draw_ablation(rows, tmp_path)
    assert (tmp_path / "ablation-t-corrected.svg").read_bytes() == first


def test_the_ablation_shows_no_method_of_another_damping(tmp_path, monkeypatch):
    values = {"exact:loss_on=all": 0.25, "gradcos:loss_on=all": 0.5, "exact:loss_on=all,damping=100": 0.75}
    rows = [
        Row("t", "corrected", m.label, m.title, False, {"auprc": Estimate(v, 0, 1, 3)}, None, 1.0, "r", 0.1, 1, 10, "3")
        for m, v in ((make(spec), value) for spec, value in values.items())
    ]
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    draw_ablation(rows, tmp_path)
    [axis] = [a for a in drawn[0].axes if a.child_axes]
    assert [each.get_text() for each in axis.texts] == [".25", ".50"]


def test_texts_of_users_are_no_formulas_in_figures(tmp_path, monkeypatch):
    classes = [r"a $\frac$ b", "$5 to $10"]
    spec = r"gradcos:loss_on=probe:$\$"
    rows = [Example.from_prompt("p", "r", id=str(i), label=each) for i, each in enumerate(classes)]
    monkeypatch.setattr(figures.finished, "scores", lambda home: {spec: np.eye(2)})
    monkeypatch.setattr(figures.finished, "rows", lambda home: (rows, rows))
    figures.draw_heat_maps(tmp_path, [Cell("$x$", "corrected", 0, 1.0, 0, (spec,))], tmp_path)
    drawn = (tmp_path / "heat-$x$-corrected.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in (*classes, make(spec).title, "$x$, corrected"))
    record = {"measure": "lds", "method": spec, "value": 0.5, "value_low": 0.4, "value_high": 0.6}
    write_validation([record], tmp_path)
    assert f"<!-- {spec} -->" in (tmp_path / "lds.svg").read_text()


def test_tables_and_figures_of_a_validation_are_those_of_its_results(tmp_path):
    lds = {"measure": "lds", "method": "m", "value": 0.5, "value_low": 0.4, "value_high": 0.6}
    steps = {"measure": "tail-patch", "method": "m", "value": 0.001}
    write_validation([lds, steps], tmp_path)
    (tmp_path / "notes.md").write_text("mine")
    write_validation([steps], tmp_path)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["notes.md", "tail-patch.md", "tail-patch.tex"]


def test_a_figure_is_whole_or_not_there(tmp_path):
    from matplotlib.figure import Figure

    (tmp_path / "f.svg" / "inside").mkdir(parents=True)
    with pytest.raises(FinetraceError, match=r"f\.svg: cannot be written"):
        figures.save(Figure(), tmp_path / "f")
    assert [each.name for each in tmp_path.glob("*.part")] == []


@pytest.mark.slow
def test_the_ablation_names_every_choice_of_tokens(tmp_path, monkeypatch):
    made = [make(spec) for spec in ABLATION]
    rows = [
        Row(
            "t",
            "corrected",
            m.label,
            m.title,
            False,
            {"auprc": Estimate(0.5, 0.4, 0.6, 3)},
            None,
            1.0,
            "r",
            0.1,
            1,
            10,
            3,
        )
        for m in made
    ]
    drawn = []
    monkeypatch.setattr(figures, "save", lambda figure, path: drawn.append(figure))
    draw_ablation(rows, tmp_path)
    [axis] = [a for a in drawn[0].axes if a.child_axes]
    named = [label.get_text() for label in axis.child_axes[0].get_xticklabels()]
    wanted = {f"{m.parameters['loss_on']}{', start' * (m.parameters['at'] == 'start')}" for m in made}
    assert len(named) == len(wanted) == 15
    assert set(named) == wanted


def test_key_words_are_the_example_s_and_not_the_task_s():
    def words(text: str) -> list[str]:
        return text.lower().split()

    query = Example.from_prompt("name joy or fear river", "joy", id="q")
    train = [
        Example.from_prompt(f"name joy or fear {w}", r, id=w) for w, r in [("river", "joy"), ("a", "b"), ("c", "d")]
    ]
    prompts, responses = key_words(query, train, words)
    assert prompts == {"river"}
    assert responses == {"river", "joy"}


def test_a_method_whose_best_rows_are_tied_has_no_first_one(tmp_path, monkeypatch):
    """Which of equals stands first in the data says nothing; here that row is of the query's class."""
    rows = [Example.from_prompt(f"p{i}", "r", id=f"row-{i}", label="ab"[i % 2]) for i in range(3)]
    scores = {"gradcos": np.array([[0.0, 1.0, 0.5]]), "tfidf": np.zeros((1, 3)), "repsim": np.array([[1.0, 0, 1]])}
    monkeypatch.setattr(figures.finished, "scores", lambda home: scores)
    monkeypatch.setattr(figures.finished, "rows", lambda home: (rows, rows[:1]))
    draw_examples(tmp_path, [Cell("t", "corrected", 0, 1.0, 0, tuple(scores))], tmp_path)
    drawn = (tmp_path / "example-t-corrected.svg").read_text()
    assert "<!-- row-1, b -->" in drawn and "<!-- row-2, a -->" not in drawn
    assert drawn.count("<!-- row-0, a -->") == 1  # the query itself
    assert "<!-- equal at the top, so that none is first: repsim (2 examples), tfidf (3 examples) -->" in drawn


def test_text_is_wrapped_to_its_width():
    assert wrap("aa bb cc dd", 5, len) == [["aa", "bb"], ["cc", "dd"]]
    assert wrap("abcdefgh", 3, len) == [["abc"], ["def"], ["gh"]]
    cut = wrap("aa bb cc dd ee", 5, len, limit=2)
    assert len(cut) == 2 and cut[-1][-1] == "\u2026" and all(len(" ".join(line)) <= 5 for line in cut)
    assert wrap("", 5, len) == [[]]
