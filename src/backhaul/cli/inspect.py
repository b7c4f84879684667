"""``backhaul list``, ``show``, ``verify`` and ``clean``."""

from __future__ import annotations

import datetime as dt
import shlex
import sys
from collections.abc import Callable

import click
import msgspec

from backhaul.cli.command import option_json
from backhaul.cli.keys import load_identities, option_identity
from backhaul.cli.output import ReportedError, console, described, drill_style, print_json, styled_drill, wants_color
from backhaul.errors import IntegrityError, UsageError
from backhaul.formats.quantities import format_duration, format_size, parse_duration

# Of a database with thousands of tables the largest are named.
_MOST_TABLES = 10
_NEEDS = ("extensions", "roles", "tablespaces", "engines", "definers")
_JSON_HELP = "Print one JSON object on stdout."


@click.command(
    "list",
    short_help="The backups of a series, newest last.",
    epilog="""\b
Examples:
  backhaul list s3://acme/db7/orders
  backhaul list --long /mnt/usb/orders""",
)
@click.argument("series")
@click.option("--long", "-l", is_flag=True, help="Read each manifest too: raw size, ratio, duration.")
@option_json(_JSON_HELP)
def list_(series: str, long: bool, as_json: bool) -> None:
    """List the committed backups of SERIES, newest last."""
    from backhaul.operations.inspect import list_backups

    result = list_backups(series, long=long)
    if as_json:
        print_json("list", result)
        return
    if not result.backups:
        console().print(f"No committed backup in {series} (a name that was mistyped looks the same).", markup=False)
        return
    drilled = any(backup.drill for backup in result.backups)
    header = ["backup", "age", "stored", *(["raw", "ratio", "took"] if long else [])]
    right = len(header) - 1
    header += ["last drill"] * drilled
    now = dt.datetime.now(dt.UTC)
    rows = []
    for backup in result.backups:
        age = (now - dt.datetime.fromisoformat(backup.started)).total_seconds()
        cells = [backup.id, format_duration(max(0.0, age)), format_size(backup.stored_size)]
        if long:
            raw = backup.raw_size
            cells += [
                format_size(raw) if raw is not None else "?",
                f"{raw / backup.stored_size:.2f}" if raw is not None and backup.stored_size else "?",
                format_duration(backup.seconds) if backup.seconds is not None else "?",
            ]
        if drilled:
            cells.append(f"{backup.drill} {(backup.drilled or '')[:10]}" if backup.drill else "-")
        rows.append(cells)
    widths = [max(len(cells[column]) for cells in [header, *rows]) for column in range(len(header))]

    def line(cells: list[str], last: str, style: Callable[[int, str], str]) -> str:
        placed = (
            cell.rjust(width) if 0 < column <= right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(cells, widths, strict=True))
        )
        return "  ".join((*(style(column, cell) for column, cell in enumerate(placed)), last))

    # (rich takes 3 s for a table of 10,000 lines.)
    lines = [line(header, click.style("streams", bold=True), lambda _, cell: click.style(cell, bold=True))]
    for backup, cells in zip(result.backups, rows, strict=True):
        streams = ", ".join(backup.streams) + " (encrypted)" * backup.encrypted
        drill = backup.drill
        lines.append(
            line(
                cells,
                click.style(backup.problem, fg="red") if backup.problem else streams,
                lambda column, cell, drill=drill: styled_drill(drill, cell) if column > right else cell,  # type: ignore[misc]
            )
        )
    click.echo("\n".join(lines), color=wants_color())


