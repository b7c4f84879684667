"""``backhaul prune``."""

from __future__ import annotations

import sys

import click
import msgspec

from backhaul.cli.command import option_json
from backhaul.cli.output import ReportedError, announce, console, error_document, print_error, print_json
from backhaul.errors import BackhaulError, FailedError, IncompleteError
from backhaul.formats.quantities import format_size, parse_duration, parse_size
from backhaul.model.results import PruneResult

_COUNT = click.IntRange(min=1)


@click.command(
    short_help="Remove the backups that no rule keeps.",
    epilog="""\b
Examples:
  backhaul prune s3://acme/db7/orders --keep-daily 7 --keep-weekly 4 --keep-monthly 12 --dry-run
  backhaul prune s3://acme/db7/orders s3://acme/db7/users --keep-last 3 --keep-within 14d
  backhaul prune /mnt/usb/orders --keep-free 200G

\b
What a rule keeps stays; rules add up. Whatever they say, these stay: the newest good backup (readable,
its streams there and whole in size, its last drill not failed), the newest that a drill proved, one
on hold, one under S3 object lock, one whose manifest can't be read, one dated in the future.
--keep-free comes after the rules and takes, oldest first, what they would keep, but nothing of these.
The guard refuses (status 1) to remove more than --max-delete, or without any good backup.

\b
Exit status: 0 done, 1 failed or refused by the guard, 3 not all could be done: a manifest can't be
read, too little room could be made, some of several SERIES failed.""",
)
@click.argument("series", nargs=-1, required=True)
@click.option("--keep-last", type=_COUNT, metavar="N", help="The newest N.")
@click.option("--keep-daily", type=_COUNT, metavar="N", help="The newest good one of each of N days that have one.")
@click.option("--keep-weekly", type=_COUNT, metavar="N", help="The same for N weeks, from Monday.")
@click.option("--keep-monthly", type=_COUNT, metavar="N", help="The same for N months.")
@click.option("--keep-yearly", type=_COUNT, metavar="N", help="The same for N years.")
@click.option("--keep-within", metavar="DURATION", help="Everything younger, e.g. 14d.")
@click.option(
    "--keep-free",
    metavar="SIZE",
    help="On a local disk: remove the oldest until SIZE is free, e.g. 200G. Alone it keeps as many as fit.",
)
@click.option(
    "--max-delete",
    metavar="N|P%",
    help="How many backups may go in one run before the guard refuses.  [default: half, or 3, whichever is more]",
)
@click.option(
    "--unproved-ok", is_flag=True, help="The newest backup that a drill proved may go while newer ones are unproved."
)
@click.option(
    "--timezone", default="UTC", show_default=True, metavar="ZONE", help="Whose days, weeks, months and years count."
)
@click.option(
    "--retry-for",
    default="15m",
    show_default=True,
    metavar="DURATION",
    help="How long a store that is ill or away is tried again.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would go and what stays, and why.")
@click.option("--quiet", "-q", is_flag=True, help="No report; errors only.")
@option_json("Print one JSON object on stdout.")
def prune(
    series: tuple[str, ...],
    keep_last: int | None,
    keep_daily: int | None,
    keep_weekly: int | None,
    keep_monthly: int | None,
    keep_yearly: int | None,
    keep_within: str | None,
    keep_free: str | None,
    max_delete: str | None,
    unproved_ok: bool,
    timezone: str,
    retry_for: str,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Remove from each SERIES the backups that no --keep rule keeps and nothing protects, oldest first."""
    from backhaul.operations.prune import PruneOptions, check_options
    from backhaul.operations.prune import prune as operation
    from backhaul.planning.guard import MaxDelete, parse_max_delete

    options = PruneOptions(
        keep_last=keep_last,
        keep_daily=keep_daily,
        keep_weekly=keep_weekly,
        keep_monthly=keep_monthly,
        keep_yearly=keep_yearly,
        keep_within=parse_duration(keep_within) if keep_within is not None else None,
        keep_free=parse_size(keep_free) if keep_free is not None else None,
        max_delete=parse_max_delete(max_delete) if max_delete is not None else MaxDelete(),
        unproved_ok=unproved_ok,
        timezone=timezone,
        patience=parse_duration(retry_for),
    )
    check_options(options)  # a rule that means nothing is of the call; from here on each series has its own fate
    results: list[dict[str, object]] = []
    errors: list[tuple[str, BackhaulError]] = []
    for place in series:
        error: BackhaulError | None = None
        try:
            result = operation(place, options, dry_run=dry_run)
        except BackhaulError as failed:
            error = failed
            results.append({"series": place, **error_document(error)})
        else:
            error = _error_of(result)
            document = {**msgspec.to_builtins(result), "complete": result.complete}
            results.append({**document, **error_document(error)} if error is not None else document)
            if not as_json and not quiet:
                _print(result)
        if error is not None:
            errors.append((place, error))
    announce("prune", {"dry_run": dry_run, "series": results})
    if as_json:
        print_json("prune", {"dry_run": dry_run, "series": results})
    if not errors:
        return
    final = _all_in_all(series, errors)
    if len(series) > 1:
        for _, each in errors:
            print_error(each)
    raise ReportedError(final) if as_json else final


def _error_of(result: PruneResult) -> BackhaulError | None:
    """Return what a result amounts to, where not all is well."""
    from backhaul.operations.refused import GuardError

    if result.refusals:
        return GuardError(result.refusals)
    if not result.kept and not result.removed:
        return IncompleteError(
            f"{result.series} holds no backup",
            "there is nothing that could be kept or removed; a mistyped name looks the same",
            "Check the path, or push to it first.",
        )
    if result.problems:
        return IncompleteError(
            f"Not all of {result.series} could be pruned",
            "\n".join(result.problems),
            "What is said to be wrong stays until somebody looks at it: backhaul prune --dry-run says it again.",
        )
    return None


def _all_in_all(series: tuple[str, ...], errors: list[tuple[str, BackhaulError]]) -> BackhaulError:
    """Return the error that the command ends with."""
    if len(series) == 1:
        return errors[0][1]
    failed = [place for place, error in errors if not isinstance(error, IncompleteError)]
    kind = FailedError if len(failed) == len(series) else IncompleteError
    return kind(
        f"{len(errors)} of {len(series)} series were not pruned as they should be",
        ", ".join(place for place, _ in errors),
        "What is wrong with each is said above.",
    )


def _print(result: PruneResult) -> None:
    from rich.text import Text

    out = console(sys.stdout)
    out.print(Text(result.series, "bold"))
    would = "would be " if result.dry_run else ""
    for backup in result.kept:
        line = Text("  kept     ", "green").append(backup.id, "bold").append(f"  {format_size(backup.size)}")
        out.print(line.append(f"  {'; '.join(backup.reasons)}"))
        if backup.problem and backup.problem not in backup.reasons:
            out.print(Text(f"           not good: {backup.problem}", "yellow"))
    for backup in result.removed:
        line = Text(f"  {'to go' if result.dry_run else 'removed':9}", "red").append(backup.id, "bold")
        out.print(line.append(f"  {format_size(backup.size)}  {'; '.join(backup.reasons)}"))
    for remark in result.remarks:
        out.print(Text(f"  {remark}"))
    words = f"  {len(result.removed)} {would}removed, {format_size(result.freed)}; {len(result.kept)} kept"
    if result.free is not None:
        words += f"; {format_size(result.free)} {would}free"
    out.print(Text(words))
