"""``backhaul sync``, ``plan``, ``apply`` and ``undelete``; the mirror's side of ``verify`` and ``pull``."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click
import msgspec

from backhaul.cli.command import Decorated, option_json
from backhaul.cli.output import ReportedError, announce, console, error_document, print_json
from backhaul.errors import IncompleteError, IntegrityError, SkippedError, UsageError
from backhaul.formats.file_names import shown
from backhaul.formats.quantities import format_duration, format_size, parse_duration
from backhaul.formats.timetable import parse_timetable
from backhaul.operations.handover import STOP_SIGNAL

if TYPE_CHECKING:
    from backhaul.model.mirror import PlanSummary
    from backhaul.model.results import MirrorResult
    from backhaul.operations.mirror.apply import ApplyOptions
    from backhaul.operations.mirror.plan import PlanOptions
    from backhaul.operations.mirror.sync import RunOptions

_JSON_HELP = "Print one JSON object on stdout."
# Names that a text says; --json says more.
_NAMES_SAID = 20

_PLAN_OPTIONS = (
    click.option(
        "--compare",
        type=click.Choice(["size", "mtime", "md5"]),
        default="mtime",
        show_default=True,
        help="What tells a changed file: its size; its size and time; or its content, read once and remembered.",
    ),
    click.option(
        "--recycle-after",
        metavar="DURATION",
        help="Delete for good what is gone here for so long, e.g. 30d.  [default: never]",
    ),
    click.option(
        "--max-delete",
        metavar="N|P%",
        help="How many files may go in one run before the guard refuses.  [default: 10% or 10, whichever is more]",
    ),
    click.option(
        "--exclude", multiple=True, metavar="PATTERN", help="Leave such names alone, here and there. Repeatable."
    ),
    click.option("--sentinel", metavar="NAME", help="A file that must be in DIR: without it the guard refuses."),
    click.option("--accept-source", is_flag=True, help="DIR may be on another disk or host than last time."),
    click.option("--allow-empty", is_flag=True, help="DIR may be empty."),
    click.option("--overwrite", is_flag=True, help="A new mirror may replace objects that it did not write."),
    click.option(
        "--anew", is_flag=True, help="Begin a second copy beside the first, which counts until the second is whole."
    ),
)
_APPLY_OPTIONS = (
    click.option(
        "--streams", type=click.IntRange(1, 64), default=6, show_default=True, metavar="N", help="Connections."
    ),
    click.option(
        "--first",
        type=click.Choice(["biggest", "oldest", "name"]),
        default="biggest",
        show_default=True,
        help="Which files go first.",
    ),
    click.option(
        "--for", "length", metavar="DURATION", help="Begin nothing more after so long, e.g. 330m; exit 75 then."
    ),
)
_RUN_OPTIONS = (
    click.option(
        "--limit",
        metavar="RATE",
        help="Bytes a second over all connections: 40M, or 08:00-18:00=5M,40M by the time of day.",
    ),
    click.option(
        "--lock", metavar="FILE", help="Hold this lock meanwhile (flock), as the backup program's groom does."
    ),
    click.option(
        "--retry-for",
        default="15m",
        show_default=True,
        metavar="DURATION",
        help="How long a store that is ill or away is tried again.",
    ),
    click.option("--quiet", "-q", is_flag=True, help="No progress and no report; errors only."),
    option_json(_JSON_HELP),
)


def _options(*groups: tuple[Callable[[Any], Any], ...]) -> Callable[[Decorated], Decorated]:
    def decorate(command: Decorated) -> Decorated:
        for option in reversed([option for group in groups for option in group]):
            command = option(command)
        return command

    return decorate


def _plan_options(given: dict[str, Any]) -> PlanOptions:
    from backhaul.operations.mirror.plan import PlanOptions
    from backhaul.planning.guard import MaxDelete, parse_max_delete

    return PlanOptions(
        compare=given["compare"],
        recycle_after=parse_duration(given["recycle_after"]) if given["recycle_after"] else None,
        max_delete=parse_max_delete(given["max_delete"]) if given["max_delete"] is not None else MaxDelete(),
        exclude=given["exclude"],
        sentinel=given["sentinel"],
        accept_source=given["accept_source"],
        allow_empty=given["allow_empty"],
        anew=given["anew"],
        overwrite=given["overwrite"],
    )


def _apply_options(given: dict[str, Any]) -> ApplyOptions:
    from backhaul.operations.mirror.apply import ApplyOptions

    length = parse_duration(given["length"]) if given["length"] else None
    # A job's window that ends, or a hold: nothing more is begun, what was begun is finished.
    stop = threading.Event()
    signal.signal(STOP_SIGNAL, lambda *_: stop.set())
    return ApplyOptions(streams=given["streams"], first=given["first"], length=length, stop=stop.is_set)


def _run_options(given: dict[str, Any]) -> RunOptions:
    from backhaul.operations.mirror.sync import RunOptions

    return RunOptions(
        limit=parse_timetable(given["limit"]) if given["limit"] else None,
        lock=given["lock"],
        patience=parse_duration(given["retry_for"]),
    )


@click.command(
    short_help="Mirror a directory: plan, guard and apply in one go.",
    epilog="""\b
