"""What people and programs read: errors in three parts, one versioned JSON object, consoles."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any, TextIO

import click
import msgspec

from backhaul.errors import BackhaulError
from backhaul.formats.quantities import format_duration, format_size
from backhaul.formats.redaction import redact_identities

if TYPE_CHECKING:
    from rich.console import Console

    from backhaul.model.drill import DrillRecord
    from backhaul.model.manifest import SourceRecord


class ReportedError(Exception):
    """An error whose JSON result was printed already: what is left is the text on stderr, and the status."""

    def __init__(self, error: BackhaulError) -> None:
        super().__init__(str(error))
        self.error = error


def console(file: TextIO | None = None) -> Console:
    """Return a console on stderr, or on the given file; colours only on a terminal, and not with NO_COLOR."""
    from rich.console import Console

    target = file or sys.stderr
    # In a pipe nothing is wrapped or cut: whoever reads it may be a program.
    return Console(file=target, highlight=False, emoji=False, soft_wrap=True, width=None if target.isatty() else 4096)


def print_json(kind: str, value: Any, *, file: TextIO | None = None) -> None:
    """Print one object: ``schema`` is ``backhaul.<kind>/1``, the rest is the value's fields."""
    document = {"schema": f"backhaul.{kind}/1", **msgspec.to_builtins(value)}
    text = msgspec.json.format(msgspec.json.encode(document), indent=2).decode()
    print(text, file=file or sys.stdout, flush=True)


def announce(verb: str, value: Any) -> None:
    """Tell the job that runs this command, if one does, what came of it."""
    from backhaul.operations.handover import RESULT, Handed, hand

    hand(Handed(kind=RESULT, verb=verb, document=msgspec.to_builtins(value)))


def error_document(error: BackhaulError) -> dict[str, Any]:
    """Return an error as the fields of a JSON object."""
    return {
        "error": type(error).__name__.removesuffix("Error"),
        "exit_code": error.exit_code,
        "what": redact_identities(error.what),
        "why": redact_identities(error.why),
        "next": redact_identities(error.todo),
        **error.details,
    }


def print_error(error: BackhaulError) -> None:
    """Print what, why and what next on stderr."""
    # Somebody may have put a secret where a name belongs: it is not said back to him, nor to the log.
    what, why, todo = (redact_identities(text) for text in (error.what, error.why, error.todo))
    click.echo(click.style("backhaul: ", fg="red", bold=True) + what, err=True, color=wants_color())
    for label, text in (("why", why), ("next", todo)):
        if text:
            lines = text.splitlines()
            click.echo(f"  {label + ':':6}{lines[0]}", err=True)
            for line in lines[1:]:
                click.echo(f"        {line}", err=True)


def wants_color() -> bool | None:
    """Return what ``click.echo`` takes as ``color``: never with NO_COLOR, else on a terminal."""
    import os

    return False if os.environ.get("NO_COLOR") else None


_NAMES = {
    "postgresql": "PostgreSQL",
    "mariadb": "MariaDB",
    "sqlite": "SQLite",
    "redis": "Redis",
    "dir": "directory",
}


def described(source: SourceRecord) -> str:
    """Say in a line what was backed up."""
    kind, _, physical = source.kind.partition("+")
    name = " ".join(part for part in (_NAMES.get(kind, kind), source.server) if part)
    tables = [table for database in source.databases for table in database.tables if table.kind == "table"]
    words = [name + (" (its files)" if physical else "")]
    if source.cluster and len(source.databases) != 1:
        words.append(f"{len(source.databases)} databases")
    elif source.databases:
        words.append(source.databases[0].name)
    if tables:
        counted = [table.rows for table in tables if table.rows is not None]
        if counted:
            of = f"{len(counted)} of " if len(counted) < len(tables) else ""
            words.append(f"{sum(counted)} rows in {of}{len(tables)} tables")
        else:
            words.append(f"{len(tables)} tables")
    words += [f"{key.replace('_', ' ')} {value}" for key, value in source.coordinates.items() if value]
    return ", ".join(words)


def drill_style(result: str | None) -> str:
    """Return the style of a drill's result."""
    return {"proved": "green", "failed": "bold red", None: "dim"}.get(result, "yellow")


def styled_drill(result: str | None, text: str) -> str:
    """Return a text in the colour of a drill's result, where ``click.echo`` prints it."""
    words = drill_style(result).split()
    return click.style(text, fg=words[-1] if words[-1] != "dim" else None, bold="bold" in words, dim="dim" in words)


def print_drill(record: DrillRecord) -> None:
    """Print what a drill found on stdout."""
    from rich.text import Text

    out = console(sys.stdout)
    marks = {"ok": ("✓", "green"), "failed": ("✗", "bold red"), "skipped": ("-", "yellow"), "untested": ("?", "yellow")}
    for check in record.checks:
        mark, style = marks.get(check.state, ("?", "yellow"))
        out.print(Text("  ").append(mark, style).append(f" {check.name}", "bold").append(f": {check.detail}"))
    line = Text(record.id, "bold").append("  ").append(record.result, drill_style(record.result))
    restored = sum(seconds for name, seconds in record.seconds.items() if name != "checks")
    if restored:
        line.append(f", {format_duration(restored)} to restore {format_size(record.raw_size)}")
    if record.server:
        line.append(f", in a server of {record.server}")
    out.print(line)
