"""``backhaul init``: from nothing to a first good backup, a schedule and an alert that was tried."""

from __future__ import annotations

import getpass
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from backhaul.cli.command import option_json
from backhaul.cli.output import ReportedError, console, print_json
from backhaul.errors import BackhaulError, ConfigurationError, UsageError
from backhaul.formats.quantities import format_size

if TYPE_CHECKING:
    from backhaul.jobs.first import Answers, Outcome, Place, Step
    from backhaul.jobs.runner import Echo
    from backhaul.model.results import FoundSource, InitResult

_MARKS = {"ok": ("✓", "green"), "note": ("-", "yellow"), "problem": ("✗", "bold red")}
_Answer = TypeVar("_Answer")


@click.command(
    short_help="From nothing to a first backup, a schedule and a tested alert, in four questions.",
    epilog="""\b
Examples:
  backhaul init                                   asks, on a terminal
  backhaul init --to s3://acme/db7                without one: what is here, and the commands for it
  backhaul init --from postgresql:///orders --to s3://acme/db7 --notify dba@example.com --yes
  backhaul init --to /mnt/usb --notify nobody --schedule none --dry-run

\b
It looks whether all of it can work, before it writes anything; then it writes the config
(/etc/backhaul/config.toml or conf.d/NAME.toml; ~/.config/backhaul/config.toml of other users than
root; or --config), makes the first backups, tries the alert and installs the schedule: a backup each
night, old ones pruned, a drill each week. S3 keys and passwords that only this shell has are kept in
files that only their owner reads. What went wrong is said; running it again goes on.

\b
Exit status: 0 all of it, 1 a first backup failed, 3 the backup is there and an alert or the
schedule is not, 10 nothing was written.""",
)
@click.option("--from", "sources", metavar="URL", multiple=True, help="What to back up; repeatable.  [default: all]")
@click.option("--to", "store", metavar="STORE", help="Where to: s3://bucket/path, or a directory.")
@click.option(
    "--notify",
    "tell",
    metavar="ADDRESS|URL|@FILE|nobody",
    multiple=True,
    help="Whom to tell: by mail; by Slack, ntfy, Healthchecks or a webhook, whose URL may be in FILE, where no list of "
    "processes shows it; repeatable.",
)
@click.option("--at", "start", metavar="HH:MM", help="When the nightly window of 6 hours opens.  [default: 02:00]")
@click.option("--name", metavar="NAME", help="Of this set-up, where there are several.  [default: backups]")
@click.option(
    "--schedule",
    "how",
    type=click.Choice(["auto", "systemd", "cron", "none"]),
    help="What is to begin jobs.  [default: auto]",
)
@click.option("--smtp-host", metavar="HOST[:PORT]", default="", help="The mail server, instead of the local sendmail.")
@click.option("--yes", "-y", is_flag=True, help="Ask nothing.")
@click.option("--dry-run", is_flag=True, help="Print the config, and write nothing.")
@option_json("Print the result as one JSON object on stdout; ask nothing.")
def init(
    sources: tuple[str, ...],
    store: str | None,
    tell: tuple[str, ...],
    start: str | None,
    name: str | None,
    how: str | None,
    smtp_host: str,
    yes: bool,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Set up the backups of this host. Without a terminal, and without --to and --notify, only propose commands for
    the databases that answer here.
    """
    asks = sys.stdin.isatty() and sys.stderr.isatty() and not yes and not as_json
    if not (asks or yes or (store and tell)):
        _propose(store, as_json=as_json)
        return
    from backhaul.jobs.first import Answers, check_unchanged, place_of_config

    given = Answers(
        sources=sources,
        store=store or "",
        tell=tuple(_whom(text) for text in tell),
        start=start or "",
        name=name,
        how=how or "",
        smtp_host=smtp_host,
    )
    place = place_of_config(name)
    if place.text is not None:
        check_unchanged(place, given)
        answers = given
    else:
        answers = _asked(given) if asks else _completed(given)
    _Doing(as_json=as_json, dry_run=dry_run).do(answers, place)


class _Doing:
    """Does it, and says so."""

    def __init__(self, *, as_json: bool, dry_run: bool) -> None:
        self._as_json = as_json
        self._dry_run = dry_run
        self._steps: list[Step] = []
        self._out = console(sys.stderr)

    def do(self, answers: Answers, place: Place) -> None:
        from backhaul.jobs.first import Step, carry_out, draft_of, write
        from backhaul.jobs.schedule import AUTO, choose, this_host

        text, how = place.text, answers.how or place.how
        secrets: tuple[str, ...] = ()
        if text is not None:
            self.say(Step(name="config", state="ok", detail=f"{place.path} is there, made by init: going on with it"))
        else:
            draft = draft_of(answers, place, self.say, try_store=not self._dry_run)
            text, secrets = draft.text, tuple(draft.secrets)
            if not self._dry_run:
                write(draft, self.say)
        if self._dry_run:
            try:
                by = how if how != AUTO else choose(how, this_host())
            except ConfigurationError as error:
                by = f"nothing: {error.why}"
            self._print_dry(place, text, secrets, by)
            return
        try:
            outcome = carry_out(text, how, self.say, self._echo())
        except (BackhaulError, KeyboardInterrupt):
            click.echo(f"backhaul: {place.path} stays as it is; to go on: backhaul init --yes", err=True)
            raise
        self._end(place, outcome)

    def say(self, step: Step) -> None:
        """Take a step's result, and show it."""
        self._steps.append(step)
        if self._as_json:
            return
        from rich.text import Text

        mark, style = _MARKS[step.state]
        self._out.print(Text("  ").append(mark, style).append(f" {step.name}", "bold").append(f": {step.detail}"))
        for line in step.todo.splitlines() if step.state != "ok" else ():
            self._out.print(Text(f"      {line}", "dim"))

    def _echo(self) -> Echo | None:
        if self._as_json:
            return None

        def echo(_tag: bytes, text: bytes) -> None:
            # A job's lines are for people here: stdout has the report.
            click.echo(text, nl=False, err=True)

        return echo

    def _print_dry(self, place: Place, text: str, secrets: Sequence[str], by: str) -> None:
        if self._as_json:
            print_json(
                "init",
                {**self._document(place), "dry_run": True, "text": text, "secrets": list(secrets), "schedule": by},
            )
            return
        print(text, end="")  # noqa: T201
        plan = [
            f"{place.path} " + ("is there already" if place.text is not None else "would be written as above"),
            *(f"{path} would hold a secret, for its owner only" for path in secrets),
            f"jobs would be begun by {by}",
            "a backup would be made of each source, and the alert tried",
        ]
        for line in plan:
            self._out.print(f"  {line}", markup=False)

    def _document(self, place: Place) -> dict[str, Any]:
        return {"config": str(place.path), "dry_run": False, "steps": msgspec.to_builtins(self._steps)}

    def _end(self, place: Place, outcome: Outcome) -> None:
        from backhaul.reporting.messages import report_document
        from backhaul.reporting.text import report_text

        if self._as_json:
            print_json("init", {**self._document(place), "report": report_document(outcome.overview)})
        else:
            sys.stderr.flush()
            print(report_text(outcome.overview), end="", flush=True)  # noqa: T201
        if outcome.error is not None:
            raise ReportedError(outcome.error) if self._as_json else outcome.error


# -- answers ---------------------------------------------------------------------------------------------


def _completed(given: Answers) -> Answers:
    """Return the answers with what has a default.

    Raises:
        UsageError: something has none; its flag is named.
    """
    for flag, value, what in (("--to STORE", given.store, "where to"), ("--notify", given.tell, "whom to tell")):
        if not value:
            words = {"--notify": "silence must be an alarm", "--to STORE": "there is no place that is right everywhere"}
            raise UsageError(
                f"{flag.split()[0]} is missing: {what} is not known",
                words[flag],
                f"Add {flag}{' ADDRESS, URL or nobody' if flag == '--notify' else ''}.",
            )
    if given.sources:
        return given
    found = _default_sources(_find().found)
    if not found:
        raise UsageError(
            "--from is missing: there is nothing to back up",
            "no PostgreSQL, MariaDB or Redis that can be asked is on this host's sockets and default ports",
            "Name it: --from postgresql:///app, mariadb:///app, sqlite:///path/f.db, dir:///path",
        )
    return msgspec.structs.replace(given, sources=tuple(each.url for each in found))


def _whom(text: str) -> str:
    if not text.startswith("@"):
        return text
    try:
        return Path(text[1:]).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(
            f"{text[1:]} can't be read", str(error), "Write the URL there, and name it again: --notify @FILE."
        ) from error


def _asked(given: Answers) -> Answers:
    """Return the answers with what was asked for: four questions at most, each once until it can be used."""
    from backhaul.formats.first_config import DEFAULT_START, parse_start
    from backhaul.jobs.first import store_of

    changes: dict[str, Any] = {}
    if not given.sources:
        changes["sources"] = _ask_sources()
    if not given.store:
        place = "/var/backups/backhaul" if os.geteuid() == 0 else str(Path("~/backups").expanduser())
        click.echo(
            "\nA store is s3://bucket/path, or a directory. (One on this host's own disk goes with the host.)", err=True
        )
        changes["store"] = _ask("2. Where to", place, store_of)
    if not given.tell:
        changes["tell"] = _ask_whom(given)
    if not given.start:
        click.echo("", err=True)
        changes["start"] = _ask("4. When the nightly window of 6 hours opens", DEFAULT_START, parse_start)
    click.echo("", err=True)
    return msgspec.structs.replace(given, **changes)


def _ask(question: str, default: str | None, read: Callable[[str], _Answer]) -> _Answer:
    def reading(text: str) -> _Answer:
        try:
            return read(text.strip())
        except BackhaulError as error:
            raise click.UsageError(". ".join(filter(None, (f"{error.what}: {error.why}", error.todo)))) from error

    answer: _Answer = click.prompt(question, default=default, value_proc=reading, err=True)
    return answer


def _ask_sources() -> tuple[str, ...]:
    from backhaul.jobs.first import source_of

    found = _find().found
    usable = [each for each in found if not each.problem]
    for number, each in enumerate(usable, 1):
        click.echo(f"  {number}  {each.label}: {each.kind} {each.server}, {format_size(each.size)}", err=True)
    for each in found:
        if each.problem:
            click.echo(f"  -  {each.label}: {each.kind} is there, and can't be asked: {each.problem}", err=True)
    if not usable:
        click.echo("No database that can be asked was found on this host: write a URL or a path.", err=True)

    def read(text: str) -> tuple[str, ...]:
        if text == "all" and usable:
            return tuple(each.url for each in _default_sources(usable))
        words = text.replace(",", " ").split()
        if words and all(word.isdigit() for word in words):
            wrong = [word for word in words if not 1 <= int(word) <= len(usable)]
            if wrong:
                raise UsageError(f"There is no {wrong[0]}", f"the list has {len(usable)}", "Write e.g. 1,2 or all.")
            return tuple(dict.fromkeys(usable[int(word) - 1].url for word in words))
        return (source_of(text),)

    words = "numbers, a URL or a path" if usable else "a URL or a path"
    return _ask(f"1. What to back up ({words})", "all" if usable else None, read)


def _ask_whom(given: Answers) -> tuple[str, ...]:
    import shutil

    from backhaul.formats.first_config import NOBODY, channel_of

    def read(text: str) -> tuple[str, ...]:
        words = tuple(dict.fromkeys(text.replace(",", " ").split()))
        for word in words:
            if word != NOBODY:
                channel_of(word, host="localhost", sendmail="", smtp_host=given.smtp_host)
            elif len(words) > 1:
                raise UsageError(f"{NOBODY} stands beside somebody", "it is one or the other", f"Leave out {NOBODY}.")
        return words

    local = not given.smtp_host and shutil.which("sendmail", path="/usr/sbin:/usr/lib:/usr/bin") is not None
    click.echo("\nA mail address, or an http(s) URL (Slack, ntfy, Healthchecks, a webhook), or nobody.", err=True)
    return _ask("3. Whom to tell when a backup fails or is missing", getpass.getuser() if local else None, read)


def _default_sources(found: Sequence[FoundSource]) -> list[FoundSource]:
    """Return all that can be asked; of a server so large that a copy of its files is proposed, only that."""
    usable = [each for each in found if not each.problem]
    whole = {(each.kind.partition("+")[0], each.url.partition("?")[2]) for each in usable if "+physical" in each.kind}
    return [each for each in usable if "+physical" in each.kind or (each.kind, each.url.partition("?")[2]) not in whole]


def _find() -> InitResult:
    from backhaul.operations.init import init as operation

    return operation(None)


# -- proposals -------------------------------------------------------------------------------------------


def _propose(store: str | None, *, as_json: bool) -> None:
    """Print the commands that try, push and prove what is found; nothing is written or changed."""
    from backhaul.operations.init import init as operation

    result = operation(store)
    if as_json:
        print_json("init", result)
        return
    out = console(sys.stdout)
    for source in result.found:
        out.print(
            f"# {source.label}: {source.kind} {source.server}, {format_size(source.size)}"
            if not source.problem
            else f"# {source.label}: {source.kind} is there, and can't be asked: {source.problem}",
            markup=False,
        )
        for command in source.commands:
            out.print(command, markup=False)
    if not result.found:
        out.print(
            "# No PostgreSQL, MariaDB or Redis answers on this host's sockets and default ports.\n"
            "# Name one: backhaul doctor 'postgresql:///DATABASE?host=/run/DIR&port=5433'\n"
            "#           backhaul doctor 'mariadb:///DATABASE?socket=/run/DIR/s.sock'   (see backhaul push --help)",
            markup=False,
        )
    elif store is None:
        out.print(f"# Put your store for {result.store}, or say it: backhaul init --to s3://...", markup=False)
    if result.found:
        words = f"--to {store or 'STORE'} --notify ADDRESS"
        out.print(f"# All of it, each night, with an alert when it fails: backhaul init {words}", markup=False)
