"""``backhaul run``, ``exec``, ``next``, ``hold``, ``log`` and ``why``."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import queue
import re
import sys
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

import click
import msgspec

from backhaul.cli.command import TAIL, TailCommand, option_json
from backhaul.cli.output import announce, console, print_error, print_json
from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    FailedError,
    IncompleteError,
    LockBusyError,
    SkippedError,
    UsageError,
)
from backhaul.formats.quantities import format_duration, parse_duration

if TYPE_CHECKING:
    from backhaul.jobs.host import JobHost
    from backhaul.model.job import Job, RunRecord

_JSON_HELP = "Print one JSON object on stdout."
_STAGE = "|"
# What several jobs end with: the first of these that one of them did, or else 1.
_SEVERITY = (10, 11, 3, 75, 0)
_QUIET_LINES = 30
_LONGEST_HOLD = 366 * 86400.0


@click.command(
    short_help="Run jobs of the config, one after the other.",
    epilog="""\b
Examples:
  backhaul run orders
  backhaul run orders drill-orders --now
  backhaul run --scheduled --quiet orders      (what timers and cron call)

\b
Each line that a job prints is kept with its time; backhaul log JOB shows it. Exit status: what the
job ended with; 75 its window is closed or it is held, 11 it is running already. Of several jobs
the worst.""",
)
@click.argument("names", metavar="JOB...", nargs=-1, required=True)
@click.option("--now", "at_once", is_flag=True, help="Run outside the window, too.")
@click.option("--despite-hold", is_flag=True, help="Run though it is held.")
@click.option(
    "--scheduled", is_flag=True, help="As the schedule does: once in each opening of the window, after the jitter."
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing while all is well; what it said last when it is not.")
@option_json("Print the records of the runs as one JSON object on stdout.")
@click.pass_context
def run(
    ctx: click.Context,
    names: tuple[str, ...],
    at_once: bool,
    despite_hold: bool,
    scheduled: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run each JOB of the config, if its window is open and nothing holds it."""
    from backhaul.jobs.host import JobHost
    from backhaul.model.job import BY_HAND, SCHEDULED

    if scheduled and at_once:
        raise UsageError("--scheduled and --now exclude each other", "the one waits for the window", "Leave one out.")
    with JobHost(last_config=scheduled) as host:
        if scheduled:
            host.looked()
        found = [host.job(name, note=True) for name in names]
        records: list[RunRecord] = []
        errors: list[BackhaulError] = []
        for job in found:
            record, error = _run_one(
                host,
                job,
                quiet=quiet or as_json,
                trigger=SCHEDULED if scheduled else BY_HAND,
                at_once=at_once,
                despite_hold=despite_hold,
            )
            if record is not None:
                records.append(record)
            if error is not None:
                errors.append(error)
                # A timer that calls a job which ran already, or is held, did nothing wrong.
                if not (scheduled and quiet and isinstance(error, SkippedError)):
                    print_error(error)
    if as_json:
        print_json("run", {"runs": records})
    announce("run", {"runs": records})
    statuses = [record.exit_status or 0 for record in records] + [
        error.exit_code for error in errors if isinstance(error, LockBusyError | ConfigurationError)
    ]
    ctx.exit(_worst(statuses))


