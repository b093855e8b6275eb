"""`finetrace methods`: what there is, what it needs, what it means."""

from __future__ import annotations

from typing import Annotated

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method whole: equation, parameters, unit.")] = None,
) -> None:
    """List the attribution methods, or explain one of them."""
    import dataclasses
    import inspect

    from rich.console import Console
    from rich.table import Table

    from finetrace.attribution import available, make

    console = Console()
    if name is not None:
        method = make(name)
        typer.echo(f"{method.label}\n\n{inspect.getdoc(type(method))}\n")
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            typer.echo(f"  {field.name} = {getattr(method, field.name)}    ({_type(field.type)})")
        typer.echo(f"\nneeds: {', '.join(method.needs) or 'nothing'}\nunit:  {method.unit}")
        typer.echo("sign:  positive = proponent (training on it makes the answer more likely)")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    table.add_column("needs")
    table.add_column("what it is; positive = proponent")
    for key, cls in available().items():
        table.add_row(key + (" (control)" if cls.control else ""), ", ".join(cls.needs) or "-", cls.summary())
    console.print(table)
    typer.echo(
        "\nfinetrace methods NAME shows the equation and the parameters; --method NAME:parameter=value sets them."
    )


def _type(annotation: object) -> str:
    return str(annotation).replace("Annotated[", "").split(",")[0].strip("]")
