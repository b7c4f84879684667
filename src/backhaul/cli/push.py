"""``backhaul push``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from backhaul.cli.command import TAIL, TailCommand, option_json
from backhaul.cli.output import ReportedError, announce, console, described, print_json
from backhaul.cli.source import check_source, open_source
from backhaul.errors import IncompleteError, InterruptedByUserError, UsageError
from backhaul.formats.quantities import format_duration, format_size, parse_duration, parse_size
from backhaul.formats.timetable import parse_timetable
from backhaul.model.results import PushResult
from backhaul.operations.progress import PushProgress

if TYPE_CHECKING:
    from backhaul.cli.send import News
    from backhaul.operations.fan_out import FanOut

_EPILOG = """\b
Examples:
  backhaul push s3://acme/db7/orders -- pg_dump -Fc -Z0 orders
  backhaul push s3://acme/db7/orders /mnt/usb/orders --require any -- pg_dump -Fc -Z0 orders
  mariadb-dump --single-transaction app | backhaul push /backups/app --expect '-- Dump completed'
  backhaul push s3://acme/db7/files --from /var/backups/files.tar --limit 08:00-18:00=5M,40M
  backhaul push s3://acme/db7/orders --encrypt-to age1... -- pg_dump -Fc -Z0 orders
  backhaul push s3://acme/db7/orders --from postgresql:///orders
  backhaul push s3://acme/db7/all --from mariadb+physical:///
  backhaul push s3://acme/db7/orders send:db2,db3 -- pg_dump -Fc -Z0 orders

\b
--from takes:
  postgresql://[USER@][HOST][:PORT]/[DATABASE]   by pg_dump; without DATABASE all of them
  postgresql+physical://[USER@][HOST][:PORT]/    the server's files and WAL, by pg_basebackup
  mariadb://[USER@][HOST][:PORT]/[DATABASE]      by mariadb-dump; mysql:// is the same
  mariadb+physical://[USER@]/                    the server's files, by mariadb-backup, on its host
  sqlite:///PATH   redis://[USER@][HOST][:PORT]   redis+unix:///SOCKET   dir:///PATH   PATH
Sockets elsewhere: postgresql:///app?host=/run/DIR, mariadb:///app?socket=/run/DIR/s.sock
A URL holds no password: these are found in ~/.pgpass, ~/.my.cnf, PGPASSWORD, MYSQL_PWD,
REDISCLI_AUTH, or a file (?password-file=FILE). What is missing is said before work starts.

