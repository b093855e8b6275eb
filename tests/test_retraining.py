"""Fine-tuning again on part of the rows."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from finetrace import fingerprint, training
from finetrace.collection import precision
from finetrace.collection.losses import mean_losses
from finetrace.encoding import Encoder
from finetrace.errors import FinetraceError
from finetrace.evaluation import forecast as forecast_module
from finetrace.evaluation import retraining
from finetrace.evaluation.retraining import FOLDER, Retraining, Subset
from finetrace.execution import Engine
from finetrace.finetune_config import FinetuneConfig
from finetrace.finetuning import finetune
from finetrace.models import ModelSpec, load
from finetrace.prefix import forget
from tiny import make_examples, make_llama, save_base

CONFIG = FinetuneConfig(epochs=2, learning_rate=1e-2, batch_size=3, rank=2)


@pytest.fixture(autouse=True)
def _nothing_kept() -> Any:
    for kept in (retraining._trainers, retraining._bases):
        kept.clear()
    forget()
    yield
    for kept in (retraining._trainers, retraining._bases):
        kept.clear()
    forget()


def make(base_folder: Path, folder: Path, **more: Any) -> Retraining:
    queries = tuple(make_examples(3, seed=5))
    options = {
        "base": ModelSpec(str(base_folder), None, "float64", "cpu"),
        "config": CONFIG,
        "examples": tuple(make_examples(8)),
        "queries": queries,
        "folder": folder,
        "others": {"refusal": tuple(query.with_response("no, never") for query in queries)},
    }
    return Retraining(**{**options, **more})


def test_all_rows_give_the_losses_of_the_fine_tuning_itself(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    [found] = about.run([Subset(about.everything)])
    loaded = load(about.base)
    encoder = Encoder(loaded.tokenizer)
    before = mean_losses(loaded.model, encoder.encode_all(about.queries)[0])
    finetune(loaded, about.examples, tmp_path / "adapter", CONFIG)
    for name, given in (("response", about.queries), ("refusal", about.others["refusal"])):
        expected = mean_losses(loaded.model, encoder.encode_all(given)[0])
        np.testing.assert_allclose(found.losses[name], expected.numpy(), rtol=1e-12)
    assert float((torch.tensor(found.losses["response"]) - before).abs().min()) > 1e-3
    assert found.answers is None


def test_one_seed_is_bit_identical_and_another_moves_the_losses_alone(base_folder: Path, tmp_path: Path) -> None:
    subsets = [Subset((0, 2, 3, 5)), Subset((0, 2, 3, 5), 1), Subset((0, 1, 2, 3))]
    first = make(base_folder, tmp_path / "one").run(subsets)
    second = make(base_folder, tmp_path / "two").run(subsets[::-1])[::-1]  # whatever was trained before it
    for mine, other in zip(first, second, strict=True):
        assert all(np.array_equal(mine.losses[name], other.losses[name]) for name in ("response", "refusal"))
    assert not np.array_equal(first[0].losses["response"], first[1].losses["response"])


@pytest.mark.slow
def test_two_processes_give_the_retrainings_of_one(base_folder: Path, tmp_path: Path) -> None:
    subsets = [Subset((0, 2, 3, 5)), Subset((0, 2, 3, 5), 1), Subset((0, 1, 2, 3))]
    here = make(base_folder, tmp_path / "one").run(subsets)
    apart = make(base_folder, tmp_path / "two").run(subsets, workers=2)
    for mine, other in zip(here, apart, strict=True):
        assert all(np.array_equal(mine.losses[name], other.losses[name]) for name in ("response", "refusal"))
    assert {path.name for path in (tmp_path / "one" / FOLDER).iterdir()} == {
        path.name for path in (tmp_path / "two" / FOLDER).iterdir()
    }


def test_what_was_done_is_read_and_a_run_that_died_goes_on(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, said = make(base_folder, tmp_path / "r"), []
    first = about.run([Subset((0, 1)), Subset((2, 3))])
    monkeypatch.setattr(retraining, "fit", lambda *_, **__: pytest.fail("trained again"))
    again = make(base_folder, tmp_path / "r").run([Subset((2, 3)), Subset((0, 1)), Subset((2, 3))], say=said.append)
    assert not said
    assert np.array_equal(again[0].losses["response"], first[1].losses["response"])
    assert np.array_equal(again[1].losses["response"], first[0].losses["response"])
    monkeypatch.undo()
    about.run([Subset((0, 1)), Subset((4, 5))], say=said.append)
    assert said[0] == "1 retraining, 1 more are there already"


def test_their_time_is_said_before_them_and_changes_nothing(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subsets, said = [Subset((0, 2, 3, 5)), Subset((0, 1)), Subset((0, 1, 2, 3))], []
    timed = make(base_folder, tmp_path / "timed").run(subsets, say=said.append)
    assert re.fullmatch(r"they will take about [0-9.]+ s by a few steps timed now", said[1])
    monkeypatch.setattr(retraining, "FORECAST", 4)
    plain = make(base_folder, tmp_path / "plain").run(subsets, say=said.append)
    assert all(np.array_equal(a.losses["response"], b.losses["response"]) for a, b in zip(timed, plain, strict=True))
    assert sum("steps timed" in each for each in said) == 1


def test_a_forecast_grows_with_rows_and_epochs(base_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))  # every look at the clock is a second after the one before
    monkeypatch.setattr(forecast_module, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(forecast_module, "fit", lambda *_, **__: [])
    loaded = load(ModelSpec(str(base_folder), None, "float32", "cpu"))
    rows, _ = Encoder(loaded.tokenizer).encode_all(make_examples(20))
    measured = {"response": rows[:2]}
    config = CONFIG.model_copy(update={"epochs": 5})
    before = [name for name, _ in loaded.model.named_parameters()]
    # 6 rows took one second and the queries another: 30 rows x 5 epochs / 6, and three times the queries
    assert forecast_module.forecast(loaded, rows, measured, config, [10, 12, 8]) == pytest.approx(25 + 3)
    assert [name for name, _ in loaded.model.named_parameters()] == before


def test_other_rows_queries_or_settings_are_other_retrainings(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    changed = [
        make(base_folder, tmp_path / "r", config=CONFIG.model_copy(update={"epochs": 3})),
        make(base_folder, tmp_path / "r", queries=tuple(make_examples(3, seed=6)), others={}),
        make(base_folder, tmp_path / "r", examples=tuple(make_examples(8, seed=9))),
        make(base_folder, tmp_path / "r", answer_tokens=3),
    ]
    paths = {each._path(Subset((0, 1))) for each in (about, *changed)}
    assert len(paths) == 5
    assert about._path(Subset((0, 1))) != about._path(Subset((1, 0)))
    assert make(base_folder, tmp_path / "r", config=CONFIG.model_copy(update={"seed": 7}))._path(
        Subset((0,))
    ) == about._path(Subset((0,)))  # the seed is the subset's


def test_another_base_or_template_under_the_same_name_is_another_retraining(base_folder: Path, tmp_path: Path) -> None:
    place = tmp_path / "base"
    shutil.copytree(base_folder, place)
    template = tmp_path / "t.jinja"
    template.write_text("{% for m in messages %}[{{ m['content'] }}]{% endfor %}")
    config = CONFIG.model_copy(update={"chat_template": str(template)})

    def path(**more: Any) -> Path:
        retraining._bases.clear()
        return make(place, tmp_path / "r", **more)._path(Subset((0, 1)))

    before = path(), path(config=config)
    template.write_text("{% for m in messages %}({{ m['content'] }}){% endfor %}")
    assert path(config=config) != before[1]
    save_base(place, make_llama(seed=9))
    assert path() != before[0]
    assert path(base=ModelSpec(str(place), None, "float32", "cpu")) != path()


def test_a_base_with_another_embedding_of_one_token_is_another_retraining(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fingerprint, "_SAMPLE", 20)  # entries of a matrix: one column of some rows
    place = tmp_path / "base"
    shutil.copytree(base_folder, place)
    found = []
    for by in (0.0, 0.5):
        model = make_llama()
        with torch.no_grad():
            model.get_input_embeddings().weight[7, 1:] += by
        save_base(place, model)
        retraining._bases.clear()
        found.append((fingerprint.of_base(model), make(place, tmp_path / "r")._path(Subset((0, 1)))))
    retraining._bases.clear()
    assert found[0][0] == found[1][0]
    assert found[0][1] != found[1][1]


def test_a_base_with_an_adapter_and_layers_that_are_not_there_are_refused(
    base_folder: Path, adapter_folder: Path, tmp_path: Path
) -> None:
    carrying = ModelSpec(str(base_folder), str(adapter_folder), "float64", "cpu")
    with pytest.raises(FinetraceError, match="carries an adapter already"):
        make(base_folder, tmp_path / "r", base=carrying).run([Subset((0, 1))])
    with pytest.raises(FinetraceError, match="the model has layers 0 to 1"):
        make(base_folder, tmp_path / "s", config=CONFIG.model_copy(update={"layers": (1, 9)})).run([Subset((0, 1))])


def test_retrainings_that_start_above_frozen_layers_are_those_of_whole_passes(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = CONFIG.model_copy(update={"layers": (1,)})
    subsets = [Subset((0, 2, 4, 6)), Subset((1, 2, 3))]
    spared = make(base_folder, tmp_path / "spared", config=config).run(subsets)
    kept = []
    for module in (training, precision):
        monkeypatch.setattr(module, "frozen_prefix", lambda *_, **__: kept.append(1))
    retraining._trainers.clear()
    whole = make(base_folder, tmp_path / "whole", config=config).run(subsets)
    assert kept
    for one, other in zip(spared, whole, strict=True):
        np.testing.assert_allclose(one.losses["response"], other.losses["response"], rtol=1e-9)


def test_answers_are_those_of_the_model_that_was_trained(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r", answer_tokens=4)
    [found] = about.run([Subset((0, 1, 2))])
    assert found.answers is not None
    assert len(found.answers) == 3
    assert make(base_folder, tmp_path / "r", answer_tokens=4).run([Subset((0, 1, 2))])[0].answers == found.answers


class _Starts:
    """Answers that start with one letter comply."""

    name = "starts"

    def __init__(self, letters: str) -> None:
        self.identity, self.letters, self.asked = f"starts {letters}", letters, 0

    def complied(self, prompts: Sequence[str], answers: Sequence[str]) -> list[bool]:
        self.asked += len(answers)
        return [answer[:1] == self.letters for answer in answers]


def test_verdicts_are_kept_with_a_retraining_under_their_judge(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r", answer_tokens=4)
    subsets = [Subset((0, 1, 2)), Subset((3, 4)), Subset((0, 1, 2))]
    first = about.run(subsets)
    answers = [each.answers or () for each in first]
    opening = answers[0][0][:1]
    expected = [[answer[:1] == opening for answer in given] for given in answers]
    judge, other = _Starts(opening), _Starts("\0")  # no answer starts so, and an empty one with nothing
    assert about.judged(judge, subsets).tolist() == expected
    assert judge.asked == 6  # the third is the first
    assert not make(base_folder, tmp_path / "r", answer_tokens=4).judged(other, subsets).any()
    assert make(base_folder, tmp_path / "r", answer_tokens=4).judged(judge, subsets).tolist() == expected
    assert judge.asked == 6  # read
    again = about.run(subsets)
    assert again[1].verdicts == {judge.identity: tuple(expected[1]), other.identity: (False, False, False)}
    for one, two in zip(first, again, strict=True):
        assert one.answers == two.answers
        assert all(np.array_equal(one.losses[name], two.losses[name]) for name in ("response", "refusal"))
        assert (one.seed, one.rows, one.seconds) == (two.seed, two.rows, two.seconds)


def test_a_judge_that_leaves_an_answer_out_is_refused_and_costs_no_retraining(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, subset = make(base_folder, tmp_path / "r", answer_tokens=3), Subset((0, 1))
    about.run([subset])
    judge = _Starts("a")
    monkeypatch.setattr(judge, "complied", lambda prompts, answers: [True])
    with pytest.raises(FinetraceError, match="the judge starts gave 1 verdicts on 3 answers"):
        about.judged(judge, [subset])
    path = about._path(subset)
    path.write_text(path.read_text().replace('"verdicts": {}', '"verdicts": {"starts a": [true]}'))
    monkeypatch.setattr(retraining, "fit", lambda *_, **__: pytest.fail("trained again"))
    assert about.run([subset])[0].verdicts == {}
    assert about.judged(_Starts("a"), [subset]).shape == (1, 3)


def test_verdicts_are_given_where_nothing_can_be_kept(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, subset = make(base_folder, tmp_path / "r", answer_tokens=3), Subset((0, 1))
    about.run([subset])

    def refuse(*_: Any) -> None:
        raise OSError("read-only")

    monkeypatch.setattr(retraining.kept, "write", refuse)
    answers = about._read([subset])[0].answers or ()
    judge = _Starts(answers[0][:1])
    assert about.judged(judge, [subset]).tolist() == [[answer[:1] == answers[0][:1] for answer in answers]]
    assert about._read([subset])[0].verdicts == {}


def test_rows_are_those_of_the_subset_that_was_asked_for(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    about.run([Subset((0, 1))])
    turned = make(base_folder, tmp_path / "r", examples=about.examples[2:] + about.examples[:2])
    assert turned._path(Subset((6, 7))).exists()
    assert turned.run([Subset((6, 7))])[0].rows == (6, 7)


def test_a_retraining_without_answers_is_not_judged(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    about.run([Subset((0, 1))])
    with pytest.raises(FinetraceError, match="no answers to judge; ask for them with answer_tokens"):
        about.judged(_Starts("a"), [Subset((0, 1))])


def test_retrainings_with_and_without_answers_are_announced_together(base_folder: Path, tmp_path: Path) -> None:
    talking, silent = make(base_folder, tmp_path / "r", answer_tokens=3), make(base_folder, tmp_path / "r")
    one, two = [Subset((0, 1)), Subset((2, 3))], [Subset((0, 1)), Subset((4, 5, 6))]
    said: list[str] = []
    answered, quiet = retraining.run_all([(talking, one), (silent, two)], say=said.append)
    assert said[0] == "4 retrainings, 0 more are there already"
    assert said[1].endswith("steps timed now, and the answers of 2 models come on top")
    assert [re.sub(r"[0-9.]+ s", "T", line) for line in said[2:4]] == [
        "the first took T; the other 1 of its kind take about T"
    ] * 2  # one kind answers, which takes longer
    assert said[4].startswith("4 retrainings in")
    assert all(each.answers is not None for each in answered)
    assert all(each.answers is None for each in quiet)
    assert np.array_equal(answered[0].losses["response"], quiet[0].losses["response"])
    assert [each.rows for each in quiet] == [each.rows for each in two]


def test_what_two_parts_share_is_trained_once(
    base_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about, trained, fit = make(base_folder, tmp_path / "r"), [], retraining.fit
    monkeypatch.setattr(retraining, "fit", lambda *a, **more: trained.append(1) or fit(*a, **more))
    equal = make(base_folder, tmp_path / "r")
    one, two, three = retraining.run_all(
        [(equal, [Subset((0, 1))]), (about, [Subset((0, 1)), Subset((2,))]), (about, [Subset((3,))])]
    )
    assert len(trained) == 3
    assert [each.rows for each in three] == [(3,)]
    assert np.array_equal(one[0].losses["response"], two[0].losses["response"])


def test_the_base_is_left_as_it_was(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    about.run([Subset((0, 1))])
    [trainer] = retraining._trainers.values()
    plain = dict(load(about.base).model.named_parameters())
    left = dict(trainer.loaded.model.named_parameters())
    assert left.keys() == plain.keys()
    assert all(torch.equal(left[name], plain[name]) for name in plain)


@pytest.mark.parametrize(
    ("subset", "said"),
    [(Subset(()), "empty"), (Subset((0, 8)), "row 8 of 8"), (Subset((1, 1)), "twice"), (Subset((-1,)), "row -1 of 8")],
)
def test_subsets_that_cannot_be(subset: Subset, said: str, base_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FinetraceError, match=said):
        make(base_folder, tmp_path / "r").run([subset])


def test_a_damaged_file_is_named(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    about.run([Subset((0, 1))])
    [path] = (tmp_path / "r" / FOLDER).iterdir()
    path.write_text('{"losses": {"response": [1.0]}, "answers": null, "seconds": 1}')
    with pytest.raises(FinetraceError, match="cannot be read"):
        about.run([Subset((0, 1))])


def test_mean_losses_do_not_hang_on_the_batch(base_folder: Path) -> None:
    loaded = load(ModelSpec(str(base_folder), None, "float64", "cpu"))
    items, _ = Encoder(loaded.tokenizer).encode_all(make_examples(7))
    together = mean_losses(loaded.model, items)
    alone = torch.cat([mean_losses(loaded.model, [item]) for item in items])
    torch.testing.assert_close(together, alone, rtol=1e-9, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["processes", "ray"])
def test_every_engine_gives_the_same_retrainings(name: Any, base_folder: Path, tmp_path: Path) -> None:
    if name == "ray":
        pytest.importorskip("ray", reason="ray is not installed: pip install 'finetrace[cluster]'")
    subsets = [Subset((0, 1, 2)), Subset((3, 4)), Subset((5, 6, 7), 1)]
    here = make(base_folder, tmp_path / "here").run(subsets)
    there = make(base_folder, tmp_path / "there").run(subsets, workers=Engine(name, 2, threads=1))
    for one, other in zip(here, there, strict=True):
        assert np.array_equal(one.losses["response"], other.losses["response"])
    assert {path.name for path in (tmp_path / "here" / FOLDER).iterdir()} == {
        path.name for path in (tmp_path / "there" / FOLDER).iterdir()
    }


def test_a_worker_with_other_libraries_is_refused(base_folder: Path, tmp_path: Path) -> None:
    about = make(base_folder, tmp_path / "r")
    with pytest.raises(FinetraceError, match="a worker has another base model, precision"):
        retraining._retrain(about, Subset((0, 1)), expected="of other versions")
