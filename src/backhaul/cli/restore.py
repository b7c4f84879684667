"""``backhaul restore`` and ``backhaul drill``."""

from __future__ import annotations

import click

from backhaul.cli.command import option_json
from backhaul.cli.keys import load_identities, option_identity
from backhaul.cli.output import ReportedError, announce, console, print_drill, print_json
from backhaul.errors import BackhaulError, ConfigurationError, IncompleteError, IntegrityError
from backhaul.formats.quantities import format_duration, format_size, parse_duration
from backhaul.model.drill import FAILED, PROVED
from backhaul.model.results import RestoreResult

_EPILOG = """\b
Examples:
  backhaul restore s3://acme/db7/orders --into postgresql:///orders_copy
  backhaul restore s3://acme/db7/orders@2026-11-20 --into postgresql:///orders --replace
  backhaul restore s3://acme/db7/orders --into postgresql:///rescue --only customers
  backhaul restore s3://acme/db7/all --into postgresql://new-host/ --globals
  backhaul restore s3://acme/db7/base --into dir:///var/lib/postgresql/15/main
  backhaul restore s3://acme/db8/base --into dir:///var/lib/mysql

\b
--into takes:
  postgresql://[USER@][HOST][:PORT]/[DATABASE]   mariadb://[USER@][HOST][:PORT]/[DATABASE]
  sqlite:///PATH   dir:///PATH   PATH            (dir for physical backups, Redis and tars)

\b
A database is restored under another name and renamed when it is whole; a directory is
filled beside its place. A restore that fails leaves nothing under the name that was asked
for. For backups of a command's output use: backhaul pull SERIES -- COMMAND"""


@click.command(epilog=_EPILOG, short_help="Restore a backup into a database or a directory.")
@click.argument("series", metavar="SERIES[@WHEN]")
@click.option("--into", required=True, metavar="URL|PATH", help="The database or directory; new, or empty.")
@click.option("--replace", is_flag=True, help="Replace what is there, once the restored is whole.")
@click.option(
    "--only",
    multiple=True,
    metavar="TABLE",
    help="Restore all definitions, but the rows of TABLE only; without foreign keys. Repeatable.",
)
@click.option(
    "--globals", "globals_", is_flag=True, help="Make the roles or accounts that the server lacks from the backup."
)
@click.option("--no-owner", is_flag=True, help="PostgreSQL: everything belongs to who restores; no grants.")
@click.option(
    "--jobs", "-j", type=click.IntRange(1, 64), metavar="N", help="Streams and indexes at once.  [default: one a core]"
)
@option_identity("A key file that opens the backup if it is encrypted; '-' for stdin. Repeatable.")
@click.option(
    "--retry-for",
    default="15m",
    show_default=True,
    metavar="DURATION",
    help="How long a store that is ill or away is tried again.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors only.")
