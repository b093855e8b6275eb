"""`finetrace methods`: what there is, what it needs, what it means."""

from __future__ import annotations

import textwrap
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
        said = [method.label, "", *_wrapped(inspect.getdoc(type(method)) or "", console.width), ""]
        kinds = get_type_hints(type(method), include_extras=True)
        for field in dataclasses.fields(method):  # type: ignore[arg-type]
            value = getattr(method, field.name)
            known = value if value != "" else "that of the index"
            said += _hung(f"  {field.name} = {known}    ({_type(kinds[field.name])})", console.width, 6)
        said += [
            "",
            f"needs: {', '.join(method.needs) or 'nothing'}",
            *_hung(f"unit:  {method.unit}", console.width, 7),
        ]
        said += _hung("sign:  positive = proponent (training on it makes the answer more likely)", console.width, 7)
        typer.echo("\n".join(said))
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


def _wrapped(text: str, width: int) -> list[str]:
    """Paragraphs filled to the width; lines that are set in stay lines."""
    lines: list[str] = []
    for paragraph in text.split("\n\n"):
        together = paragraph if "\n " in f"\n{paragraph}" else " ".join(paragraph.split("\n"))
        for line in together.split("\n"):
            lines += _hung(line, width, len(line) - len(line.lstrip()))
        lines.append("")
    return lines[:-1]


def _hung(line: str, width: int, indent: int) -> list[str]:
    """One line as several that fit, all but the first set in."""
    return textwrap.wrap(line, width, subsequent_indent=" " * indent, break_on_hyphens=False)


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