\b
Name the command after -- rather than piping it in: only then can Backhaul see how it
ended. Leave compression to Backhaul (pg_dump -Z0): it compresses on all cores."""


@click.command(cls=TailCommand, epilog=_EPILOG, short_help="Make a backup from a command's output, a file or stdin.")
@click.argument("series", nargs=-1, required=True)
@click.option("--name", default="data", show_default=True, help="The stream's name.")
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    metavar="auto|none|1..19",
    help="'auto' is fast, denser while the network is slower than idle cores can compress, "
    "and spends nothing on data that does not compress.",
)
@click.option(
    "--encrypt-to",
    multiple=True,
    metavar="RECIPIENT",
    help="Encrypt, so that only the key of this age recipient (age1...) or SSH public key opens it. "
    "Repeatable: one recipient each.",
)
@click.option(
    "--encrypt-to-file",
    multiple=True,
    metavar="FILE",
    help="The same for every recipient in FILE, one a line. Repeatable.",
)
@click.option(
    "--require",
    default="all",
    show_default=True,
    metavar="all|any|N",
    help="How many SERIES must hold the backup: with fewer the status is 1, with these but not all 3.",
)
@click.option(
    "--expect",
    multiple=True,
    metavar="TEXT",
    help="Refuse to commit unless the stream's last 4 KiB hold TEXT. Repeatable.",
)
@click.option(
    "--from",
    "from_",
    metavar="URL|PATH",
    help="A database, a directory or a file instead of a command; see below. (If the push of a file to S3 is "
    "interrupted, the same command goes on where it was.)",
)
@click.option(
    "--streams",
    type=click.IntRange(1, 64),
    metavar="N",
    help="Of a database: dumps at once, of one state, the tables packed by size. 1 makes a single stream.  "
    "[default: one a core, 2 to 4]",
)
@click.option("--no-counts", is_flag=True, help="Don't count the rows; drill has nothing to compare then.")
@click.option(
    "--limit",
    metavar="RATE",
    help="Bytes a second over all connections: 40M, or by this host's clock 08:00-18:00=5M,40M; "
    "'off' is no limit, and so are hours that nothing is said of.",
)
@click.option("--allow-empty", is_flag=True, help="Accept a stream without a single byte.")
@click.option(
    "--retry-for",
    default="15m",
    show_default=True,
    metavar="DURATION",
    help="How long a store that is ill or away is tried again before it counts as failed; "
    "before the dump begins one that can't be reached has 3 s.",
)
@click.option(
    "--stall-timeout",
    metavar="DURATION",
    help="How long one SERIES may hold the dump up without taking anything, before it is dropped.  "
    "[default: 5 minutes more than --retry-for]",
)
@click.option(
    "--spool",
    metavar="DIR",
    help="Write there what a slow SERIES has not taken yet, so that the dump need not wait for it.",
)
@click.option("--spool-size", metavar="SIZE", help="Most bytes in the spool at any time.  [default: 20G]")
@click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Compressing threads.  [default: one a core]")
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors only.")
@option_json("Print the result as one JSON object on stdout.")
@click.pass_context
def push(
    ctx: click.Context,
    series: tuple[str, ...],
    name: str,
    compress: str,
    encrypt_to: tuple[str, ...],
    encrypt_to_file: tuple[str, ...],
    require: str,
    expect: tuple[str, ...],
    from_: str | None,
    streams: int | None,
    no_counts: bool,
    limit: str | None,
    allow_empty: bool,
    retry_for: str,
    stall_timeout: str | None,
    spool: str | None,
    spool_size: str | None,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a backup in every SERIES, in one pass, from COMMAND's output, from a database or file, or from stdin.

    Nothing is staged on disk. The backup exists only when the command has ended well, every byte was
    acknowledged, and the manifest was written; until then no listing shows it.
    """
    from backhaul.cli.progress import push_progress
    from backhaul.formats.roster import SCHEME
    from backhaul.operations.keys import read_recipients
    from backhaul.operations.push import DEFAULT_SPOOL_SIZE, PushOptions
    from backhaul.operations.push import push as operation

    command: list[str] | None = ctx.meta[TAIL]
    if spool_size is not None and spool is None:
        raise UsageError("--spool-size has no spool", "no --spool DIR is given", "Name the directory with --spool DIR.")
    words = [
        text
        for text in series
        if "/" not in text and ":" not in text and text not in (".", "..") and not Path(text).exists()
    ]
    if command is None and from_ is None and len(series) > 1 and words:
        raise UsageError(
            f"{words[0]!r} looks like a word of a command",
            "without -- every word is a SERIES",
            f"Put -- before the command; for a directory of that name write ./{words[0]}",
        )
    check_source("push", "backhaul push SERIES", command, from_)
    for text in encrypt_to:
        if Path(text).is_file():
            raise UsageError(
                f"--encrypt-to takes a recipient, and {text} is a file",
                "a recipient begins with age1 or ssh-",
                "For a file of recipients: --encrypt-to-file",
            )
    options = PushOptions(
        name=name,
        compress=compress,
        require=require,
        expect=expect,
        limit=parse_timetable(limit) if limit is not None else None,
        allow_empty=allow_empty,
        workers=workers,
        patience=parse_duration(retry_for),
        stall_timeout=parse_duration(stall_timeout) if stall_timeout is not None else None,
        spool=spool,
        spool_size=parse_size(spool_size) if spool_size is not None else DEFAULT_SPOOL_SIZE,
        encrypt_to=(*encrypt_to, *(text for path in encrypt_to_file for text in read_recipients(path))),
    )
    rosters = [text for text in series if text.startswith(SCHEME)]
    if len(rosters) > 1:
        raise UsageError("push has two rosters", " ".join(rosters), "Write one: send:db2,db3")
    say: News | None = None
    fan_out: FanOut | None = None
    if rosters:  # the network and its keys take 100 ms to load, which a push to stores does without
        from backhaul.cli.send import News
        from backhaul.operations.fan_out_settings import fan_out_at

        say = News(quiet or as_json)
        fan_out = fan_out_at(rosters[0], say)
    places = [text for text in series if text not in rosters]
    progress = PushProgress()
    try:
        with push_progress(progress, quiet=quiet or as_json) as on_error_line:
            if say is not None:
                say.through = on_error_line
            source = open_source(
                command, from_, streams=streams, counts=not no_counts, progress=progress, on_error_line=on_error_line
            )
            result = operation(places, source, options, fan_out=fan_out, progress=progress)
    except KeyboardInterrupt as interrupt:
        raise InterruptedByUserError(
            "The push was interrupted", f"by {str(interrupt) or 'SIGINT'}", _what_stands(progress)
        ) from interrupt
    announce("push", result)
    if as_json:
        print_json("push", result)
    elif not quiet:
        _print_summary(result)
    failed = [destination for destination in result.destinations if destination.state != "committed"]
    if not result.complete:
        why = [f"{d.series}: {d.error_what}: {d.error_why}" for d in failed]
        todo = [f"{d.series}: {d.error_next}" for d in failed if d.error_next]
        if result.fan_out is not None and not result.fan_out.complete:
            from backhaul.cli.send import incomplete

            receivers = incomplete(result.fan_out)
            why.append(f"{result.fan_out.roster}: {receivers.what}: {receivers.why}")
            todo.append(receivers.todo)
        error = IncompleteError(f"Backup {result.id} is committed, but not everywhere", "; ".join(why), " ".join(todo))
        raise ReportedError(error) if as_json else error


