"""The verdict: which method to believe, against the controls and against each other, in plain words."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from finetrace.attribution.lexical import LEXICAL
from finetrace.evaluation.intervals import Estimate, paired_difference
from finetrace.evaluation.metrics import METRICS, Metric, auprc, relevance
from finetrace.tracing import Result, best, opening
from finetrace.units import many

TOP = 10
# answers that can tell methods apart: of five that all differ the same way a sign test has p = 2 * 2**-5 > 0.05
FEW = 6


def verdict(results: Sequence[Result], covered: int | None = None) -> list[str]:
    """Sentences, the headline first: by labels where there are any, else by agreement.

    `covered`: how many top examples coverage looks at, where not as many as the class has.
    """
    return _by_labels(results, covered) if any(result.metrics for result in results) else _by_agreement(results)


def _by_labels(results: Sequence[Result], covered: int | None) -> list[str]:
    chosen = best(results, controls=False)
    control = best(results, controls=True)
    if chosen is None:
        assert control is not None, "something was judged"
        return [f"Only controls were run; the best of them, {control.method.title}, has AUPRC {_plain(control)}."]
    relevant = _relevant(chosen)
    judged = np.flatnonzero(relevant.any(axis=1) & ~relevant.all(axis=1))
    labels = sorted({str(chosen.scores.queries[row].label) for row in judged})
    kind = labels[0] if len(labels) == 1 else "same-class"
    first = chosen.metrics["accuracy"].value
    n = chosen.metrics["accuracy"].n
    share = f"{chosen.metrics['coverage'].value:.0%}"
    found = (
        f"finds {share} of the {kind} rows at the top of its list"
        if covered is None
        else f"{share} of the first {many(covered, 'row')} of its list are {kind}"
    )
    sentences = [
        f"{chosen.method.title} ranks {_article(kind)} training example first for {first:.0%} of {many(n, 'answer')} and "
        f"{found}."
    ]
    lexical = [r for r in results if r.method.name in LEXICAL and r.metrics]
    if lexical:
        sentences.append(_against(chosen, _strongest(lexical), "the best lexical search"))
    random = next((result for result in results if result.method.name == "random"), None)
    if random is not None:
        sentences.append(_against(chosen, random, "random order"))
    unasked = [r for r in results if r.method.query_free and r.metrics]
    sentences += _unasked(chosen, unasked, labels)
    influence = [r for r in results if r.metrics and "gradients" in r.method.needs and not r.method.control]
    if influence and chosen not in influence:
        other = max(influence, key=lambda result: result.metrics["auprc"].value)
        sentences.append(_against(chosen, other, "the best gradient method"))
    sentences.append(
        "This says which methods find rows of the same class; whether removing the rows changes the answer, only "
        "retraining can say. The best of several methods is flattered by having been picked on these queries."
    )
    return sentences


def _by_agreement(results: Sequence[Result]) -> list[str]:
    chosen = opening(results)
    others = [r for r in results if r is not chosen]
    if not others:
        return [
            f"Only {chosen.method.title} was run, and no labels say what is right: compare it with another family "
            "(repsim, bm25, exact) before believing it."
        ]
    agreement = {r.method.title: _shared(chosen.scores.values, r.scores.values) for r in others}
    peers = [r for r in others if not r.method.control]
    lexical = [r for r in others if r.method.name in LEXICAL]
    k, n = min(TOP, len(chosen.scores.train)), len(chosen.scores.train)
    chance = k / n
    sentences = []
    if peers:
        best_peer = max(peers, key=lambda r: agreement[r.method.title])
        sentences.append(
            f"No labels say what is right. Of the top {k} rows of {chosen.method.title}, {best_peer.method.title} names "
            f"{agreement[best_peer.method.title]:.0%} too (chance {chance:.0%}); across the other methods that are no "
            f"controls the mean is {np.mean([agreement[r.method.title] for r in peers]):.0%}."
        )
    elif chosen.method.control:
        sentences.append(
            f"No labels say what is right, and only controls were run: what follows is of the top {k} rows of "
            f"{chosen.method.title}."
        )
    else:
        sentences.append(f"No labels say what is right, and {chosen.method.title} was compared with controls alone.")
    unasked = [r for r in others if r.method.query_free]
    for family, what, most in (
        (lexical, "Lexical search", "word overlap alone explains most of the list"),
        (unasked, "An order that never looks at the answer", "most of the list comes first whatever is asked"),
    ):
        if family:
            nearest = max(family, key=lambda r: agreement[r.method.title])
            share = agreement[nearest.method.title]
            explained = f"; {most}" if share - chance >= 0.6 * (1 - chance) > 0 else ""
            sentences.append(f"{what} ({nearest.method.title}) names {share:.0%} of them{explained}.")
    random = next((r for r in others if r.method.name == "random"), None)
    if random is not None:
        sentences.append(f"Random order names {agreement[random.method.title]:.0%} of them.")
    rank = [found for r in peers if np.isfinite(found := _spearman(chosen.scores.values, r.scores.values))]
    if rank:
        sentences.append(f"Rank correlation with the other methods over all rows: mean {np.mean(rank):.2f}.")
    return sentences


def _strongest(results: Sequence[Result], metric: str = "auprc") -> Result:
    """The best of some that are judged."""
    return max(results, key=lambda r: r.metrics[metric].value)


def _against(chosen: Result, other: Result, what: str) -> str:
    """One sentence on the paired difference of per-query AUPRC."""
    gap = _gap(chosen, other)
    numbers = f"AUPRC {_plain(chosen)} against {_plain(other)}"
    if not _tells(gap):
        few = "one query gives no interval" if gap.n == 1 else f"{gap.n} answers are too few to tell methods apart"
        return f"Against {what} ({other.method.title}): {numbers}; {few}."
    interval = f"difference {gap.value:+.2f} [{gap.low:+.2f}, {gap.high:+.2f}]"
    if gap.low > 0:
        word = "better than"
    elif gap.high < 0:
        word = "worse than"
    else:
        word = "not told apart from"
    return f"It is {word} {what} ({other.method.title}): {numbers}, {interval} over queries."


def _unasked(chosen: Result, others: Sequence[Result], labels: Sequence[str]) -> list[str]:
    """How far the answers have a part in the order: against those that never look at one."""
    if not others:
        return []
    sentences = [_against(chosen, _strongest(others), "the best order that never looks at the answer")]
    nearest = _strongest(others, "auroc")
    gap = _gap(chosen, nearest, METRICS["auroc"])
    if (gap.high if _tells(gap) else gap.value) < 0:
        values = " against ".join(f"{r.metrics['auroc'].value:.2f}" for r in (chosen, nearest))
        sentences.append(f"Over the whole list {nearest.method.title}, which never looks, is ahead: AUROC {values}.")
    gap = _gap(chosen, _strongest(others))
    if not (gap.low if _tells(gap) else gap.value) > 0:
        chance = "the lead over one that never looks at them may be chance"
        sentences.append(
            "So these labels do not show that the answers have a part in the order; "
            f"{chance if gap.value > 0 else 'one that never looks at them does as well'}."
        )
    elif len(labels) == 1:
        every = "All answers" if gap.n == len(chosen.scores.queries) else "All answers that count"
        sentences.append(
            f"{every} are {labels[0]}, so whether the rows of one answer are told from those of another is not tested."
        )
    return sentences


def _gap(chosen: Result, other: Result, metric: Metric = auprc) -> Estimate:
    """Paired difference of a metric's per-query values."""
    relevant = _relevant(chosen)
    return paired_difference(metric(chosen.scores.values, relevant), metric(other.scores.values, relevant))


