"""The linear datamodeling score against what is known of linear models and of chance."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from finetrace.errors import FinetraceError
from finetrace.evaluation.lds import agreement, compare, draw_subsets, leave_out, per_query, reachable


def world(noise: float, seeds: int = 2, n: int = 30, s: int = 40, m: int = 6) -> Any:
    """Losses that are minus the sum of true effects, with noise of each retraining's own."""
    rng = np.random.default_rng(0)
    effects, members = rng.normal(size=(m, n)), draw_subsets(n, s, 0.5)
    losses = -(effects @ members.T).T[None] + noise * rng.normal(size=(seeds, s, m))
    return effects, members, losses


def test_subsets_have_their_share_and_are_drawn_anew_by_seed() -> None:
    members = draw_subsets(21, 50, 0.5, 3)
    assert members.shape == (50, 21)
    assert set(members.sum(1)) == {10}
    assert np.array_equal(members, draw_subsets(21, 50, 0.5, 3))
    assert not np.array_equal(members, draw_subsets(21, 50, 0.5, 4))
    assert np.array_equal(members[:7], draw_subsets(21, 7, 0.5, 3))  # more of them go on where fewer ended
    assert np.abs(members.mean(0) - 0.5).max() < 0.3
    with pytest.raises(FinetraceError, match="leaves 0 in"):
        draw_subsets(4, 2, 0.1)
    with pytest.raises(FinetraceError, match="leaves 4 in"):
        draw_subsets(4, 2, 0.99)


def test_no_subset_is_drawn_twice() -> None:
    members = draw_subsets(6, 20, 0.5)
    assert len(np.unique(members, axis=0)) == 20
    assert set(members.sum(1)) == {3}
    assert np.array_equal(members[:7], draw_subsets(6, 7, 0.5))
    with pytest.raises(FinetraceError, match="6 rows have 20 subsets of 3, not 21; ask for fewer"):
        draw_subsets(6, 21, 0.5)


def test_true_effects_predict_a_linear_world_exactly_and_their_opposite_the_opposite() -> None:
    effects, members, losses = world(0.0)
    np.testing.assert_allclose(per_query(effects, members, losses), 1)
    np.testing.assert_allclose(per_query(7 * effects + 3, members, losses), 1)  # neither scale nor offset counts
    np.testing.assert_allclose(per_query(-effects, members, losses), -1)
    np.testing.assert_allclose(agreement(losses), 1)


def test_sums_of_equal_scores_tie_in_whatever_order_they_were_added() -> None:
    """Scores with few values: predictions in float64 differ by rounding where in whole numbers they are the same."""
    rng = np.random.default_rng(4)
    whole, members = rng.integers(0, 3, size=(8, 40)), leave_out(40, 40)
    losses = rng.normal(size=(1, 40, 8))
    thirds = per_query(whole * (0.1 / 3), members, losses)
    np.testing.assert_allclose(thirds, per_query(whole, members, losses), rtol=0, atol=1e-12)
    order = rng.permutation(40)
    mixed = per_query(whole[:, order] * 0.7, members[:, order], losses)
    np.testing.assert_allclose(mixed, per_query(whole * 0.7, members, losses), rtol=0, atol=1e-12)


def test_the_score_is_the_mean_over_seeds_of_spearman() -> None:
    effects, members, losses = world(3.0, seeds=3)
    guess = effects + np.random.default_rng(1).normal(size=effects.shape)
    for q, found in enumerate(per_query(guess, members, losses)):
        each = [spearmanr(-(members @ guess[q]), seed[:, q]).statistic for seed in losses]
        assert found == pytest.approx(np.mean(each))
    for q, found in enumerate(agreement(losses)):
        each = [spearmanr(losses[a, :, q], losses[b, :, q]).statistic for a, b in ((0, 1), (0, 2), (1, 2))]
        assert found == pytest.approx(np.mean(each))


def test_methods_are_compared_on_the_same_draws() -> None:
    effects, members, losses = world(4.0, s=60)
    rng = np.random.default_rng(2)
    methods = {"true": effects, "same": 2 * effects, "near": effects + rng.normal(size=effects.shape)}
    methods["chance"] = rng.normal(size=effects.shape)
    found = compare(methods, members, losses, resamples=200)
    assert found.lds["true"].value == pytest.approx(np.mean(per_query(effects, members, losses)))
    assert all(each.low < each.value < each.high for each in found.lds.values())
    same = found.differences["same"]
    assert (same.value, same.low, same.high) == (0, 0, 0)
    assert found.differences["chance"].high < 0
    assert found.agreement is not None
    assert "true" in found.sure
    assert found.lds["chance"].low < 0.2
    assert found.lds["true"].value > found.lds["near"].value > found.lds["chance"].value
    assert compare({"true": effects}, members, losses[:1], resamples=20).agreement is None


def test_queries_whose_losses_do_not_vary_are_left_out() -> None:
    effects, members, losses = world(1.0)
    losses[:, :, 2] = 0.5
    found = per_query(effects, members, losses)
    assert np.isnan(found[2])
    rest = np.delete(found, 2)
    assert compare({"m": effects}, members, losses, resamples=20).lds["m"].value == pytest.approx(rest.mean())