def _run_one(
    host: JobHost,
    job: Job,
    *,
    quiet: bool,
    trigger: str,
    at_once: bool = False,
    despite_hold: bool = False,
    inherit_input: bool = False,
) -> tuple[RunRecord | None, BackhaulError | None]:
    """Run one job; return its record, and what there is to say of it as an error."""
    from backhaul.model import job as jobs

    passed_on = None if quiet else _PassedOn()
    runner = host.runner(passed_on, passed_on.ready if passed_on is not None else lambda: True)
    try:
        record = runner.run(
            job, trigger=trigger, at_once=at_once, despite_hold=despite_hold, inherit_input=inherit_input
        )
    except (LockBusyError, ConfigurationError) as error:
        return None, error
    finally:
        if passed_on is not None:
            passed_on.close()
        for problem in (*runner.problems, *host.history.problems):
            click.echo(f"backhaul: {problem}", err=True)
    name = job.card.name
    see = f"All that it said: backhaul log {name}" if record.lines else f"See: backhaul why {name}"
    if record.state == jobs.OK:
        if not quiet and trigger == jobs.BY_HAND:
            from backhaul.reporting.words import figures

            click.echo(f"backhaul: {name}: ok, {figures(record)}", err=True)
        for remark in record.remarks:
            click.echo(f"backhaul: {name}: {remark}", err=True)
        return record, None
    if record.state == jobs.SKIPPED:
        closed = record.occurrence == "" and job.card.window is not None
        todo = "To run it all the same: --now" if closed else "To run it all the same: --despite-hold"
        if "ran in this window" in record.why or "running" in record.why:
            todo = f"To run it once more: backhaul run {name}"
        return record, SkippedError(f"The job {name} was skipped", record.why, todo)
    why = record.why + ("\n" + _last_lines(host, record) if quiet else "")
    if record.state in (jobs.INCOMPLETE, jobs.STOPPED):
        return record, IncompleteError(f"The job {name} is {record.state}", why, see)
    return record, FailedError(f"The job {name} {record.state}", why, see)


def _last_lines(host: JobHost, record: RunRecord) -> str:
    """Return the end of what a quiet run said: cron mails it."""
    from backhaul.jobs.log import LogReader

    text = b"".join(LogReader(host.history.log_path(record.job, record.id)).new())[-(1 << 16) :]
    return "\n".join(text.decode(errors="replace").splitlines()[-_QUIET_LINES:]) or record.last_words


class _PassedOn:
    """Passes lines on by a thread of its own: whoever reads them may stall, and the job's limits hold all the same."""

    _MOST = 64
    # So long the last lines are waited for when nobody takes them.
    _PATIENCE = 10.0

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[bytes, bytes] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="backhaul-echo", daemon=True)
        self._thread.start()

    def __call__(self, tag: bytes, text: bytes) -> None:
        self._queue.put((tag, text))

    def ready(self) -> bool:
        return self._queue.qsize() < self._MOST

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join(self._PATIENCE)

    def _work(self) -> None:
        from backhaul.jobs.log import OUTPUT

        gone = False
        while (item := self._queue.get()) is not None:
            tag, text = item
            try:
                view = memoryview(b"" if gone else text)
                while view:
                    view = view[os.write(1 if tag == OUTPUT else 2, view) :]
            except OSError:
                gone = True  # whoever listened went away; the job goes on, and its log has it all


def _worst(statuses: Sequence[int]) -> int:
    if len(statuses) == 1:
        return statuses[0]
    if any(status not in _SEVERITY for status in statuses):
        return 1
    return next((status for status in _SEVERITY if status in statuses), 0)