def _tells(gap: Estimate) -> bool:
    """Whether the interval of a paired difference can tell two methods apart: of two answers it spans their two values."""
    return gap.n >= FEW and bool(np.isfinite(gap.low))


def _relevant(result: Result) -> NDArray[np.bool_]:
    """(m, n) which rows are of each query's class."""
    scores = result.scores
    return relevance([example.label for example in scores.train], [query.label for query in scores.queries])


def _plain(result: Result) -> str:
    return f"{result.metrics['auprc'].value:.2f}"


def _article(word: str) -> str:
    return f"an {word}" if word[:1].lower() in "aeiou" else f"a {word}"


def _shared(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Mean over queries of the share of a's top rows that are among b's, expected over all orders of what ties."""
    k = min(TOP, a.shape[1])
    return float((_among(a, k) * _among(b, k)).sum(1).mean() / k)


def _among(values: NDArray[np.float64], k: int) -> NDArray[np.float64]:
    """(m, n) chances of being among the first k: those that tie at the cut share the places left."""
    cut = -np.partition(-values, k - 1, axis=1)[:, k - 1 : k]  # (m, 1)
    above, tied = values > cut, values == cut
    return above + tied * (k - above.sum(1, keepdims=True)) / tied.sum(1, keepdims=True)


def _spearman(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Mean over queries of the rank correlation; constant rows have none and are left out."""
    values = []
    for x, y in zip(a, b, strict=True):
        p, q = rankdata(x), rankdata(y)
        if p.std() > 0 and q.std() > 0:
            values.append(float(np.corrcoef(p, q)[0, 1]))
    return float(np.mean(values)) if values else float("nan")