Examples:
  backhaul sync /backups s3://acme/mirrors/db7
  backhaul sync /backups s3://acme/mirrors/db7 --dry-run
  backhaul sync /backups s3://acme/mirrors/db7 --for 330m --recycle-after 30d --lock /run/groom.lock
  backhaul sync /backups s3://acme/mirrors/db7 --limit 08:00-18:00=5M,40M --sentinel .mounted

\b
What is gone in DIR gets a tombstone, and stays in MIRROR until --recycle-after; undelete brings it
back. Exit status: 0 the mirror is complete, 1 failed or refused by the guard, 3 some files were
skipped or failed, 11 another run or the lock's holder is at work, 75 the window ended: run again.""",
)
@click.argument("directory", metavar="DIR")
@click.argument("mirror")
@click.option("--dry-run", is_flag=True, help="Only say what would be done.")
@_options(_PLAN_OPTIONS, _APPLY_OPTIONS, _RUN_OPTIONS)
def sync(directory: str, mirror: str, dry_run: bool, as_json: bool, quiet: bool, **given: Any) -> None:
    """Make MIRROR hold the files of DIR under their own names, and never a byte more than needed.

    Nothing of MIRROR is downloaded. Of a large file that changed only what is new is sent; a file that was renamed is
    copied by the store.
    """
    from backhaul.cli.progress import mirror_progress
    from backhaul.operations.mirror import sync as operations
    from backhaul.operations.progress import MirrorProgress

    progress = MirrorProgress()
    options, run = _plan_options(given), _run_options(given)
    if dry_run:
        with mirror_progress(progress, quiet=quiet or as_json):
            summary, lines = operations.dry_run(directory, mirror, options, run, progress=progress)
        if as_json:
            actions = [msgspec.json.decode(line) for line in lines]
            print_json("dry-run", {**msgspec.to_builtins(summary), "actions": actions})
        elif not quiet:
            _print_actions(lines)
            _print_plan(summary, "would")
        _refuse(summary, as_json=as_json)
        return
    apply_options = _apply_options(given)
    with mirror_progress(progress, quiet=quiet or as_json):
        result = operations.sync(directory, mirror, options, apply_options, run, progress=progress)
    _report(result, as_json=as_json, quiet=quiet)