def _what_stands(progress: PushProgress) -> str:
    """Say where the backup was committed all the same, and where that is not known."""
    said = []
    for state, words in (("committed", "Committed and whole"), ("commit in doubt", "Not known whether committed")):
        places = [destination.series for destination in progress.destinations if destination.state == state]
        if places:
            said.append(f"{words}: {', '.join(places)}.")
    kept = [destination.series for destination in progress.destinations if destination.state == "resumable"]
    if kept:
        said.append(f"The same command goes on where it was: {', '.join(kept)}.")
    if any(destination.state == "failed, leftovers" for destination in progress.destinations):
        said.append("Not everything could be taken back; backhaul clean collects the rest.")
    return " ".join(said) or "Nothing was committed and nothing was left; push again."


def _print_summary(result: PushResult) -> None:
    from rich.text import Text

    out = console()
    ratio = result.raw_size / result.stored_size if result.stored_size else 1.0
    rate = result.raw_size / result.seconds if result.seconds else 0.0
    out.print(
        f"[bold]{result.id}[/]  {format_size(result.raw_size)} in, {format_size(result.stored_size)} stored, "
        f"ratio {ratio:.2f}, {format_duration(result.seconds)}, {format_size(rate)}/s"
    )
    if result.source is not None:
        out.print(f"  {described(result.source)}, {len(result.streams)} streams", style="dim", markup=False)
        for remark in result.source.remarks:
            out.print(f"  {remark}", style="yellow", markup=False)
    if result.recipients:
        out.print(f"  encrypted for {', '.join(result.recipients)}", style="dim", markup=False)
    if result.remark:
        out.print(f"  {result.remark}", style="yellow", markup=False)
    for destination in result.destinations:
        good = destination.state == "committed"
        line = Text("  ✓ " if good else "  ✗ ", style="green" if good else "red").append(destination.series, "")
        remarks = []
        if destination.objects > 1:
            remarks.append(f"{destination.objects} objects")
        if destination.remark:
            remarks.append(destination.remark)
        if destination.reused:
            remarks.append(f"{format_size(destination.reused)} were there from an interrupted push")
        if destination.retries:
            remarks.append(f"{destination.retries} requests were tried again")
        out.print(line.append(f"  ({', '.join(remarks)})" if remarks else "", "dim"))
    if result.fan_out is not None:
        from backhaul.cli.send import print_receivers

        print_receivers(result.fan_out)