@click.command(
    "exec",
    cls=TailCommand,
    short_help="Run any command: stamped, recorded, reported.",
    epilog="""\b
Examples:
  backhaul exec -- /usr/local/bin/nightly.sh
  backhaul exec --name billing --time-limit 2h --retries 2 -- /usr/local/bin/billing.sh
  backhaul exec --quiet -- mysqldump app '|' gzip -1 '|' ssh db8 'cat > app.sql.gz'

\b
A word that is a bar ('|', quoted) parts the programs of a pipeline. If one of them fails, those
behind it are killed before they could take what they have for the whole. Exit status: the
command's own; of a pipeline that of the first program that failed, 128 + N for signal N.""",
)
@click.option(
    "--name",
    metavar="NAME",
    help="What the runs are recorded under, and watched: reports tell of them.  [default: the program's name, recorded "
    "alone]",
)
@click.option("--time-limit", metavar="DURATION", help="End it after so long.")
@click.option("--retries", type=click.IntRange(0, 100), default=0, show_default=True, help="Try again so often.")
@click.option("--backoff", metavar="DURATION", default="1m", show_default=True, help="The pause before; it doubles.")
@click.option("--lock", metavar="FILE", help="Hold this lock meanwhile (flock).")
@click.option("--despite-hold", is_flag=True, help="Run though what has this name is held.")
@click.option(
    "--log-size", metavar="SIZE", default="16Mi", show_default=True, help="Most that is kept of what it says."
)
@click.option("--quiet", "-q", is_flag=True, help="Print nothing while all is well; what it said last when it is not.")
@option_json("Print the record of the run as one JSON object on stdout.")
@click.pass_context
def exec_(
    ctx: click.Context,
    name: str | None,
    time_limit: str | None,
    retries: int,
    backoff: str,
    lock: str | None,
    despite_hold: bool,
    log_size: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Run COMMAND, or a pipeline; keep each line with its time, and how each program ended."""
    import socket

    from backhaul.formats.config import Config
    from backhaul.formats.quantities import parse_size
    from backhaul.jobs.config import described_command
    from backhaul.jobs.host import JobHost
    from backhaul.model.job import COMMAND, EXEC, Job, JobCard

    stages = _stages(ctx.meta[TAIL])
    given = name or re.sub(r"[^A-Za-z0-9_-]+", "-", os.path.basename(stages[0][0])).strip("-_") or "command"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", given):
        raise UsageError(f"{given!r} can't be a job's name", "names have letters, digits, - and _", "Choose another.")
    _check_exec_name(given)
    with JobHost(Config()) as host:
        job = Job(
            card=JobCard(name=given, host=socket.gethostname(), kind=COMMAND, what=described_command(stages)),
            stages=stages,
            time_limit=parse_duration(time_limit) if time_limit is not None else None,
            retries=retries,
            backoff=parse_duration(backoff),
            lock=lock,
            log_size=parse_size(log_size),
            # What nobody has named is recorded, and that is all: it is no job that could run twice, or be held.
            watched=name is not None,
            alone=name is not None,
        )
        if name is not None:
            host.history.note_job(job.card)
        record, error = _run_one(
            host,
            job,
            quiet=quiet or as_json,
            trigger=EXEC,
            despite_hold=despite_hold or name is None,
            inherit_input=True,
        )
        if error is not None:
            if record is None:
                raise error
            print_error(error)
    assert record is not None
    if as_json:
        print_json("exec", record)
    ctx.exit(record.exit_status or 0)


def _check_exec_name(name: str) -> None:
    """Refuse the name of a job of the config: its records would be taken for that job's own."""
    from backhaul.formats.config import TAKEN_NAMES
    from backhaul.jobs.config import load_config

    names: tuple[str, ...] = ()
    with contextlib.suppress(BackhaulError):  # one that is not right keeps no command from running
        names = tuple(load_config().jobs)
    if name in names or name in TAKEN_NAMES:
        raise UsageError(
            f"{name!r} can't be the name of this run",
            "it is a job of the config" if name in names else "it means something to the command line",
            "Give another one with --name.",
        )


def _stages(tail: list[str] | None) -> tuple[tuple[str, ...], ...]:
    if not tail:
        raise UsageError("There is no command", "nothing follows the --", "Write e.g.: backhaul exec -- pg_dump app")
    stages: list[list[str]] = [[]]
    for word in tail:
        if word == _STAGE:
            stages.append([])
        else:
            stages[-1].append(word)
    if not all(stages):
        raise UsageError("A program of the pipeline is missing", "two bars, or one at an end", "Write: -- A '|' B")
    return tuple(tuple(stage) for stage in stages)


@click.command("next", short_help="When jobs run in the next days.")
@click.argument("names", metavar="[JOB]...", nargs=-1)
@click.option("--days", type=click.IntRange(1, 366), default=14, show_default=True, help="How far to look.")
@option_json(_JSON_HELP)
def next_(names: tuple[str, ...], days: int, as_json: bool) -> None:
    """Show each opening of the jobs' windows in the next days, with when the run begins and is expected to end."""
    from rich.text import Text

    from backhaul.jobs.host import JobHost
    from backhaul.jobs.scheduler import coming
    from backhaul.planning.dispatch import hold_on
    from backhaul.planning.forecast import forecast_end, late_by, usual_seconds

    with JobHost() as host:
        holds = host.holds.in_force()
        usual = {name: usual_seconds(host.history.runs(name, 50)) for name in host.config.jobs}
        rows: list[dict[str, Any]] = []
        for name, opening in coming(host, days, names):
            window = host.job(name).card.window
            assert window is not None
            zone = ZoneInfo(window.timezone)
            end = forecast_end(opening.begins, 0.0, usual=usual[name])
            hold = hold_on(name, holds, opening.begins)
            rows.append(
                {
                    "job": name,
                    "opens": opening.opens.astimezone(zone).isoformat(),
                    "begins": opening.begins.astimezone(zone).isoformat(),
                    "closes": opening.closes.astimezone(zone).isoformat(),
                    "ends": end.astimezone(zone).isoformat(timespec="seconds") if end is not None else None,
                    "late": late_by(end, opening.closes),
                    "held_until": hold.until if hold is not None else None,
                }
            )
    if as_json:
        print_json("next", {"openings": rows})
        return
    out = console(sys.stdout)
    if not rows:
        out.print("No job has a window that opens in these days.", style="dim")
    width = max((len(row["job"]) for row in rows), default=0)
    for row in rows:
        begins, closes = dt.datetime.fromisoformat(row["begins"]), dt.datetime.fromisoformat(row["closes"])
        line = Text(f"{begins:%a %Y-%m-%d %H:%M %Z}  ").append(f"{row['job']:<{width}}", "bold")
        line.append(f"  until {closes:%H:%M}", "dim")
        if row["ends"] is not None:
            ends = dt.datetime.fromisoformat(row["ends"])
            words = f"  ends about {ends:%H:%M}"
            if row["late"]:
                line.append(f"{words}, {format_duration(row['late'])} past the window", "yellow")
            else:
                line.append(words, "dim")
        if row["held_until"] is not None:
            line.append(f"  held until {row['held_until']}", "yellow")
        out.print(line)


@click.command(
    cls=TailCommand,
    short_help="Pause jobs for a while, or keep a backup from being pruned.",
    epilog="""\b
Examples:
  backhaul hold                                        what is held
  backhaul hold orders --for 2h --reason 'ALTER TABLE'
  backhaul hold all --for 45m --reason groom
  backhaul hold --release orders
  backhaul hold with all -- /usr/local/bin/groom.sh    held while the command runs
  backhaul hold s3://acme/db7/orders@20261121T020000Z --for 90d --reason audit

\b
A hold ends by itself. A mirror that runs finishes the files that it has begun and stops; other
jobs go on to their end: hold with waits for them. The exit status of hold with is the command's.""",
)
@click.argument("words", metavar="[JOB|all|SERIES@WHEN|with [JOB|all]]", nargs=-1)
@click.option("--for", "length", metavar="DURATION", help="How long; for a backup until it is released, without it.")
@click.option("--reason", default="", metavar="TEXT", help="Why: people read it.")
@click.option("--release", is_flag=True, help="End it now; without a name all of them.")
@click.option(
    "--wait", default="6h", show_default=True, metavar="DURATION", help="hold with: wait so long for jobs that run."
)
@option_json(_JSON_HELP)
@click.pass_context
def hold(
    ctx: click.Context, words: tuple[str, ...], length: str | None, reason: str, release: bool, wait: str, as_json: bool
) -> None:
    """Pause JOB, or all jobs, for a while; with a COMMAND, while that runs. Without arguments show what is held."""
    tail = ctx.meta[TAIL]
    if words[:1] == ("with",) or tail is not None:
        ctx.exit(_hold_with(words, tail, length, reason, parse_duration(wait)))
    if len(words) > 1:
        raise UsageError(
            f"{words[1]!r} is one too many", "one thing is held at a time", "Hold them one after the other."
        )
    name = words[0] if words else None
    if name is not None and any(sign in name for sign in "/@:"):
        _hold_backup(name, length, reason, release=release, as_json=as_json)
    elif release:
        _release(name, as_json=as_json)
    elif name is None:
        _show_holds(as_json=as_json)
    else:
        _hold_job(name, length, reason, as_json=as_json)


def _hold_job(name: str, length: str | None, reason: str, *, as_json: bool) -> None:
    from backhaul.jobs.host import JobHost

    if length is None:
        raise UsageError("The hold has no end", "one that nobody ends would be forgotten", "Say how long: --for 2h")
    seconds = parse_duration(length)
    if seconds > _LONGEST_HOLD:
        raise UsageError(f"--for {length} is no pause", "it is more than a year", "Take the job out of the config.")
    with JobHost() as host:
        _check_job(host, name)
        made = host.holds.add(name, host.now() + dt.timedelta(seconds=seconds), reason)
        warnings = _warnings(host, name)
    if as_json:
        print_json("hold", {"hold": made, "warnings": warnings})
        return
    console(sys.stdout).print(f"{name} is held until {_clock(made.until)}", markup=False)
    for warning in warnings:
        console(sys.stdout).print(f"  {warning}", style="yellow", markup=False)


def _warnings(host: JobHost, name: str) -> list[str]:
    from backhaul.model.job import ALL_JOBS

    verdicts = host.overview(*(() if name == ALL_JOBS else (name,))).verdicts
    return [f"{verdict.card.name}: {text}" for verdict in verdicts for text in verdict.warnings]


def _check_job(host: JobHost, name: str) -> None:
    from backhaul.model.job import ALL_JOBS

    if name != ALL_JOBS and name not in host.history.names():
        host.job(name)  # says what there is


def _release(name: str | None, *, as_json: bool) -> None:
    from backhaul.jobs.host import JobHost

    with JobHost() as host:
        if name is not None:
            _check_job(host, name)
        ended = host.holds.release(name)
    if as_json:
        print_json("hold", {"released": ended})
        return
    if not ended:
        raise FailedError(
            f"Nothing was released{f' for {name}' if name else ''}", "no such hold is in force", "See: backhaul hold"
        )
    for each in ended:
        console(sys.stdout).print(f"{each.job} is not held any more", markup=False)


def _show_holds(*, as_json: bool) -> None:
    from backhaul.jobs.host import JobHost

    with JobHost() as host:
        there = host.holds.in_force()
        problems = host.holds.problems
    if as_json:
        print_json("holds", {"holds": there, "problems": problems})
        return
    out = console(sys.stdout)
    for each in there:
        reason = f": {each.reason}" if each.reason else ""
        out.print(f"{each.job} until {_clock(each.until)}, by {each.by}{reason}", markup=False)
    if not there:
        out.print("Nothing is held.", style="dim")
    for problem in problems:
        out.print(problem, style="yellow", markup=False)


def _hold_backup(reference: str, length: str | None, reason: str, *, release: bool, as_json: bool) -> None:
    from backhaul.operations.backup_hold import hold_backup, release_backup

    out = console(sys.stdout)
    if release:
        count = release_backup(reference)
        if as_json:
            print_json("hold", {"released": count})
        else:
            out.print(f"{reference}: {count} hold{'s' * (count != 1)} released", markup=False)
        return
    made = hold_backup(reference, length=parse_duration(length) if length is not None else None, reason=reason)
    if as_json:
        print_json("hold", {"hold": made})
        return
    until = f"until {made.until}" if made.until else "until it is released"
    out.print(f"Backup {made.id} is kept from prune {until}", markup=False)


def _hold_with(words: tuple[str, ...], tail: list[str] | None, length: str | None, reason: str, patience: float) -> int:
    """Run a command under a hold: jobs that run end first, none begins meanwhile."""
    from backhaul.jobs.host import JobHost
    from backhaul.jobs.runner import is_running
    from backhaul.model.job import ALL_JOBS
    from backhaul.processes.command import Command

    if words[:1] != ("with",) or len(words) > 2 or not tail:
        raise UsageError(
            "A hold around a command begins with the word 'with'",
            "there is no command behind the --" if not tail else "other words stand before it",
            "Write: backhaul hold with all -- COMMAND",
        )
    name = words[1] if len(words) > 1 else ALL_JOBS
    # It ends with this process; the time is for the case that nothing of the sort can be told any more.
    seconds = parse_duration(length) if length is not None else 7 * 86400.0
    if seconds > _LONGEST_HOLD:
        raise UsageError(f"--for {length} is no pause", "it is more than a year", "Leave it out.")
    with JobHost() as host:
        _check_job(host, name)
        made = host.holds.add(
            name, host.now() + dt.timedelta(seconds=seconds), reason or _program(tail), with_process=True
        )
        try:
            deadline = time.monotonic() + patience
            waiting = ""
            while busy := [job for job in _held_jobs(host, name) if is_running(host.history, job)]:
                if ", ".join(busy) != waiting:
                    waiting = ", ".join(busy)
                    click.echo(f"backhaul: waiting for {waiting} to finish its part", err=True)
                if time.monotonic() > deadline:
                    raise LockBusyError(
                        f"{waiting} is still running",
                        f"it was waited for {format_duration(patience)} (--wait)",
                        "Wait longer, or end it; the command was not run.",
                    )
                time.sleep(0.5)
            command = Command(tail)
            try:
                status = command.wait()
                if status.ok:
                    command.release()
            finally:
                command.kill()
            if status.error is not None:
                raise FailedError(f"{command.name} did not run", str(status), "Correct the command.")
            return status.code if status.code is not None else 128 + (status.signal or 0)
        finally:
            host.holds.release(id_=made.id)


def _held_jobs(host: JobHost, name: str) -> list[str]:
    from backhaul.model.job import ALL_JOBS

    return list(dict.fromkeys([*host.config.jobs, *host.history.names()])) if name == ALL_JOBS else [name]


def _program(tail: list[str]) -> str:
    import shlex

    from backhaul.formats.redaction import redact_command

    return shlex.join(redact_command(tail))[:200]


def _clock(text: str) -> str:
    return f"{dt.datetime.fromisoformat(text).astimezone():%a %Y-%m-%d %H:%M %Z}"


@click.command(
    short_help="What a run of a job said.",
    epilog="""\b
Examples:
  backhaul log                      all jobs' last runs
  backhaul log orders               what the last run said
  backhaul log orders --runs        its runs
  backhaul log orders 20261120T2107 one of them
  backhaul log orders --follow      what it says now

\b
Each line has its time and whether it is stdout (O), stderr (E) or Backhaul itself (B).""",
)
@click.argument("job", required=False)
@click.argument("which", metavar="[RUN]", default="")
@click.option("--runs", is_flag=True, help="List the runs instead.")
@click.option("--follow", "-f", is_flag=True, help="Go on while it runs.")
@click.option("--forget", is_flag=True, help="Remove all runs and logs of JOB that this host has.")
@option_json("Print the records as one JSON object on stdout.")
def log(job: str | None, which: str, runs: bool, follow: bool, forget: bool, as_json: bool) -> None:
    """Show what a RUN of JOB said, by default the last one; without JOB the last run of each."""
    from backhaul.jobs.host import JobHost

    with JobHost() as host:
        if forget:
            _forget(host, job, as_json=as_json)
            return
        if job is None or runs:
            names = [job] if job is not None else sorted(host.history.names())
            if job is not None:
                _check_job(host, job)
            found = [record for name in names for record in host.history.runs(name, 400 if runs else 1)]
            found.sort(key=lambda record: dt.datetime.fromisoformat(record.started), reverse=True)
            _list_runs(found, as_json=as_json)
            return
        _check_job(host, job)
        record = host.history.find(job, which)
        if record is None:
            raise FailedError(
                f"There is no such run of {job}",
                f"none begins with {which}" if which else "it has never run",
                f"backhaul log {job} --runs lists them." if which else f"Run it: backhaul run {job}",
            )
        if as_json:
            print_json("log", {"run": record, "path": str(host.history.log_path(job, record.id))})
            return
        _print_log(host, record, follow=follow)


def _forget(host: JobHost, job: str | None, *, as_json: bool) -> None:
    from backhaul.jobs.runner import is_running

    if job is None:
        raise UsageError("--forget forgets nothing", "no JOB is named", "Name the one: backhaul log JOB --forget")
    _check_job(host, job)
    if is_running(host.history, job):
        raise LockBusyError(f"The job {job} is running", "what it says now would be lost", "Wait for it to end.")
    count = host.history.forget(job)
    if as_json:
        print_json("log", {"job": job, "forgotten": count})
    else:
        click.echo(f"{count} run{'s' * (count != 1)} of {job} forgotten; those beside backups stay")


def _list_runs(found: list[RunRecord], *, as_json: bool) -> None:
    from rich.text import Text

    from backhaul.reporting.words import figures

    if as_json:
        print_json("runs", {"runs": found})
        return
    out = console(sys.stdout)
    width = max((len(record.job) for record in found), default=0)
    styles = {"ok": "green", "failed": "bold red", "died": "bold red", "interrupted": "red", "skipped": "dim"}
    for record in found:
        line = Text(f"{record.id}  ").append(f"{record.job:<{width}}", "bold")
        line.append(f"  {record.state:<11}", styles.get(record.state, "yellow"))
        details = "; ".join(part for part in (figures(record), record.why) if part)
        out.print(line.append(f"  {details}" if details else ""))
    if not found:
        out.print("Nothing has run yet.", style="dim")


def _print_log(host: JobHost, record: RunRecord, *, follow: bool) -> None:
    from backhaul.jobs.log import LogReader
    from backhaul.model.job import DIED, RUNNING

    path = host.history.log_path(record.job, record.id)
    reader = LogReader(path)
    if not path.exists():
        raise FailedError(
            f"The log of {record.id} can't be read",
            f"{path} is not there",
            "Its record has the last words: backhaul log --json",
        )
    silent = True
    while True:
        now = host.history.find(record.job, record.id)
        ended = now is None or now.state != RUNNING
        for data in reader.new():
            sys.stdout.buffer.write(data)
            silent = False
        sys.stdout.buffer.flush()
        if ended or not follow:
            if ended and (silent or (now is not None and now.state == DIED)):
                words = f"{now.state}: {now.why}" if now is not None and now.why else now.state if now else "gone"
                click.echo(f"backhaul: {record.id} {'said nothing and ' if silent else ''}ended {words}", err=True)
            return
        time.sleep(0.5)


@click.command(short_help="Why a job did or did not run, in a paragraph.")
@click.argument("job")
@option_json(_JSON_HELP)
def why(job: str, as_json: bool) -> None:
    """Say when JOB runs, what keeps it from running, and what became of it last."""
    from backhaul.jobs.host import JobHost
    from backhaul.jobs.runner import is_running, running_now
    from backhaul.reporting.why import why_text

    with JobHost() as host:
        _check_job(host, job)
        overview = host.overview(job)
        if not overview.verdicts:
            raise FailedError(
                f"Nothing is expected of {job}", "it is not in the config any more", f"See: backhaul log {job} --runs"
            )
        verdict = overview.verdicts[0]
        facts = [_timer(host, job)] if verdict.card.window is not None else []
        running = running_now(host.history, job)
        holder = f" by process {running.pid}" if running is not None else ""
        facts.append(f"Its lock is held{holder}." if is_running(host.history, job) else "Its lock is free.")
        facts += [f"{problem[:1].upper()}{problem[1:]}." for problem in overview.problems]
        if as_json:
            print_json("why", {"verdict": msgspec.to_builtins(verdict), "facts": facts})
            return
        print(why_text(verdict, host.now(), facts), end="")  # noqa: T201


def _timer(host: JobHost, job: str) -> str:
    from backhaul.jobs.own_schedule import state_of

    try:
        state = state_of(host)
    except BackhaulError as error:
        return f"What begins it can't be told: {error.what}: {error.why}."
    for each in state.jobs:
        if each.job == job:
            by = f" ({state.how})" if state.how else ""
            todo = "" if each.state in ("installed", "by the tick") else ": backhaul schedule install"
            return f"What begins it{by} is {each.state}{todo}."
    return "Nothing begins it: backhaul schedule install."