@click.command(
    short_help="Say what sync would do, as a file that apply takes.",
    epilog="""\b
Examples:
  backhaul plan /backups s3://acme/mirrors/db7 -o plan.json
  backhaul apply plan.json

\b
The plan names each file that changes, with the reason and the bytes. One that the guard refuses is
written too, to be read; apply does not take it. Exit status 1 if it was refused.""",
)
@click.argument("directory", metavar="DIR")
@click.argument("mirror")
@click.option("-o", "--output", metavar="FILE", required=True, help="Where to write the plan.")
@_options(_PLAN_OPTIONS, _RUN_OPTIONS)
def plan(directory: str, mirror: str, output: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Compare DIR with MIRROR and write what there is to do into FILE; change nothing."""
    from backhaul.cli.progress import mirror_progress
    from backhaul.operations.mirror.sync import make_plan
    from backhaul.operations.progress import MirrorProgress

    progress = MirrorProgress()
    options, run = _plan_options(given), _run_options(given)
    with mirror_progress(progress, quiet=quiet or as_json):
        summary = make_plan(directory, mirror, output, options, run, progress=progress)
    if as_json:
        print_json("plan-summary", summary)
    elif not quiet:
        _print_plan(summary, "will")
        if not summary.refusals:
            console(sys.stdout).print(f"Apply it with: backhaul apply {output}", markup=False)
    _refuse(summary, as_json=as_json)


@click.command(
    short_help="Do what a plan says, once.",
    epilog="""\b
Examples:
  backhaul apply plan.json
  backhaul apply plan.json --for 330m --streams 4

\b
A plan is applied once, and only while the files and objects that it names are as it saw them, and
no other run was there: else nothing is done. What else is new in DIR waits for the next plan.""",
)
@click.argument("plan", metavar="PLAN")
@_options(_APPLY_OPTIONS, _RUN_OPTIONS)
def apply(plan: str, as_json: bool, quiet: bool, **given: Any) -> None:
    """Apply an approved PLAN that backhaul plan has written."""
    from backhaul.cli.progress import mirror_progress
    from backhaul.operations.mirror.sync import apply_plan
    from backhaul.operations.progress import MirrorProgress

    progress = MirrorProgress()
    options, run = _apply_options(given), _run_options(given)
    with mirror_progress(progress, quiet=quiet or as_json):
        result = apply_plan(plan, options, run, progress=progress)
    _report(result, as_json=as_json, quiet=quiet)


@click.command(
    short_help="List what a mirror has in its recycler, and bring it back.",
    epilog="""\b
Examples:
  backhaul undelete s3://acme/mirrors/db7
  backhaul undelete s3://acme/mirrors/db7 set3/chunk-0012 -o /backups
  backhaul undelete s3://acme/mirrors/db7 'set3/*' -o /backups""",
)
@click.argument("mirror")
@click.argument("names", metavar="[NAME...]", nargs=-1)
@click.option(
    "-o", "--output", metavar="DIR", help="Where to bring them back to; the next sync takes their tombstones off."
)
@option_json(_JSON_HELP)
def undelete(mirror: str, names: tuple[str, ...], output: str | None, as_json: bool) -> None:
    """List the files of MIRROR that are gone in its directory and still there, or bring those NAMEs back.

    A NAME may be a pattern, as the shell's, or a directory. Nothing that is in DIR already is replaced.
    """
    from backhaul.operations.mirror.restore import recycler
    from backhaul.operations.mirror.restore import undelete as operation

    if names and output is None:
        raise UsageError("There is no place to bring them back to", "-o DIR is missing", "Add e.g. -o /backups.")
    if output is not None and not names:
        raise UsageError("Nothing is named", "-o was given without a NAME", "Name files, or '*' for all.")
    if output is None:
        found = recycler(mirror)
        if as_json:
            print_json("recycler", found)
            return
        out = console(sys.stdout)
        for entry in found.files:
            out.print(f"{entry.gone}  {format_size(entry.size):>8}  {shown(entry.name)}", markup=False)
        total = format_size(sum(entry.size for entry in found.files))
        out.print(f"{len(found.files)} files in the recycler of {mirror}, {total}", markup=False)
        return
    result = operation(mirror, names, output)
    if as_json:
        print_json("undelete", result)
    else:
        there = f"; {result.kept} were there" if result.kept else ""
        words = f"{result.files} files brought back to {output}, {format_size(result.bytes)}{there}"
        console(sys.stdout).print(words, markup=False)
    _raise_problems(result.problems, as_json=as_json)


# -- what is said --------------------------------------------------------------------------------------------


