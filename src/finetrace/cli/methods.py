"""`finetrace methods`: what there is, what it needs, what it means."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer


def methods(
    name: Annotated[str | None, typer.Argument(help="Show one method whole: equation, parameters, unit.")] = None,
) -> None:
    """List the attribution methods, or explain one of them."""
    import dataclasses
    import inspect

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from finetrace.attribution import available, make

    console = Console()
    if name is not None:
        method = make(name)
        typer.echo(f"{method.label}\n\n{inspect.getdoc(type(method))}\n")
        kinds = get_type_hints(type(method), include_extras=True)
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            value = getattr(method, field.name)
            known = value if value != "" else "that of the index"
            typer.echo(f"  {field.name} = {known}    ({_type(kinds[field.name])})")
        typer.echo(f"\nneeds: {', '.join(method.needs) or 'nothing'}\nunit:  {method.unit}")
        typer.echo("sign:  positive = proponent (training on it makes the answer more likely)")
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("method")
    table.add_column("needs")
    table.add_column("what it is; positive = proponent")
    for key, cls in available().items():
        table.add_row(key + (" (control)" if cls.control else ""), ", ".join(cls.needs) or "-", escape(cls.summary()))
    console.print(table)
    typer.echo(
        "\nfinetrace methods NAME shows the equation and the parameters;\n--method NAME:parameter=value sets them."
    )


def _type(annotation: Any) -> str:
    """The values a parameter takes: the words of a choice, or the kind of number with its bounds."""
    if get_origin(annotation) is Annotated:
        inner, *rules = get_args(annotation)
        bounds = [
            f"{sign} {getattr(m, key)}"
            for rule in rules
            for m in getattr(rule, "metadata", [rule])
            for key, sign in (("gt", ">"), ("ge", ">="))
            if hasattr(m, key)
        ]
        return " ".join([inner.__name__, *bounds])
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    return getattr(annotation, "__name__", str(annotation))
