"""`finetrace doctor`: is this machine ready, and what can it do?"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from finetrace.cli import options


def doctor(
    model: options.Model = "embedded",
    adapter: options.Adapter = None,
    device: options.Device = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    quick: Annotated[bool, typer.Option("--quick", help="Leave the model out.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Look at packages, processor, devices, disk, dtypes and kernels, and whether gradients hang on the batch.

    Every line begins with ok, note or problem, and says what to do. Exit code 1 if something is broken without which
    finetrace does not work (a problem), else 0.
    """
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from finetrace.doctor import Finding, examine

    if quick:
        idle = {"--model": None if model == "embedded" else model, "--adapter": adapter}
        idle["--trust-remote-code"] = "given" if trust_remote_code else None
        options.refuse_given(idle, "with --quick no model is loaded; leave out --quick")
    console, findings = Console(), []
    styles = {"ok": "green", "note": "yellow", "problem": "bold red"}

    def show(each: Finding) -> None:
        line = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), show_header=False)
        for width in (7, 17):
            line.add_column(width=width, no_wrap=True)
        line.add_column(overflow="fold")
        line.add_row(f"[{styles[each.state]}]{each.state}[/]", each.name, escape(each.what))
        if each.remedy:
            line.add_row("", "", f"[dim]->[/] {escape(each.remedy)}")
        console.print(line, highlight=False)

    with options.quiet_libraries():
        for finding in examine(model, adapter, device, trust_remote_code, quick):
            findings.append(finding)
            if not json_:
                show(finding)
    broken = [each for each in findings if each.state == "problem"]
    if json_:
        typer.echo(json.dumps({"findings": [each.record() for each in findings], "problems": len(broken)}, indent=1))
    else:
        notes = sum(each.state == "note" for each in findings)
        console.print(f"{len(findings)} looked at, {notes} notes, {len(broken)} problems", highlight=False)
    if broken:
        raise typer.Exit(1)