@option_json("Print the result as one JSON object on stdout.")
def restore(
    series: str,
    into: str,
    replace: bool,
    only: tuple[str, ...],
    globals_: bool,
    no_owner: bool,
    jobs: int | None,
    identity: tuple[str, ...],
    retry_for: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Restore a backup that was made with --from into a database or a directory, while it is downloaded.

    Server, versions, roles, extensions, room and rights are looked at before a byte is read.
    """
    from backhaul.cli.progress import pull_progress
    from backhaul.operations.progress import PullProgress
    from backhaul.operations.restore import RestoreOptions
    from backhaul.operations.restore import restore as operation

    options = RestoreOptions(
        replace=replace,
        only=only,
        globals_=globals_,
        no_owner=no_owner,
        jobs=jobs,
        patience=parse_duration(retry_for),
        identities=load_identities(identity),
    )
    progress = PullProgress()
    with pull_progress(progress, "restored", quiet=quiet or as_json) as on_error_line:
        result = operation(series, into, options, progress=progress, on_error_line=on_error_line)
    if as_json:
        print_json("restore", result)
    elif not quiet:
        _print_restored(result)
    if result.shortfalls:
        error = IncompleteError(
            f"Backup {result.id} is restored into {result.into}, but not all of it",
            "\n".join(result.shortfalls),
            "All rows are there. Make what is missing by hand.",
        )
        raise ReportedError(error) if as_json else error


def _print_restored(result: RestoreResult) -> None:
    out = console()
    rate = result.raw_size / result.seconds if result.seconds else 0.0
    out.print(
        f"[bold]{result.id}[/]  {format_size(result.raw_size)} checked and restored into {result.into}, "
        f"{format_duration(result.seconds)}, {format_size(rate)}/s"
    )
    spent = ", ".join(f"{name} {format_duration(seconds)}" for name, seconds in result.phases.items())
    out.print(f"  {spent}", style="dim", markup=False)
    for remark in result.remarks:
        out.print(f"  {remark}", style="yellow", markup=False)


_DRILL_EPILOG = """\b
Examples:
  backhaul drill s3://acme/db7/orders
  backhaul drill s3://acme/db7/orders --check 'select count(*) > 0 from orders' True
  backhaul drill s3://acme/db7/orders@2026-11-20 --identity orders.key --scratch /var/tmp

\b
Ends: proved (status 0); failed (1), which speaks of the backup; could not test (10),
which speaks of this host or the line: no server of that version, a missing extension, no room."""


@click.command(epilog=_DRILL_EPILOG, short_help="Prove that a backup restores, in a scratch server.")
@click.argument("series", metavar="SERIES[@WHEN]")
@click.option(
    "--check",
    "questions",
    type=(str, str),
    multiple=True,
    metavar="SQL VALUE",
    help="Ask the restored database; the first column of the first row must be VALUE. Repeatable.",
)
@click.option("--database", metavar="NAME", help="Which database --check asks, if there are several.")
@click.option("--scratch", metavar="DIR", help="Where the scratch server lies.  [default: the system's /tmp]")
@click.option("--jobs", "-j", type=click.IntRange(1, 64), metavar="N", help="At once.  [default: one a core]")
@option_identity("A key file that opens the backup if it is encrypted; '-' for stdin. Repeatable.")
@click.option("--no-record", is_flag=True, help="Don't keep the finding beside the backup.")
@click.option(
    "--retry-for",
    default="15m",
    show_default=True,
    metavar="DURATION",
    help="How long a store that is ill or away is tried again.",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress; the result and errors only.")
@option_json("Print the result as one JSON object on stdout.")
def drill(
    series: str,
    questions: tuple[tuple[str, str], ...],
    database: str | None,
    scratch: str | None,
    jobs: int | None,
    identity: tuple[str, ...],
    no_record: bool,
    retry_for: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Restore a backup into a server of its own, start it, check it, and keep what was found beside the backup.

    The server lies in a temporary directory, answers on a socket there and nowhere else, and is removed afterwards.
    Looked at are the database's own checks (pg_amcheck, CHECK TABLE, integrity_check), the row counts of the push,
    and what --check asks.
    """
    from backhaul.cli.progress import pull_progress
    from backhaul.operations.drill import DrillOptions
    from backhaul.operations.drill import drill as operation
    from backhaul.operations.progress import PullProgress

    options = DrillOptions(
        questions=questions,
        database=database,
        scratch=scratch,
        jobs=jobs,
        patience=parse_duration(retry_for),
        identities=load_identities(identity),
        record=not no_record,
    )
    progress = PullProgress()
    with pull_progress(progress, "restored", quiet=quiet or as_json):
        result = operation(series, options, progress=progress)
    record = result.record
    announce("drill", result)
    if as_json:
        print_json("drill", result)
    else:
        print_drill(record)
    if record.result == PROVED:
        return
    failed = record.result == FAILED
    kind: type[BackhaulError] = IntegrityError if failed else ConfigurationError
    asked = {statement for statement, _ in questions}
    wrong = [check.name for check in record.checks if check.state in ("failed", "untested")]
    only_questions = bool(wrong) and set(wrong) <= asked
    what = "did not restore as it was" if failed else "could not be tested"
    todo = "Do not rely on it: drill an older one, and push a new one."
    if not failed:
        todo = "This says nothing of the backup. Mend that, and drill again."
    if only_questions:
        what = "restored, but a --check was not met" if failed else "restored, but a --check could not be asked"
        todo = "See whether the value or the data is wrong." if failed else "Correct --check, and drill again."
    error = kind(f"Backup {record.id} in {result.series} {what}", record.why, todo)
    raise ReportedError(error) if as_json else error
