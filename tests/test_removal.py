"""Which rows are removed, and what is made of the losses afterwards."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import t as student

from finetrace.errors import FinetraceError
from finetrace.evaluation.intervals import Estimate
from finetrace.evaluation.removal import CLASS, RANDOM, Effect, Group, Removal, effects, groups, order, removals
from finetrace.studies.records import where
from finetrace.validation.run import _Found, _records
from finetrace.validation.tables import _curves, lines_of


def test_queries_are_grouped_by_class_or_all_together() -> None:
    assert groups(["a", "b", "a"]) == [Group("a", (0, 2)), Group("b", (1,))]
    assert groups(["a", "b", "a"], most=1) == [Group("a", (0, 2))]
    assert groups([None, "b"]) == [Group(None, (0, 1))]
    assert groups(["a", "a"]) == [Group("a", (0, 1))]  # whose own class is a control all the same


def test_the_rows_of_a_group_come_by_their_mean_score() -> None:
    scores = np.array([[1.0, 5.0, 0.0, 3.0], [9.0, 0.0, 0.0, 1.0], [0.0, 0.0, 9.0, 0.0]])
    assert order(scores, Group("", (0, 1))).tolist() == [0, 1, 3, 2]
    assert order(scores, Group("", (2,))).tolist() == [2, 0, 1, 3]  # equals as they stand in the data


def test_each_method_chance_and_the_class_take_out_as_many() -> None:
    scores = {"m": np.arange(24.0).reshape(2, 12), "minus": -np.arange(24.0).reshape(2, 12)}
    labels = ["a"] * 4 + ["b"] * 8
    found = removals(scores, groups(["a", "b"]), [2, 4], labels, draws=3)
    assert all(len(each.rows) == len(set(each.rows)) in (2, 4) for each in found)
    tops = {(each.what, each.group.name, len(each.rows)): each.rows for each in found}
    assert tops["m", "a", 2] == (11, 10)
    assert tops["minus", "b", 4] == (0, 1, 2, 3)
    mine = [each for each in found if each.what == CLASS and each.group.name == "a"]
    assert len(mine) == 4  # three draws of two, and the four there are
    assert all(set(each.rows) <= {0, 1, 2, 3} for each in mine)
    chance = [each.rows for each in found if each.what == RANDOM and len(each.rows) == 4]
    assert len(set(chance)) == len(chance) == 6
    assert found == removals(scores, groups(["a", "b"]), [2, 4], labels, draws=3)
    assert Removal("m", 0, Group("", (0,)), (3, 1)).kept(5) == (0, 2, 4)
    with pytest.raises(FinetraceError, match="removing 12 of 12"):
        removals(scores, groups(["a"]), [12], labels)


def test_a_class_that_is_too_small_or_unknown_has_no_removal_of_its_own() -> None:
    scores = {"m": np.zeros((1, 6))}
    assert not [each for each in removals(scores, groups(["a"]), [3], ["a", "a", *"bbbb"]) if each.what == CLASS]
    assert not [each for each in removals(scores, groups([None]), [3], [None] * 6) if each.what == CLASS]


def test_effects_are_rises_over_all_rows_beside_those_of_chance() -> None:
    rng = np.random.default_rng(0)
    asked = [Group("a", (0, 1)), Group("b", (2,))]
    done = [
        Removal(what, draw, group, (0, 1)) for group in asked for what, draw in (("m", 0), (RANDOM, 0), (RANDOM, 1))
    ]
    before = rng.random((2, 3))
    rises = {"m": 0.5, RANDOM: 0.1}
    after = np.stack([before + rises[each.what] + (0.02 * each.draw if each.what == RANDOM else 0) for each in done])
    for place, each in enumerate(done):  # what a removal does to queries that it was not made for is left aside
        others = [q for q in range(3) if q not in each.group.queries]
        after[place][:, others] = 99
    found = {each.what: each for each in effects(done, after, before)}
    assert found["m"].change.value == pytest.approx(0.5)
    assert found[RANDOM].change.value == pytest.approx(0.11)
    assert found[RANDOM].over_random is None
    over = found["m"].over_random
    assert over is not None
    assert over.value == pytest.approx(0.39)
    # two groups of two draws each, 0.02 apart: s = 0.02 / sqrt 2 with 2 degrees of freedom, and 1 + 1/2 of its square a group,
    # which weigh 2/3 and 1/3
    reach = float(student.ppf(0.975, 2)) * 0.02 / 2**0.5 * (1.5 * (4 / 9 + 1 / 9)) ** 0.5
    assert over.high - over.value == pytest.approx(reach)
    one = [each for each in done if each.draw == 0]
    alone = next(each for each in effects(one, after[[each.draw == 0 for each in done]], before) if each.what == "m")
    assert alone.over_random is not None
    assert np.isnan(alone.over_random.low)  # one draw says nothing of how draws differ
    with pytest.raises(FinetraceError, match="shape"):
        effects(done, after[1:], before)


def test_what_is_beyond_chance_is_the_change_minus_that_of_chance_where_classes_differ_in_size() -> None:
    asked, rises = [Group("a", (0, 1, 2)), Group("b", (3,))], {("m", "a"): 0.1, ("m", "b"): 1.0, (RANDOM, "b"): 0.15}
    done = [
        Removal(what, draw, group, (0, 1)) for group in asked for what, draw in (("m", 0), (RANDOM, 0), (RANDOM, 1))
    ]
    before = np.zeros((2, 4))
    after = np.stack([before + rises.get((each.what, each.group.name or ""), 0) for each in done])
    found = {each.what: each for each in effects(done, after, before)}
    assert found["m"].change.value == pytest.approx(0.325)
    assert found[RANDOM].change.value == pytest.approx(0.0375)
    assert found["m"].over_random is not None
    assert found["m"].over_random.value == pytest.approx(0.2875)


def test_draws_that_all_comply_do_not_make_one_refusal_more_than_chance() -> None:
    """Every answer still counts after five random removals; that the sixth would leave them all too is not known."""
    group = Group("a", tuple(range(10)))
    done = [Removal("m", 0, group, (0,)), *(Removal(RANDOM, draw, group, (1,)) for draw in range(5))]

    def beside(refusals: int, step: float) -> tuple[Effect, Estimate]:
        after = np.full((6, 1, 10), -1.0)  # minus the share that counts, as its fall is to be a rise
        after[0, 0, :refusals] = 0
        mine = effects(done, after, np.full((1, 10), -1.0), step=step, resamples=10)[0]
        assert mine.over_random is not None
        return mine, mine.over_random

    reach = float(student.ppf(0.975, 4)) * 0.1 * 1.2**0.5  # a verdict is a tenth of the rate
    for refusals, above in ((0, False), (1, False), (3, False), (4, True), (10, True)):
        mine, over = beside(refusals, 1.0)
        assert over.value == pytest.approx(refusals / 10)
        assert over.value - over.low == pytest.approx(reach)
        assert over.high == pytest.approx(min(1, over.value + reach))
        assert mine.sure is above
    none = beside(0, 1.0)[0].change
    assert none.value == 0
    assert -none.low == pytest.approx(none.high)  # a rate that did not move may fall or rise for other queries
    assert none.high == pytest.approx(3.841 / (10 + 3.841), abs=1e-3)
    mine, over = beside(10, 0.0)
    assert np.isnan(over.low)
    assert not mine.sure


def test_a_methods_removals_are_held_against_those_of_the_first() -> None:
    """Queries rise by very different amounts, and by 0.2 more without the rows of the second: pairing sees that alone."""
    group = Group("a", tuple(range(6)))
    kinds = [("one", 2), ("two", 2), (RANDOM, 2), (CLASS, 2), ("two", 3)]
    done = [Removal(what, 0, group, tuple(range(count))) for what, count in kinds]
    rises = np.arange(6.0)
    more = {"one": 0.0, "two": 0.2, RANDOM: -1, CLASS: 0.5}
    after = np.stack([np.tile(rises + more[what], (2, 1)) for what, _ in kinds])
    after += np.array([0.01, -0.01])[:, None] * np.array([1, 2, 1, 1, 1])[:, None, None]
    found = {(each.what, each.count): each for each in effects(done, after, np.zeros((2, 6)))}
    assert found[RANDOM, 2].over_first is found[CLASS, 2].over_first is found["one", 2].over_first is None
    second = found["two", 2].over_first
    assert second is not None
    assert second.value == pytest.approx(0.2)
    assert 0.18 < second.low < 0.2 < second.high < 0.22
    assert found["two", 3].over_first is None  # the first that removed three


def test_intervals_of_losses_have_no_bounds_and_those_of_rates_have_theirs() -> None:
    """Two methods that do the same to every query: of rates others may differ by 1 at most, of losses nothing is known."""
    group = Group("a", tuple(range(4)))
    done = [Removal(what, 0, group, (place,)) for place, what in enumerate(("one", "two", RANDOM))]
    after = np.zeros((3, 1, 4))
    for step in (0.0, 1.0):
        second = effects(done, after, after[0] - step, step=step, resamples=10)[1]
        assert second.over_first is not None
        assert second.over_first.value == 0
        ends = second.over_first.low, second.over_first.high
        if step:
            unseen = 3.8415 / (4 + 3.8415)  # of four verdicts that agree, by Wilson's interval
            assert ends == pytest.approx((-unseen, unseen), abs=1e-4)
            assert second.change.value == 1
        else:
            assert np.isnan(ends).all()
            assert np.isnan([second.change.low, second.change.high]).all()


def test_random_scores_are_rarely_more_than_random_rows() -> None:
    """Rows differ in what they do to all queries together; a method that names rows at random is one more draw."""
    rng = np.random.default_rng(0)
    above, worlds = 0, 300
    for _ in range(worlds):
        rows, queries = rng.normal(0, 0.01, 60), rng.normal(0, 0.01, (30, 60))
        found = removals({"m": rng.normal(size=(30, 60))}, groups(["a"] * 30), [6], ["b"] * 60, draws=5)
        after = np.stack([(rows + queries)[:, list(each.rows)].sum(1) for each in found])[:, None].repeat(2, 1)
        effect = next(each for each in effects(found, after, np.zeros((2, 30)), resamples=10) if each.what == "m")
        assert effect.over_random is not None
        above += effect.over_random.low > 0
    assert above / worlds < 0.06  # nominally 2.5%


def test_the_best_of_many_random_methods_is_rarely_called_sure() -> None:
    """Nine methods name rows at random: the best of them has an interval above chance in one world of six."""
    rng = np.random.default_rng(0)
    alone, sure, worlds = 0, 0, 100
    for _ in range(worlds):
        rows = rng.normal(0, 0.01, 60)
        methods = {f"m{i}": rng.normal(size=(3, 60)) for i in range(9)}
        found = removals(methods, groups(["a"] * 3), [6], ["b"] * 60, draws=5)
        after = np.array([rows[list(each.rows)].sum() for each in found])[:, None, None].repeat(3, 2)
        done = [each for each in effects(found, after, np.zeros((1, 3)), resamples=10) if each.what != RANDOM]
        best = max(done, key=lambda each: each.change.value)
        assert best.over_random is not None
        alone += best.over_random.low > 0
        sure += best.sure
    assert alone / worlds > 0.1
    assert sure / worlds < 0.06


def test_one_method_is_sure_where_its_own_interval_is_above_chance() -> None:
    group = Group("a", (0,))
    done = [Removal("m", 0, group, (0,)), Removal(RANDOM, 0, group, (1,)), Removal(RANDOM, 1, group, (2,))]
    for rise, wanted in ((0.5, True), (0.11, False)):
        after = np.array([rise, 0.1, 0.12])[:, None, None]
        [mine, chance] = effects(done, after, np.zeros((1, 1)))
        assert mine.over_random is not None
        assert mine.sure is wanted is (mine.over_random.low > 0)
        assert not chance.sure


def test_a_table_says_of_how_many_answers_rows_of_the_class_are() -> None:
    """One class has as many rows as go, the other has not: nothing is known of what its own would do to its answers."""
    labels, scores = ["a", "b", "b"], np.arange(15.0).reshape(3, 5)
    gone = removals({"m": scores}, groups(labels), [2], ["a", "b", "b", "b", "b"], draws=2)
    after = np.random.default_rng(0).normal(size=(len(gone), 1, 3))
    records = _records(_Found(drops=effects(gone, after, np.zeros((1, 3)))), {}, {}, {"m": "method"})
    assert [(r["spec"], r["answers"]) for r in records] == [("m", 3), (RANDOM, 3), (CLASS, 2)]
    assert [line[0] for line in lines_of(records, "drop")] == ["method", RANDOM, f"{CLASS} (2 of 3 answers)"]
    [legend] = _curves(where(records, measure="drop"), "nats", 1).legends
    assert [each.get_text() for each in legend.get_texts()] == ["method", RANDOM, f"{CLASS}\n(2 of 3 answers)"]
