"""Write docs/reference/cli.md from the program itself: python scripts/write_reference.py [--check].

Every command with its options, defaults and help, and every method with its parameters, so that the page cannot say anything
else than the program does. `--check` writes nothing and fails where the page is not up to date.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from finetrace.attribution import available
from finetrace.cli import app

PAGE = Path(__file__).parent.parent / "docs" / "reference" / "cli.md"
HEAD = """# Command line

```bash
finetrace [--version] [--help] COMMAND ...
```

{commands}

Results go to standard output; progress and messages go to standard error. Exit codes are under
[resume, and read errors](../how-to/resume-and-errors.md#exit-codes).
Environment: `FINETRACE_CACHE` is the folder of the converted embedded model, by default `~/.cache/finetrace`.

This page is made from the program: `python scripts/write_reference.py`.
"""
KINDS = {"str": "TEXT", "int": "INTEGER", "float": "FLOAT", "Path": "PATH", "list": "TEXT"}
METHODS = """## Methods

| method | needs | parameters and defaults |
|---|---|---|
"""


def page() -> str:
    """The whole page."""
    commands = list(_commands(typer.main.get_command(app), "finetrace"))
    listed = "\n".join(f"| [`{name}`](#{_anchor(name)}) | {_first(command.help)} |" for name, command in commands)
    parts = [HEAD.format(commands=f"| command | does |\n|---|---|\n{listed}")]
    parts += [_section(name, command) for name, command in commands]
    lines = []
    for name, cls in available().items():
        fields = [f"`{field.name}={field.default}`" for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        control = " (control)" if cls.control else ""
        lines.append(f"| `{name}`{control} | {', '.join(cls.needs) or 'nothing'} | {', '.join(fields) or 'none'} |")
    return "\n".join(parts) + "\n" + METHODS + "\n".join(lines) + "\n"


def _commands(command: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Every command that does something, by its whole name."""
    children = getattr(command, "commands", None)
    if children is None:
        yield name, command
        return
    for key, child in children.items():
        yield from _commands(child, f"{name} {key}")


def _section(name: str, command: Any) -> str:
    usage = " ".join([name, *(_argument(p) for p in command.params if p.param_type_name == "argument"), "[OPTIONS]"])
    lines = [f"## {name}", "", (command.help or "").strip(), "", "```bash", usage, "```", ""]
    lines += ["| option | default | meaning |", "|---|---|---|"]
    for parameter in command.params:
        if parameter.name == "help":
            continue
        shown = f"`{_argument(parameter)}`" if parameter.param_type_name == "argument" else _option(parameter)
        text = (parameter.help or "").replace("|", r"\|").replace("\n", " ")
        lines.append(f"| {shown} | {_default(parameter)} | {text} |")
    return "\n".join([*lines, ""])


def _argument(parameter: Any) -> str:
    name = parameter.name.upper().rstrip("_")
    name = f"{name}..." if parameter.nargs == -1 else name
    return name if parameter.required else f"[{name}]"


def _option(parameter: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in parameter.opts)
    return flags if parameter.is_flag else f"{flags} {KINDS[parameter.type_descriptor.annotation.__name__]}"


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False):
        return "off"
    value = parameter.default
    return "" if value in (None, (), []) or callable(value) else f"`{value}`"


def _first(text: str | None) -> str:
    return (text or "").strip().split("\n")[0]


def _anchor(name: str) -> str:
    return name.replace(" ", "-")


def main() -> None:
    """Write, or check."""
    text = page()
    if "--check" in sys.argv:
        if PAGE.read_text(encoding="utf-8") != text:
            sys.exit(f"{PAGE} is not what the program says; run python scripts/write_reference.py")
        return
    PAGE.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