@click.command(
    short_help="One backup, from its manifest.",
    epilog="""\b
Examples:
  backhaul show s3://acme/db7/orders
  backhaul show s3://acme/db7/orders@2026-11-20 --json""",
)
@click.argument("series", metavar="SERIES[@WHEN]")
@option_json(_JSON_HELP)
def show(series: str, as_json: bool) -> None:
    """Show one backup: what wrote it, when, its streams, sizes and hashes."""
    from backhaul.formats.hold import end_of
    from backhaul.formats.manifest import to_document
    from backhaul.operations.inspect import show_backup

    result = show_backup(series)
    manifest = result.manifest
    if as_json:
        beside = {name: msgspec.to_builtins(getattr(result, name)) for name in ("drills", "holds", "unreadable_holds")}
        print_json("show", {"series": result.series, "manifest": to_document(manifest), **beside})
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")

    def row(label: str, text: str) -> None:
        table.add_row(label, Text(text))

    row("backup", f"{result.series}/{manifest.id}")
    row(
        "made",
        f"{manifest.started} to {manifest.finished} on {manifest.host}, by backhaul {manifest.tool.version}",
    )
    source = manifest.source
    if source is not None:
        row("source", described(source))
        where = f"at {source.address}" if source.address else ""
        row("", f"{where}, state of {source.state_of}, taken in {format_duration(source.seconds)}".lstrip(", "))
        for tool, number in source.tools.items():
            row("", f"by {tool} {number}")
        for database in source.databases:
            largest = sorted(database.tables, key=lambda table: -table.size)[:_MOST_TABLES]
            size_ = f", {format_size(database.size)}" if database.size else ""
            row("database" if source.kind != "dir" else "directory", f"{database.name}{size_}")
            for table_ in largest:
                counted = (
                    f", {table_.rows} {'names' if table_.kind == 'file' else 'rows'}" if table_.rows is not None else ""
                )
                size = f", {format_size(table_.size)}" if table_.size else ""
                row("", f"{table_.kind} {table_.name}{size}{counted}")
            if len(database.tables) > len(largest):
                row("", f"and {len(database.tables) - len(largest)} more (--json names all)")
            for kind, needed in database.needs.items():
                if kind in _NEEDS:
                    row("", f"needs {kind}: {', '.join(needed)}")
        for remark in source.remarks:
            row("remark", remark)
    for drill in result.drills:
        took = sum(seconds for name, seconds in drill.seconds.items() if name != "checks")
        took_words = f", {format_duration(took)} to restore" if took else ""
        row("drill", f"{drill.started}: {drill.result}{took_words}{f': {drill.why}' if drill.why else ''}")
    for hold in result.holds:
        end = end_of(hold)
        ends = f"until {hold.until}" if end is not None else "without end"
        over = " (it is over)" if end is not None and end <= dt.datetime.now(dt.UTC) else ""
        who = " on ".join(name for name in (hold.by, hold.host) if name)
        words = f"since {hold.since}, {ends}{over}" + (f", by {who}" if who else "")
        row("hold", words + (f": {hold.reason}" if hold.reason else ""))
    for key in result.unreadable_holds:
        row("hold", f"{key} can't be read: the backup is not pruned")
    for producer in manifest.producers:
        how = shlex.join(producer.command) if producer.command else "stdin (how its writer ended is not known)"
        if producer.kind in ("file", "protocol"):
            how = f"{'the file' if producer.kind == 'file' else 'asked'} {producer.path}"
        row("producer", how)
        ended = f"exit {producer.exit_status}, " if producer.exit_status is not None else ""
        row(
            "",
            ended + f"{format_duration(producer.seconds)}" + "".join(f", saw {m!r}" for m in producer.markers),
        )
    for stream in manifest.streams:
        ratio = stream.raw.size / stream.stored.size if stream.stored.size else 1.0
        objects = stream.objects
        several = len(objects) > 1
        where = f"{len(objects)} objects, {objects[0].object} to {objects[-1].object}" if several else objects[0].object
        row("stream", f"{stream.name}, in {where}")
        hashed = "keyed BLAKE3" if stream.encryption is not None else "BLAKE3"
        row("", f"raw    {format_size(stream.raw.size)} ({stream.raw.size} bytes), {hashed} {stream.raw.blake3}")
        row(
            "",
            f"stored {format_size(stream.stored.size)} ({stream.stored.size} bytes), BLAKE3 {stream.stored.blake3}",
        )
        if stream.encryption is not None:
            recipients = stream.encryption.recipients
            row("", f"encrypted with age, for the key{'s' * (len(recipients) > 1)} {', '.join(recipients)}")
            row("", "not checked whether this page is authentic: backhaul verify --identity KEYFILE does that")
        framed = stream.codec.name == "zstd"
        decoders = ["age -d -i KEYFILE"] * (stream.encryption is not None) + ["zstd -d"] * framed
        how = f"{stream.frames} frames, ratio {ratio:.2f}" if framed else "stored as it is"
        if several:
            decoders.insert(0, f"cat {stream.object}*")
        elif decoders:
            decoders[0] += f" {objects[0].object}"
        row("", how + (f"; decode without Backhaul: {' | '.join(decoders)}" if decoders else ""))
    console(sys.stdout).print(table)


