"""The same work with finetrace, kronfluence, dattri and bergson: python benchmarks/peers/run.py [--rows 96] [--rounds 2] ...

Each tool runs in its own environment (`install.sh` makes them), as its documentation advises and once more tuned, one process
after another with the same number of threads; rounds are interleaved. Every tool sees the same token ids, the same adapter and
the same loss. The time is that of the work with the model loaded; memory is the most that the process held meanwhile, the model
included. Prints a table in Markdown a work and precision, with the agreement of the scores with finetrace's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from common import CANNOT, WORKS
from numpy.typing import NDArray
from table import OURS, Run, configurations, table

HERE = Path(__file__).resolve().parent
PEERS = ("kronfluence", "dattri", "bergson")
Inputs = dict[str, Any]  # of `inputs.py`: model, adapter, rows, queries, tokens


def main() -> None:
    """Make the inputs, run everything, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=96)
    parser.add_argument("--queries", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32"])
    parser.add_argument("--work", nargs="+", choices=list(WORKS), default=list(WORKS))
    parser.add_argument("--tools", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--environments", type=Path, default=HERE.parents[1] / "build" / "peers")
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "build" / "peers-runs")
    parser.add_argument("--limit", type=int, default=3600, help="seconds after which one run is ended")
    parser.add_argument(
        "--keep", action="store_true", help="take runs from --out that are there already, after a run cut short"
    )
    args = parser.parse_args()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    given = make_inputs(out, args.rows, args.queries)
    tools = [(OURS, False), *((tool, tuned) for tool in args.tools for tuned in (False, True))]
    runs: list[Run] = []
    for number in range(args.rounds):
        for dtype in args.dtype:
            for work in args.work:
                for tool, tuned in tools:
                    folder = out / f"{number}-{dtype}-{work}-{tool}{'-tuned' if tuned else ''}"
                    runs.append(once(Run(tool, tuned, work, dtype, folder), given, args))
                    print(f"round {number + 1}: {describe(runs[-1])}", file=sys.stderr, flush=True)
    print(
        f"{args.rows} rows ({given['tokens']:,} tokens), {args.queries} queries, {args.threads} threads, "
        f"medians of {args.rounds} rounds\n"
    )
    for dtype in args.dtype:
        for work in args.work:
            print(f"{WORKS[work]}; {dtype}:\n")
            print("\n".join(table(runs, work, dtype, exact(runs, work, given, args))), end="\n\n")
    print("\n".join(configurations(runs)))


def make_inputs(out: Path, rows: int, queries: int) -> Inputs:
    """What every tool is given, made in a process of its own."""
    subprocess.run([sys.executable, str(HERE / "inputs.py"), str(out), str(rows), str(queries)], check=True)
    return json.loads((out / "inputs.json").read_text(encoding="utf-8"))


def exact(runs: list[Run], work: str, given: Inputs, args: argparse.Namespace) -> NDArray[np.float64]:
    """finetrace's scores in float32, from a run of its own where the rounds had none."""
    wanted = (OURS, work, "float32", "")
    for run in runs:
        if (run.tool, run.work, run.dtype, run.failed) == wanted:
            return run.scores
    run = once(Run(OURS, False, work, "float32", args.out.resolve() / f"exact-{work}"), given, args)
    runs.append(run)
    return run.scores


def once(run: Run, given: Inputs, args: argparse.Namespace) -> Run:
    """Run a tool once; the same run, with the reason where it failed."""
    python = Path(sys.executable) if run.tool == OURS else args.environments.resolve() / run.tool / "bin" / "python"
    if not python.exists():
        return replace(run, failed=f"not installed: there is no {python}")
    if args.keep and (run.folder / "result.json").exists():
        return replace(run, failed=f"cannot: {run.found['cannot']}") if "cannot" in run.found else run
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "result.json").unlink(missing_ok=True)
    command = [str(python), str(HERE / f"with_{run.tool}.py"), *(["--tuned"] if run.tuned else [])]
    for name in ("model", "adapter", "rows", "queries"):
        command += [f"--{name}", str(given[name])]
    command += ["--work", run.work, "--dtype", run.dtype, "--threads", str(args.threads), "--out", str(run.folder)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(args.threads))
    with (run.folder / "log.txt").open("w", encoding="utf-8") as log:
        try:
            code = subprocess.run(command, stdout=log, stderr=log, env=environment, timeout=args.limit).returncode
        except subprocess.TimeoutExpired:
            return replace(run, failed=f"ended after {args.limit} s")
    if code == CANNOT:
        return replace(run, failed=f"cannot: {run.found['cannot']}")
    if code:
        last = (run.folder / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        return replace(run, failed=f"failed with status {code}: {''.join(last)[:200]}")
    return run


def describe(run: Run) -> str:
    """One line for whoever waits."""
    name = f"{run.dtype} {run.work} {run.tool}{' tuned' if run.tuned else ''}"
    if run.failed:
        return f"{name}: {run.failed}"
    stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in run.found["seconds"].items())
    return f"{name}: {stages}, {run.found['peak_mb']:,.0f} MB"


if __name__ == "__main__":
    main()
