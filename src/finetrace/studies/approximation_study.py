"""The exhibit of `approximation`: what is run, its tables and its figure."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from finetrace.curvature.fisher import FisherDual
from finetrace.errors import FinetraceError
from finetrace.fingerprint import of_text
from finetrace.studies.approximation import (
    DAMPINGS,
    DECAY,
    QUERIES,
    TRUTHS,
    Size,
    Trained,
    Truth,
    dense,
    dual,
    errors,
    methods,
    put_back,
    timed,
)
from finetrace.studies.pieces import Piece, kept, wordless
from finetrace.studies.plots import COLUMN, MARKS
from finetrace.studies.records import where
from finetrace.studies.study import Outcome, Setting, Study

FULL = (Size(10, 32), Size(20, 32), Size(20, 48), Size(10, 100), Size(20, 100), Size(100, 32), Size(1000, 32))
LARGEST = Size(4995, 32)  # with five to ask about, all that ship
QUICK = (Size(10, 16), Size(20, 16), Size(20, 100))
PRINTED = {Size(10, 32): 46, Size(10, 100): 233, Size(20, 100): 880}  # seconds of the exact influence in the paper
DENSE, DUAL, FISHER = "exact, dense", "exact, dual", "exact, of the Fisher"
NAMES: dict[Truth, str] = {"fisher": "empirical Fisher", "hessian": "Hessian"}


def pieces(folder: Path, setting: Setting) -> list[Piece]:
    """One a size, damping and seed."""
    if importlib.util.find_spec("curvlinops") is None:
        raise FinetraceError(
            "solutions are checked by curvlinops, which is not installed; run: pip install 'finetrace[studies]'"
        )
    constants = of_text(repr((DAMPINGS, DECAY, QUERIES, list(methods()))))
    found = []
    for seed, size, damping in product(range(setting.seeds), _sizes(setting), DAMPINGS):
        name = f"{size.points}-{size.side}-{damping}-{seed}-{constants}"
        what = f"{size.points} points, {size.parameters:,} parameters, {damping} damping, seed {seed}"
        found.append(kept(folder, name, what, wordless(measure, size, damping, seed), seed))
    return found


def _sizes(setting: Setting) -> tuple[Size, ...]:
    return QUICK if setting.quick else (*FULL, LARGEST)


def outcome(setting: Setting, found: Sequence[Sequence[dict[str, Any]]]) -> Outcome:
    """Of the records of whole seeds, the first among them."""
    records, sizes = list(chain.from_iterable(found)), _sizes(setting)
    tables = {f"approximation-{damping}": _table(records, sizes, damping) for damping in DAMPINGS}
    tables["approximation-checked"] = _checked(records)
    return Outcome(records, tables, {"approximation": _figure(records, sizes)}, _reading(records))


def measure(size: Size, damping: str, seed: int) -> list[dict[str, Any]]:
    """Every method against both meanings of exact: errors are to the dense solve where there is one, else to the dual."""
    at = Trained.of(size, damping, seed)
    about = {"points": size.points, "parameters": size.parameters, "damping": damping, "seed": seed}
    about |= {"lambda": at.damping}
    records: list[dict[str, Any]] = []
    for truth in TRUTHS:
        here = {**about, "truth": truth}
        exact: Tensor | None = None
        if size.dense_fits():
            exact, seconds = timed(partial(dense, at, truth))
            records.append({**here, "method": DENSE, "bytes": size.dense_bytes, "seconds": seconds})
        else:
            records.append({**here, "method": DENSE, "bytes": size.dense_bytes, "seconds": None})
        if truth == "fisher" or size.hessian_fits():
            found, seconds = timed(partial(dual, at, truth))
            records.append(
                {**here, "method": DUAL, "seconds": seconds, **(errors(found, exact) if exact is not None else {})}
            )
            records[-1] |= put_back(at, truth, found)
            exact = found if exact is None else exact
        if exact is None:
            continue
        contenders = methods()
        if truth == "hessian":
            contenders[FISHER] = lambda at, truth: FisherDual(at.products, at.ridge(truth)).products()
            if not size.hessian_fits():
                contenders = {name: each for name, each in contenders.items() if not name.startswith("CG")}
        for name, compute in contenders.items():
            found, seconds = timed(partial(compute, at, truth))
            records.append({**here, "method": name, "seconds": seconds, **errors(found, exact)})
    return records


def _mean(records: Sequence[dict[str, Any]], key: str) -> tuple[float, float, float] | None:
    """Mean, least and most over seeds; `None` where nothing was measured."""
    values = [r[key] for r in records if r.get(key) is not None]
    return (float(np.mean(values)), min(values), max(values)) if values else None


def _table(records: Sequence[dict[str, Any]], sizes: Sequence[Size], damping: str) -> tuple[list[str], list[list[str]]]:
    """Errors against both truths, and the time against the empirical Fisher, methods x sizes."""
    heads = ["points / parameters", "method"]
    heads += [f"{name}, {NAMES[truth]}" for truth in TRUTHS for name in ("L2", "relative L2", "after scaling", "rank")]
    heads.append(f"seconds, {NAMES['fisher']}")
    lines = []
    for size in sizes:
        here = where(records, points=size.points, parameters=size.parameters, damping=damping)
        for method in dict.fromkeys(r["method"] for r in here):
            mine = where(here, method=method)
            cells = [
                _short(_mean(where(mine, truth=truth), key))
                for truth in TRUTHS
                for key in ("l2", "relative", "scaled", "spearman")
            ]
            # the exact Fisher stands for the Hessian alone
            seconds = _mean(where(mine, truth="fisher") or mine, "seconds")
            time = _short(seconds) if seconds else f"needs {size.dense_bytes / 2**30:.0f} GiB"
            lines.append([f"{size.points} / {size.parameters:,}", method, *cells, time])
    return heads, lines


def _checked(records: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """What dual solutions leave of the right-hand side, by products, and how far they are from dense ones."""
    heads = ["points / parameters", "damping", "exact", "dual to dense", "left by products", "scores by products"]
    keys = ("points", "parameters", "damping", "truth")
    lines = []
    for points, parameters, damping, truth in dict.fromkeys(
        tuple(r[k] for k in keys) for r in where(records, method=DUAL)
    ):
        here = where(records, method=DUAL, points=points, parameters=parameters, damping=damping, truth=truth)
        worst = [max((r[key] for r in here if key in r), default=None) for key in ("relative", "residual", "scores")]
        cells = ["-" if value is None else f"{value:.1e}" for value in worst]
        lines.append([f"{points} / {parameters:,}", damping, NAMES[truth], *cells])
    return heads, lines


def _short(value: tuple[float, float, float] | None) -> str:
    """The mean, and where seeds differ the least and the most."""
    if value is None:
        return "-"
    mean, low, high = (f"{each:,.0f}" if 100 <= each < 10_000 else f"{each:.2g}" for each in value)
    return mean if low == high else f"{mean} ({low} to {high})"


PANELS: tuple[tuple[str, Truth, str], ...] = (  # a key of the records, against which exact, and the axis in words
    ("scaled", "fisher", "error after scaling, to the\nexact empirical Fisher,\nL2, share of its norm"),
    ("scaled", "hessian", "error after scaling, to the\nexact Hessian,\nL2, share of its norm"),
    ("seconds", "fisher", "seconds, 5 queries,\nempirical Fisher"),
    ("spearman", "fisher", "rank correlation with the\nexact empirical Fisher"),
    ("spearman", "hessian", "rank correlation with the\nexact Hessian"),
    ("l2", "fisher", "error to the exact\nempirical Fisher,\nL2, in units of a score"),
)


def _figure(records: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> Any:
    """Errors and rank correlations against both truths, and seconds; the paper's damping, and its exact influence marked."""
    from matplotlib.figure import Figure

    records = where(records, damping="paper")
    names = dict.fromkeys(r["method"] for r in records if r["method"] not in (DENSE, DUAL, FISHER))
    down = {name: place for place, name in enumerate([*names, FISHER, DUAL, DENSE])}
    figure = Figure(figsize=(COLUMN, 8.6), layout="constrained")
    axes = list(figure.subplots(2, 3, sharey=True).flat)
    timing = axes[[key for key, *_ in PANELS].index("seconds")]
    for number, (size, mark) in enumerate(zip(sizes, MARKS, strict=False)):
        here = where(records, points=size.points, parameters=size.parameters)
        style = {
            "marker": mark,
            "color": str(0.7 * number / max(1, len(sizes) - 1)),
            "markersize": 4,
            "linestyle": "none",
        }
        aside = 0.1 * (number - len(sizes) / 2)  # so that sizes do not hide one another
        for (name, place), (axis, (key, truth, _)) in product(down.items(), zip(axes, PANELS, strict=True)):
            mine = where(here, method=name, truth=truth)
            value = _mean(mine, key)
            hollow = value is None and name == DUAL and key == "scaled"
            value = _mean(mine, "residual") if hollow else value
            if value is None:
                continue
            reach = [[max(0.0, value[0] - value[1])], [max(0.0, value[2] - value[0])]]  # a mean of equals rounds
            more = {"markerfacecolor": "white"} if hollow else {}
            middle = value[0] if key == "spearman" else max(value[0], 1e-16)
            axis.errorbar(middle, place + aside, xerr=reach, elinewidth=0.5, **style, **more)
        timing.plot([], [], label=f"{size.points} / {size.parameters:,}", **style)
        if size in PRINTED:
            timing.plot(
                PRINTED[size], down[DENSE] + aside, marker=mark, color="white", markeredgecolor="black", markersize=6
            )
    for axis, (key, _, head) in zip(axes, PANELS, strict=True):
        if key != "spearman":
            axis.set_xscale("log")
        axis.set_xlabel(head, fontsize=6.5)
        axis.grid(axis="x", color="0.9")
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=6.5)
    axes[0].set_yticks(list(down.values()), list(down))
    axes[0].invert_yaxis()
    hollow_style = {"marker": "o", "markerfacecolor": "white", "color": "black", "linestyle": "none"}
    timing.plot([], [], markersize=4, label="no dense solve: what is left by products", **hollow_style)
    timing.plot([], [], markersize=6, label="exact, seconds printed in the paper", **hollow_style)
    title = "points / parameters; bars from the least to the most of the seeds"
    figure.legend(loc="outside lower center", ncols=4, fontsize=6, title=title, title_fontsize=7)
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the dual solve changes, in numbers: medians over the seeds and the largest difference."""
    lines = []
    paper = where(records, damping="paper")
    solved = [r for r in where(paper, method=DENSE) if r["seconds"]]
    for points, parameters, truth in dict.fromkeys((r["points"], r["parameters"], r["truth"]) for r in solved):
        same = {"points": points, "parameters": parameters, "truth": truth}
        # a machine with less memory free has no dense solve in some seeds, and no difference there
        if others := [r for r in where(paper, method=DUAL, **same) if "relative" in r]:
            took, took_dual = _seconds(where(solved, **same)), _seconds(others)
            apart = max(r["relative"] for r in others)
            need = where(solved, **same)[0]["bytes"] / 2**30
            lines.append(
                f"{points} points, {parameters:,} parameters, {NAMES[truth]}: the dense solve takes {took:.3g} s and "
                f"{need:.2g} GiB, the dual one {took_dual:.2g} s ({_ratio(took / took_dual)}); they "
                f"differ by {apart:.1e} at most."
            )
    fisher = where(paper, truth="fisher")
    most = max(r["parameters"] for r in where(solved, truth="fisher"))
    wide = max((r["parameters"], r["points"]) for r in where(fisher, method=DUAL))
    if most < wide[0]:
        need = where(records, method=DENSE, parameters=wide[0])[0]["bytes"] / 2**30
        took = _seconds(where(solved, truth="fisher", parameters=most))
        took_dual = _seconds(where(fisher, method=DUAL, parameters=wide[0], points=wide[1]))
        lines.append(
            f"At {wide[1]} points and {wide[0]:,} parameters a dense solve needs {need:.0f} GiB; the dual one takes "
            f"{took_dual:.2g} s, and the dense one of {most:,} parameters {took / took_dual:,.0f} times as long."
        )
    worst = {key: max(r[key] for r in where(records, method=DUAL)) for key in ("residual", "scores")}
    lines.append(
        f"Put back into the system by products, dual solutions leave at most {worst['residual']:.1e} of a gradient, and "
        f"their scores differ from the dual scores by at most {worst['scores']:.1e}."
    )
    return lines


def _seconds(records: Sequence[dict[str, Any]]) -> float:
    """The median over seeds."""
    return float(np.median([r["seconds"] for r in records]))


def _ratio(value: float) -> str:
    """Of the dense solve's time to the dual one's, in words."""
    return f"{value:,.0f} times less" if value >= 1.5 else f"{1 / value:.2g} times that"


APPROXIMATION = Study(
    "approximation",
    "Fig. 3, Table 5",
    "error and time of approximate influences against exact ones, digits and one linear layer",
    25,
    1,
    pieces,
    outcome,
    spread="timed",
    whole_seeds=True,
    digits="float64",
)