@click.command(
    short_help="Is what is stored what was pushed?",
    epilog="""\b
Examples:
  backhaul verify s3://acme/db7/orders
  backhaul verify --deep s3://acme/db7/orders@2026-11-20
  backhaul verify --deep --identity orders.key s3://acme/db7/orders
  backhaul verify /backups s3://acme/mirrors/db7""",
)
@click.argument("places", metavar="SERIES[@WHEN] | [DIR] MIRROR", nargs=-1, required=True)
@click.option("--deep", is_flag=True, help="Read, decode and hash every byte.")
@option_identity(
    "A key file, for a backup that is encrypted: --deep needs it; without --deep it checks the manifest's MAC. "
    "'-' for stdin. Repeatable."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress; the result and errors only.")
@option_json(_JSON_HELP)
def verify(places: tuple[str, ...], deep: bool, identity: tuple[str, ...], quiet: bool, as_json: bool) -> None:
    """Check one backup against its manifest, or a mirror against its records and DIR; without --deep, without
    downloading anything.

    Ends with status 1 if anything is wrong.
    """
    from backhaul.cli.mirror import verify_mirror
    from backhaul.formats.location import names_backup
    from backhaul.operations.kind import is_mirror

    if len(places) > 2:
        raise UsageError("verify takes one backup, or DIR and MIRROR", " ".join(places), "See: backhaul verify --help")
    series, directory = places[-1], places[0] if len(places) == 2 else None
    if directory is not None or (not names_backup(series) and is_mirror(series)):
        verify_mirror(directory, series, deep=deep, quiet=quiet, as_json=as_json)
        return
    from backhaul.cli.progress import pull_progress
    from backhaul.operations.progress import PullProgress
    from backhaul.operations.verify import verify as operation

    identities = load_identities(identity)
    progress = PullProgress()
    with pull_progress(progress, "verified", quiet=quiet or as_json or not deep):
        result = operation(series, deep=deep, progress=progress, identities=identities)
    if as_json:
        print_json("verify", result)
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, show_header=False, pad_edge=False)
        marks = {
            "ok": Text("✓", "green"),
            "problem": Text("✗", "bold red"),
            "unverifiable": Text("?", "yellow"),
        }
        for check in result.checks:
            detail = Text(check.detail, overflow="fold")
            table.add_row(marks[check.state], Text(check.object), Text(check.check), detail)
        console(sys.stdout).print(table)
        if result.ok:
            if deep:
                words = f"[green]{result.id} is as it was pushed[/]: {format_size(result.bytes_read)} read and compared"
            else:
                unknown = any(check.state == "unverifiable" for check in result.checks)
                words = f"[green]{result.id}: nothing missing, shortened or replaced[/]"
                words += ", as far as could be told (?)" * unknown + "; --deep reads the content too"
            console(sys.stdout).print(words)
        if result.drill is not None:
            last = Text(f"  last drill, {result.drill.started}: ").append(
                result.drill.result, drill_style(result.drill.result)
            )
            console(sys.stdout).print(last.append(f": {result.drill.why}" if result.drill.why else ""))
    problems = [check for check in result.checks if check.state == "problem"]
    if problems:
        error = IntegrityError(
            f"Backup {result.id} in {result.series} is not as it was pushed",
            "; ".join(f"{check.object}: {check.detail}" for check in problems),
            f"If it was only copied, this tells: backhaul verify --deep {result.series}@{result.id}"
            if result.content_may_be_right
            else "Do not rely on it: verify an older one or another destination, and push a new one.",
        )
        raise ReportedError(error) if as_json else error


@click.command(
    short_help="Remove what dead runs left.",
    epilog="""\b
Examples:
  backhaul clean --dry-run s3://acme/db7/orders
  backhaul clean --older-than 6h s3://acme/db7/orders""",
)
@click.argument("series")
@click.option(
    "--older-than",
    default="24h",
    show_default=True,
    metavar="DURATION",
    help="How long a run must have shown no activity to count as dead. (0s takes those that are alive, too.)",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@option_json(_JSON_HELP)
def clean(series: str, older_than: str, dry_run: bool, as_json: bool) -> None:
    """Remove unfinished uploads and uncommitted objects of dead runs from SERIES.

    Committed backups, younger leftovers and names that Backhaul does not write are left alone.
    """
    from backhaul.operations.clean import clean as operation

    result = operation(series, older_than=parse_duration(older_than), dry_run=dry_run)
    if as_json:
        print_json("clean", result)
        return
    out = console(sys.stdout)
    verb = "would remove" if dry_run else "removed"
    for action in result.removed:
        out.print(f"{verb} {action.kind} {action.key}: {format_size(action.size)}, {action.reason}", markup=False)
    for action in result.kept:
        age = format_duration(max(0.0, action.age_seconds))
        out.print(f"kept {action.kind} {action.key}: {action.reason} ({age} since its last activity)", markup=False)
    out.print(f"{verb} {len(result.removed)}, {format_size(result.removed_size)}; kept {len(result.kept)}")