def _print_actions(lines: Any) -> None:
    out = console(sys.stdout)
    for line in lines:
        action = msgspec.json.decode(line)
        sent = f", {format_size(action['sent'])} to send" if action.get("sent") else ""
        size = format_size(action.get("size", 0))
        out.print(f"{action['kind']:<9} {shown(action['key'])}: {size}{sent}; {action['reason']}", markup=False)


def _print_plan(summary: PlanSummary, verb: str) -> None:
    out = console(sys.stdout)
    totals = summary.totals
    parts = [
        f"{count.files} {kind} ({format_size(count.bytes)})" for kind, count in totals.actions.items() if count.files
    ]
    words = f"{summary.directory} -> {summary.mirror}: {totals.local.files} files, {format_size(totals.local.bytes)}"
    out.print(words, markup=False)
    out.print(f"  {verb} do: {', '.join(parts) or 'nothing'}", markup=False)
    out.print(f"  {verb} send {format_size(totals.to_send)}; {totals.kept.files} files stay as they are", markup=False)
    if totals.waiting.files:
        out.print(f"  {totals.waiting.files} files wait in the recycler, {format_size(totals.waiting.bytes)}")
    if totals.foreign.files:
        out.print(f"  {totals.foreign.files} objects are not this mirror's, and are left alone")
    if totals.excluded.files:
        out.print(f"  {totals.excluded.files} files are excluded, {format_size(totals.excluded.bytes)}")
    for remark in summary.remarks:
        out.print(f"  {remark}", markup=False)


def _refuse(summary: PlanSummary, *, as_json: bool) -> None:
    from backhaul.operations.refused import GuardError

    if summary.refusals:
        error = GuardError(summary.refusals)
        raise ReportedError(error) if as_json else error


def _report(result: MirrorResult, *, as_json: bool, quiet: bool) -> None:
    error = _error_of(result)
    announce("sync", result)
    if as_json:
        document = msgspec.to_builtins(result)
        print_json("mirror", {**document, **error_document(error)} if error is not None else document)
    elif not quiet:
        for line in report_lines(result):
            console(sys.stdout).print(line, markup=False)
    if error is not None:
        raise ReportedError(error) if as_json else error


def report_lines(result: MirrorResult) -> list[str]:
    """Return what a run has done, in about ten lines."""
    state = {"complete": "complete", "incomplete": "INCOMPLETE", "cut": "cut short by the window"}[result.state]
    rate = f", {format_size(result.sent_bytes / result.seconds)}/s" if result.seconds > 0 and result.sent_bytes else ""
    which = "second copy " if result.building and not result.switched else ""
    lines = [f"{result.directory} -> {result.mirror}: {which}{state}, {format_duration(result.seconds)}{rate}"]

    def line(label: str, words: str) -> None:
        lines.append(f"  {label:<10} {words}")

    changed = result.sent.files + result.composed.files
    reused = f", {format_size(result.reused_bytes)} were there from an interrupted run" if result.reused_bytes else ""
    line("sent", f"{changed} files, {format_size(result.sent_bytes)}{reused}")
    if result.saved:
        words = f"{format_size(result.saved)} by {result.renamed.files} renames and {result.composed.files} deltas"
        line("saved", words)
    line("kept", f"{result.kept.files} files, {format_size(result.kept.bytes)}")
    if result.tombstones.files or result.waiting.files:
        total = format_size(result.tombstones.bytes + result.waiting.bytes)
        new = f", {result.tombstones.files} of them since now" if result.tombstones.files else ""
        line("recycler", f"{result.tombstones.files + result.waiting.files} files, {total}{new}")
    if result.recycled.files:
        line("deleted", f"{result.recycled.files} files, {format_size(result.recycled.bytes)}, for good")
    if result.held.files:
        line("held", f"{result.held.files} files that are due to be deleted: this run was not clean")
    if result.excluded.files:
        line("excluded", f"{result.excluded.files} files, {format_size(result.excluded.bytes)}")
    if result.foreign.files:
        line("left alone", f"{result.foreign.files} objects that are not this mirror's")
    for label, count, names in (
        ("skipped", result.skipped_count, result.skipped),
        ("failed", result.failed_count, result.failed),
    ):
        if count:
            first = "; ".join(f"{each.name}: {each.reason}" for each in names[:2])
            line(label, f"{count}: {first}" + ("; ..." if count > 2 else ""))
    if result.left.files:
        line("left", left_words(result))
    lines += [f"  {remark}" for remark in result.remarks]
    return lines


