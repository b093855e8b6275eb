"""The exhibit of `approximation`: what is run, its table and its figure."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from finetrace.index.manifest import write_atomically
from finetrace.studies.approximation import (
    DAMPINGS,
    Size,
    Trained,
    dense_fisher,
    dense_hessian,
    dual_fisher,
    dual_hessian,
    errors,
    methods,
    residual,
    timed,
)
from finetrace.studies.study import Outcome, Say, Setting, Study

FULL = (Size(10, 32), Size(20, 32), Size(20, 48), Size(10, 100), Size(20, 100), Size(100, 32), Size(1000, 32))
LARGEST = Size(4995, 32)  # with five to ask about, all that ship
QUICK = (Size(10, 16), Size(20, 16), Size(20, 100))
PRINTED = {Size(10, 32): 46, Size(10, 100): 233, Size(20, 100): 880}  # seconds of the exact influence in the paper
DENSE = "exact Fisher, dense"
HESSIAN_ROWS = 10_000  # the dual Hessian factors a matrix of ten rows a point


def run(folder: Path, setting: Setting, say: Say) -> Outcome:
    """Every size, damping and seed; a finished one is found again."""
    sizes = QUICK if setting.quick else (*FULL, LARGEST)
    records: list[dict[str, Any]] = []
    for seed in range(setting.seeds):
        for size in sizes:
            for damping in DAMPINGS:
                path = folder / "parts" / f"{size.points}-{size.side}-{damping}-{seed}.json"
                if not path.exists():
                    say(f"{size.points} points, {size.parameters:,} parameters, {damping} damping, seed {seed}")
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_atomically(path, json.dumps(_measure(size, damping, seed)).encode())
                records += json.loads(path.read_text(encoding="utf-8"))
    return Outcome(records, _tables(records, sizes), {"approximation": _figure(records, sizes)}, _reading(records))


def _measure(size: Size, damping: str, seed: int) -> list[dict[str, Any]]:
    at = Trained.of(size, damping, seed)
    about = {"points": size.points, "parameters": size.parameters, "damping": damping, "seed": seed}
    about |= {"lambda": at.damping}
    records: list[dict[str, Any]] = []
    truths: dict[str, Tensor] = {"fisher": dual_fisher(at)}
    if 10 * size.points <= HESSIAN_ROWS:
        truths["hessian"] = dual_hessian(at)
    dense = {"fisher": dense_fisher, "hessian": dense_hessian}
    if seed == 0 and size.dense_fits():  # minutes at the larger sizes, so once
        for name, solve in dense.items():
            found, seconds = timed(partial(solve, at), 1)
            truths.setdefault(name, found)
            here = {"method": f"exact {name.capitalize()}, dense", "truth": name, "bytes": size.dense_bytes}
            records.append({**about, **here, "seconds": seconds, **errors(truths[name], found)})
    if not size.dense_fits():
        here = {"method": "exact Fisher, dense", "truth": "fisher", "bytes": size.dense_bytes, "seconds": None}
        records.append({**about, **here})
    for name in ("fisher", "hessian"):
        if 10 * size.points <= HESSIAN_ROWS or name == "fisher":
            left = residual(at, name)
            records.append(
                {**about, "method": f"exact {name.capitalize()}, dual", "truth": "by products", "relative": left}
            )
    contenders = dict(methods())
    if 10 * size.points <= HESSIAN_ROWS:
        contenders["exact Hessian, dual"] = dual_hessian
    for method, compute in contenders.items():
        found, seconds = timed(partial(compute, at))
        records += [
            {**about, "method": method, "truth": name, "seconds": seconds, **errors(found, truth)}
            for name, truth in truths.items()
        ]
    return records


def _mean(records: Sequence[dict[str, Any]], key: str, **where: Any) -> tuple[float, float, float] | None:
    """Mean, least and most over seeds; `None` where nothing was measured."""
    values = [
        r[key] for r in records if r.get(key) is not None and all(r.get(name) == value for name, value in where.items())
    ]
    return (float(np.mean(values)), min(values), max(values)) if values else None


def _tables(records: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> dict[str, Any]:
    """One a damping: errors against both truths and the time, methods x sizes."""
    tables = {}
    for damping in DAMPINGS:
        heads = ["points / parameters", "method"]
        heads += [f"{name}, {truth}" for truth in ("Fisher", "Hessian") for name in ("L2", "relative L2", "rank")]
        heads.append("seconds")
        lines = []
        for size in sizes:
            here = [r for r in records if (r["points"], r["parameters"]) == (size.points, size.parameters)]
            here = [r for r in here if r["damping"] == damping]
            for method in dict.fromkeys(r["method"] for r in here):
                cells = []
                for truth in ("fisher", "hessian"):
                    where = {"method": method, "truth": truth}
                    cells += [_short(_mean(here, key, **where)) for key in ("l2", "relative", "spearman")]
                seconds = _mean(here, "seconds", method=method)
                time = f"{seconds[0]:.2g}" if seconds else f"needs {size.dense_bytes / 2**30:.0f} GiB"
                lines.append([f"{size.points} / {size.parameters:,}", method, *cells, time])
        tables[f"approximation-{damping}"] = (heads, lines)
    return tables


def _short(value: tuple[float, float, float] | None) -> str:
    return "-" if value is None else f"{value[0]:.2g}"


def _figure(records: Sequence[dict[str, Any]], sizes: Sequence[Size]) -> Any:
    """Errors on the left, seconds on the right, both logarithmic; the paper's exact influence is marked."""
    from matplotlib.figure import Figure

    names = [r["method"] for r in records if r["truth"] == "fisher"]
    order = [name for name in dict.fromkeys(names) if not name.endswith("dense")]
    figure = Figure(figsize=(7.0, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    marks = ("o", "s", "^", "D", "v", "P", "X", "*")
    down = {name: place for place, name in enumerate([*order, DENSE])}
    for size, mark, shade in zip(sizes, marks, np.linspace(0.0, 0.7, len(sizes)), strict=False):
        here = [r for r in records if (r["points"], r["parameters"]) == (size.points, size.parameters)]
        style = {"marker": mark, "color": str(shade), "markersize": 4.5, "linestyle": "none", "capsize": 2}
        for name, place in down.items():
            for axis, key, where in ((left, "relative", {"truth": "fisher"}), (right, "seconds", {})):
                value = _mean(here, key, method=name, damping="paper", **where)
                if value is None:
                    continue
                spread = [[max(0.0, value[0] - value[1])], [max(0.0, value[2] - value[0])]]
                label = f"{size.points} / {size.parameters:,}" if (axis, place) == (right, 0) else None
                axis.errorbar(max(value[0], 1e-15), place, xerr=spread, label=label, **style)
        if size in PRINTED:
            right.plot(PRINTED[size], down[DENSE], marker=mark, color="white", markeredgecolor="black", markersize=6)
    for axis, head in ((left, "relative L2 error against the\nexact empirical Fisher"), (right, "seconds, 5 queries")):
        axis.set_xscale("log")
        axis.set_xlabel(head, fontsize=8)
        axis.grid(axis="x", color="0.9")
        axis.tick_params(labelsize=8)
    left.set_yticks(list(down.values()), list(down))
    left.invert_yaxis()
    right.plot(
        [],
        [],
        marker="o",
        color="white",
        markeredgecolor="black",
        linestyle="none",
        label="exact, as printed in\nthe paper",
    )
    figure.legend(
        loc="outside lower center",
        ncols=3,
        fontsize=7,
        title="points / parameters; bars from the least to the most of the seeds",
        title_fontsize=7,
    )
    return figure


def _reading(records: Sequence[dict[str, Any]]) -> list[str]:
    """What the dual solve changes, in numbers."""
    dense = [r for r in records if r["method"] == DENSE and r["seconds"]]
    lines = []
    for record in dense:
        if record["damping"] != "paper":
            continue
        same = {key: record[key] for key in ("points", "parameters", "damping")}
        dual = _mean(records, "seconds", method="exact Fisher, dual", truth="fisher", **same)
        assert dual is not None
        lines.append(
            f"{record['points']} points, {record['parameters']:,} parameters: the dense solve takes {record['seconds']:.2g} s, "
            f"the dual one {dual[0]:.2g} s ({record['seconds'] / dual[0]:,.0f} times less); they differ by "
            f"{record['relative']:.1e}."
        )
    largest = max(dense, key=lambda r: r["parameters"], default=None)
    widest = max(
        (r for r in records if r["method"] == "exact Fisher, dual" and r.get("seconds")), key=lambda r: r["parameters"]
    )
    if largest is not None and largest["parameters"] < widest["parameters"]:
        same = {key: widest[key] for key in ("points", "parameters", "damping")}
        dual = _mean(records, "seconds", method="exact Fisher, dual", truth="fisher", **same)
        assert dual is not None
        lines.append(
            f"At {widest['parameters']:,} parameters the dual solve takes {dual[0]:.2g} s; the dense one, of "
            f"{largest['parameters']:,} parameters only, takes {largest['seconds'] / dual[0]:,.0f} times as long."
        )
    checked = [r for r in records if r["truth"] == "by products"]
    worst = max(r["relative"] for r in checked)
    lines.append(
        f"Put back into the system by products, the dual solutions leave at most {worst:.1e} of the right-hand side."
    )
    return lines


def _cost(setting: Setting) -> str:
    return "about 2 minutes" if setting.quick else "about 15 minutes"


APPROXIMATION = Study(
    "approximation",
    "Fig. 3, Table 5",
    "error and time of approximate influences against exact ones, digits and one linear layer",
    15,
    2,
    run,
)