@pytest.mark.parametrize("noise", [2.0, 4.0, 8.0])
def test_true_effects_reach_what_is_reachable_and_lie_above_the_agreement_of_seeds(noise: float) -> None:
    rng = np.random.default_rng(1)
    effects, members = rng.normal(size=(60, 30)), draw_subsets(30, 200, 0.5)
    losses = -(effects @ members.T).T[None] + noise * rng.normal(size=(2, 200, 60))
    reached = float(per_query(effects, members, losses).mean())
    assert reached == pytest.approx(reachable(losses), abs=0.05)
    assert reached > float(agreement(losses).mean()) + 0.02


def test_where_seeds_do_not_agree_nothing_is_known_of_what_is_possible() -> None:
    effects, members, losses = world(0.5)
    assert compare({"true": effects}, members, losses, resamples=50).reachable == reachable(losses)
    noise = np.random.default_rng(3).normal(size=losses.shape)
    found = compare({"true": effects}, members, noise, resamples=50)
    assert found.agreement is not None
    assert found.agreement.low <= 0
    assert found.reachable is None


def test_silence_about_a_query_is_worth_nothing() -> None:
    effects, members, losses = world(0.5, m=4)
    wrong, silent = effects.copy(), effects.copy()
    wrong[3], silent[3] = -effects[3], 0
    found = compare({"wrong": wrong, "silent": silent, "true": effects}, members, losses, resamples=50)
    assert per_query(silent, members, losses)[3] == 0
    assert found.lds["silent"].value == pytest.approx(0.75 * np.mean(per_query(effects, members, losses)[:3]))
    assert found.lds["wrong"].value < found.lds["silent"].value < found.lds["true"].value
    assert found.lds["silent"].n == 4


def test_the_best_of_many_guesses_is_rarely_called_sure() -> None:
    sure = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        members, losses = draw_subsets(30, 30, 0.5, seed), rng.normal(size=(2, 30, 10))
        guesses = {f"m{i}": rng.normal(size=(10, 30)) for i in range(10)}
        sure += bool(compare(guesses, members, losses, resamples=60).sure)
    assert sure <= 4


def test_a_few_subsets_do_not_make_a_guess_sure() -> None:
    """Six subsets under one seed, and answers whose losses rise and fall together."""
    sure = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        members = draw_subsets(30, 6, 0.5, seed)
        losses = rng.normal(size=(1, 6, 1)) + 0.3 * rng.normal(size=(1, 6, 15))
        guesses = {f"m{i}": rng.normal(size=(1, 30)) + 0.3 * rng.normal(size=(15, 30)) for i in range(8)}
        sure += bool(compare(guesses, members, losses, resamples=60).sure)
    assert sure <= 6


def test_three_subsets_ordered_right_are_no_proof() -> None:
    """A guess orders three of them right once in six times, whatever their resamples say."""
    rng, members, sure = np.random.default_rng(5), draw_subsets(20, 3, 0.5), 0
    for _ in range(60):
        losses = rng.normal(size=(1, 3, 1)) + 0.01 * rng.normal(size=(2, 3, 4))  # of queries that are alike
        found = compare({"guess": np.repeat(rng.normal(size=(1, 20)), 4, axis=0)}, members, losses, resamples=40)
        sure += bool(found.sure)
    assert sure == 0


def test_many_subsets_show_what_is_there() -> None:
    effects, members, losses = world(0.1, s=200)
    found = compare({"true": effects}, members, losses, resamples=20)
    assert found.sure == {"true"} and found.reachable is not None


def test_seeds_that_agree_on_three_subsets_make_nothing_possible() -> None:
    rng, members, known = np.random.default_rng(5), draw_subsets(20, 3, 0.5), 0
    for _ in range(60):
        noise = rng.normal(size=(2, 3, 1)) + 0.01 * rng.normal(size=(2, 3, 4))
        known += compare({"guess": rng.normal(size=(4, 20))}, members, noise, resamples=40).reachable is not None
    assert known == 0


def test_what_cannot_be_scored_is_said() -> None:
    effects, members, losses = world(1.0)
    with pytest.raises(FinetraceError, match="two seeds"):
        agreement(losses[:1])
    with pytest.raises(FinetraceError, match="shape"):
        per_query(effects, members, losses[0])
    with pytest.raises(FinetraceError, match="are not those of 6 queries and 30 rows"):
        per_query(effects[:1], members, losses)
    with pytest.raises(FinetraceError, match="at least 3"):
        per_query(effects, members[:2], losses[:, :2])
    losses[0, 0, 0] = np.nan
    with pytest.raises(FinetraceError, match="not finite"):
        per_query(effects, members, losses)


def test_over_rows_left_out_singly_the_score_is_the_rank_correlation_with_what_that_does() -> None:
    rng = np.random.default_rng(3)
    scores, rise = rng.normal(size=(4, 9)), rng.normal(size=(4, 9))
    members = leave_out(9, 50)
    assert members.shape == (9, 9)
    assert (members.sum(1) == 8).all()
    found = per_query(scores, members, rise.T[None])
    assert found == pytest.approx([spearmanr(a, b).statistic for a, b in zip(scores, rise, strict=True)])
    few = leave_out(9, 4, seed=1)
    assert few.shape == (4, 9)
    assert len({int(np.flatnonzero(~row)[0]) for row in few}) == 4
    assert (leave_out(9, 4, seed=1) == few).all()