def left_words(result: MirrorResult) -> str:
    """Return what is left for the next night."""
    nights = f", about {result.nights} more night{'s' * (result.nights != 1)} like this" if result.nights else ""
    return f"{format_size(result.left.bytes)} left in {result.left.files} files{nights}"


def _error_of(result: MirrorResult) -> IncompleteError | SkippedError | None:
    if result.state == "cut":
        return SkippedError(
            "The window ended before the mirror was complete",
            left_words(result),
            "Run it again in the next window: it goes on from there.",
        )
    if result.state == "incomplete":
        names = [*result.failed, *result.skipped]
        count = result.failed_count + result.skipped_count
        lines = [f"{each.name}: {each.reason}" for each in names[:_NAMES_SAID]]
        more = [f"... and {count - len(lines)} more; --json names them"] if count > len(lines) else []
        return IncompleteError(
            f"{count} names are not in the mirror as they are in {result.directory}",
            "\n".join([*lines, *more]),
            "Mend what is named and run again, or leave such names out with --exclude.",
        )
    return None


def _raise_problems(problems: tuple[Any, ...], *, as_json: bool) -> None:
    if problems:
        lines = [f"{each.name}: {each.reason}" for each in problems[:_NAMES_SAID]]
        error = IncompleteError(
            f"{len(problems)} names are not as they should be", "\n".join(lines), "The rest is there; look at these."
        )
        raise ReportedError(error) if as_json else error


# -- the mirror's side of verify and pull ------------------------------------------------------------------------


def verify_mirror(directory: str | None, mirror: str, *, deep: bool, quiet: bool, as_json: bool) -> None:
    """Check a mirror, and against its directory if that is named."""
    from backhaul.cli.progress import mirror_progress
    from backhaul.operations.mirror.verify import verify_mirror as operation
    from backhaul.operations.progress import MirrorProgress

    progress = MirrorProgress()
    progress.phase = "checking"
    with mirror_progress(progress, quiet=quiet or as_json):
        result = operation(mirror, directory, deep=deep, progress=progress)
    if as_json:
        print_json("verify-mirror", result)
    elif not quiet:
        out = console(sys.stdout)
        how = f"{format_size(result.bytes_read)} read and compared" if deep else "sizes, ETags and records compared"
        words = f"{result.files} files, {format_size(result.bytes)}: {how}"
        out.print(f"{mirror}: {words}; {len(result.problems) or 'no'} problems", markup=False)
    if result.problems:
        error = IntegrityError(
            f"{mirror} is not as it should be",
            "\n".join(f"{each.name}: {each.reason}" for each in result.problems[:_NAMES_SAID]),
            "Sync it, which sends what has changed, was lost or replaced, and verify again; else start over: --anew.",
        )
        raise ReportedError(error) if as_json else error


def pull_mirror(mirror: str, output: str, *, workers: int | None, retry_for: str, quiet: bool, as_json: bool) -> None:
    """Bring a mirror back into a directory."""
    from backhaul.cli.progress import mirror_progress
    from backhaul.operations.mirror.restore import pull_mirror as operation
    from backhaul.operations.progress import MirrorProgress

    progress = MirrorProgress()
    progress.phase = "pulling"
    with mirror_progress(progress, quiet=quiet or as_json):
        result = operation(mirror, output, workers=workers, patience=parse_duration(retry_for), progress=progress)
    if as_json:
        print_json("pull-mirror", result, file=sys.stderr)
    elif not quiet:
        checked = " and checked" if result.verified else ""
        words = f"{result.files} files, {format_size(result.bytes)} brought back to {output}{checked}"
        there = f"; {result.kept} were there" if result.kept else ""
        console().print(f"{words}{there}, {format_duration(result.seconds)}", markup=False)
    _raise_problems(result.problems, as_json=as_json)
