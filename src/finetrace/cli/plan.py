"""`finetrace plan`: what an index will take, before it is built."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetrace.cli import index, options
from finetrace.units import duration, many, size

if TYPE_CHECKING:
    from rich.console import Console

    from finetrace.planning import Plan


def plan(
    workers: Annotated[
        int | None, typer.Option(min=1, help="Workers that would share the shards, each a machine like this one.")
    ] = None,
    batches: Annotated[int, typer.Option(min=2, help="Batches to measure, after one that warms up.")] = 4,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of the table.")] = False,
    results: Annotated[Path | None, typer.Option(help="Also write the JSON to this file, .json.")] = None,
    **arguments: Any,
) -> None:
    """Say what `finetrace index` with the same options would take: work, time, memory, disk. Nothing is kept.

    Rows, tokens, batches and disk are counted as the index will have them. Time and memory come from a few batches that are
    measured here, spread over the lengths, the largest among them; so this takes as long as loading, encoding and these.
    """
    from rich.console import Console

    from finetrace.planning.announce import Announcer
    from finetrace.planning.extrapolation import measure_plan
    from finetrace.planning.plan import plan_index

    options.new_files({"--results": (results, (".json",))})

    class Planner(Announcer):
        """Measures in place of the index, and stops there."""

        def begin(self, about: Any, collector: Any, encoded: Any) -> None:
            import time

            encoding = time.perf_counter() - self.began - self.startup
            counted = plan_index(about, collector, encoded, self.examples, self.labels, self.folder)
            self._warn(counted)
            numbers = tuple(dict.fromkeys((1, workers or 1)))
            times = {"startup": self.startup, "encoding": encoding}
            raise _Planned(
                measure_plan(counted, collector, encoded, self.folder, **times, workers=numbers, probes=batches)
            )

    try:
        index.index(**arguments, workers=workers, announcer=Planner(options.say))
    except _Planned as stopped:
        made = stopped.plan
    text = json.dumps(made.record(), indent=1)
    if results is not None:
        from finetrace.atomic import write_atomically

        write_atomically(results, (text + "\n").encode())
    if json_:
        typer.echo(text)
        return
    print_plan(made, Console())
    if (more := made.disk.peak - made.there) > made.free:
        options.say(f"the disk has {size(made.free)} free, less than it will need ({size(more)}).")


class _Planned(Exception):
    """The plan is made; nothing more is to be done."""

    def __init__(self, plan: Plan) -> None:
        super().__init__()
        self.plan = plan


command = options.command(plan, index.index)


def print_plan(plan: Plan, console: Console) -> None:
    """The plan as a table, 80 columns wide."""
    from rich.markup import escape
    from rich.table import Table

    from finetrace.reporting.cells import printable

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
    table.add_column("what", no_wrap=True)
    table.add_column("value", overflow="fold")
    for name, cells in _rows(plan):
        for i, cell in enumerate(cells):
            table.add_row(name if i == 0 else "", escape(printable(cell).replace("\n", " ")))
    console.print(table)


def _rows(plan: Plan) -> Sequence[tuple[str, list[str]]]:
    whole, left, measured = plan.whole, plan.left, plan.measured
    assert measured is not None
    padded = f"{whole.padded:,} computed, {whole.padding:.1%} of them padding"
    lines = [
        (
            "model",
            [
                f"{plan.about.model.name}",
                f"{plan.parameters / 1e6:,.0f} M weights, {plan.about.model.dtype}, {plan.device}",
            ],
        ),
        ("examples", [f"{whole.rows:,}" + (f", {left.rows:,} of them left to do" if left.rows < whole.rows else "")]),
        ("tokens", [f"{whole.tokens:,}   ({padded})", f"{whole.loss_tokens:,} in the loss"]),
        ("longest", [f"{plan.longest[1]:,} tokens, example {plan.longest[0]}"]),
        (
            "batches",
            [
                f"{len(whole.pieces):,} in {many(len(whole.shards), 'shard')} of {plan.about.rows_per_shard:,} examples at most"
            ],
        ),
        (
            "disk",
            [
                f"{size(plan.disk.total)}   ({size(plan.row.row_bytes())} an example; {size(plan.free)} free)",
                *(
                    [
                        f"{size(plan.disk.factors)} of it Kronecker factors; {size(plan.disk.parts)} more until they are done"
                    ]
                    if plan.labels is not None
                    else []
                ),
            ],
        ),
    ]
    if measured.memory is not None:
        memory = measured.memory
        peak = f"{size(memory.peak)} at most" + (f", {size(memory.device)} on the device" if memory.device else "")
        batches = "a batch" if plan.at_once == 1 else f"{plan.at_once} batches at a time"
        parts = f"weights {size(memory.weights)}, {batches} {size(memory.activations)}, a shard {size(memory.features)}"
        lines.append(("memory", [peak, parts]))
    if measured.timings:
        rate = left.tokens / measured.seconds
        times = [f"start-up {duration(plan.startup)}, encoding {duration(plan.encoding)}"]
        times.append(f"collecting {duration(measured.collecting)}, writing {duration(measured.writing)}")
        if plan.labels is not None:
            times.append(f"finishing Kronecker factors {duration(measured.finishing)}")
        lines.append(("time", [f"{duration(plan.workers[0].seconds)}   ({rate:,.0f} tokens/s)", *times]))
        spread = [each.tokens / each.seconds for each in measured.timings]
        slowest, fastest = f"{min(spread):,.0f}", f"{max(spread):,.0f}"
        rates = fastest if slowest == fastest else f"{slowest} to {fastest}"
        lines.append(("measured", [f"{many(len(spread), 'batch')}, {rates} tokens/s"]))
    for each in plan.workers[1:]:
        busy = f"{each.busy:.0%} of the workers' time in shards"
        idle = f", {each.workers - len(left.shards):,} idle" if each.workers > len(left.shards) else ""
        lines.append((f"{each.workers:,} workers", [f"{duration(each.seconds)}   ({busy}{idle})"]))
    return lines
