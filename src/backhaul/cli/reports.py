"""``backhaul report``, ``check``, ``metrics`` and ``notify``: what is known of jobs, for people and programs."""

from __future__ import annotations

import datetime as dt
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from backhaul.cli.command import ExampleGroup, option_json
from backhaul.cli.output import console, print_json
from backhaul.errors import ConfigurationError, FailedError, NotifyError, UsageError

if TYPE_CHECKING:
    from backhaul.model.verdict import Overview

_STORE = click.option(
    "--store", metavar="STORE", help="Judge by the records that lie there, of whatever host, instead of this one's own."
)


def _overview(names: tuple[str, ...], store: str | None) -> Overview:
    import msgspec

    from backhaul.jobs.host import JobHost
    from backhaul.jobs.overview import overview_of_store

    if store is not None:
        found = overview_of_store(store, dt.datetime.now(dt.UTC))
        if names:
            verdicts = tuple(verdict for verdict in found.verdicts if verdict.card.name in names)
            found = msgspec.structs.replace(found, verdicts=verdicts)
        return found
    with JobHost() as host:
        found = host.overview(*names)
        for name in names:
            # Somebody means to watch it: one that nothing is known of is an error, which says what there is.
            if all(verdict.card.name != name for verdict in found.verdicts):
                host.job(name)
        return found


@click.command(
    short_help="All jobs at a glance: what is wrong first.",
    epilog="""\b
Examples:
  backhaul report
  backhaul report --html > report.html
  backhaul report --send
  backhaul report --store s3://acme/db7/orders

\b
The first line is what a mail has as its subject.""",
)
@click.argument("names", metavar="[JOB]...", nargs=-1)
@_STORE
@click.option("--html", "as_html", is_flag=True, help="As a page.")
@click.option("--send", is_flag=True, help="Send it by the channels that the jobs have.")
@option_json("As one JSON object.")
def report(names: tuple[str, ...], store: str | None, as_html: bool, send: bool, as_json: bool) -> None:
    """Print what is known of all jobs, on one screen."""
    from backhaul.reporting.html import report_html
    from backhaul.reporting.messages import report as message_of
    from backhaul.reporting.messages import report_document
    from backhaul.reporting.text import report_text

    overview = _overview(names, store)
    if send:
        from backhaul.jobs.host import JobHost

        with JobHost() as host:
            channels = host.alerts.all_channels()
            if not channels:
                raise ConfigurationError(
                    "The report can't be sent", "no job has a channel", 'Write notify = "NAME" into [defaults].'
                )
            deliveries = host.alerts.deliver(message_of(overview), channels, everyone=True)
        wrong = [each for each in deliveries if each.error]
        if wrong:
            raise NotifyError(
                "The report was not delivered by all channels",
                "\n".join(f"{each.channel}: {each.error}" for each in wrong),
                "Try them: backhaul notify test",
            )
    if as_json:
        print_json("report", report_document(overview))
    elif as_html:
        print(report_html(overview), end="")  # noqa: T201
    elif sys.stdout.isatty():
        _print_coloured(report_text(overview), overview)
    else:
        print(report_text(overview), end="")  # noqa: T201


def _print_coloured(text: str, overview: Overview) -> None:
    from rich.text import Text

    styles = {"failed": "bold red", "overdue": "bold red", "incomplete": "yellow", "ok": "green", "running": "blue"}
    out = console(sys.stdout)
    for number, line in enumerate(text.splitlines()):
        shown = Text(line)
        if number == 0:
            shown.stylize(styles.get(overview.state, "bold"))
        for state, style in styles.items():
            for word in (state, state.upper()):
                if line.startswith(f"  {word} "):
                    shown.stylize(style, 2, 2 + len(word))
        out.print(shown)


@click.command(
    short_help="Whether all is well, as an exit status.",
    epilog="""\b
Examples:
  backhaul check
  backhaul check --nagios
  backhaul check --store s3://acme/db7/orders      from another host: a dead server is noticed

\b
Exit status: 0 all is well, 1 a job failed or is overdue, 3 something is incomplete or has never
run. With --nagios that of a plugin: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN.""",
)
@click.argument("names", metavar="[JOB]...", nargs=-1)
@_STORE
@click.option("--nagios", is_flag=True, help="As a plugin of Nagios, Icinga and their kin.")
@option_json("As one JSON object.")
@click.pass_context
def check(ctx: click.Context, names: tuple[str, ...], store: str | None, nagios: bool, as_json: bool) -> None:
    """Judge all jobs, or those that are named, and end with the worst."""
    from backhaul.errors import BackhaulError
    from backhaul.reporting import check as reporting
    from backhaul.reporting.messages import report_document
    from backhaul.reporting.words import headline, subject

    try:
        overview = _overview(names, store)
    except Exception as error:
        if not nagios:
            raise
        why = f"{error.what}: {error.why}" if isinstance(error, BackhaulError) else f"{type(error).__name__}: {error}"
        print(f"BACKHAUL UNKNOWN - {' '.join(why.split())}".replace("|", "/"))  # noqa: T201
        ctx.exit(3)
    if store is not None and not overview.verdicts and not nagios:
        raise FailedError(
            f"{store} holds no records of jobs",
            "nothing there tells of a run",
            "Name the SERIES or MIRROR of a job, or a path above it; records are written by backhaul run.",
        )
    if as_json:
        print_json("check", report_document(overview))
    elif nagios:
        print(reporting.nagios_text(overview), end="")  # noqa: T201
    else:
        lines = [subject(overview)]
        lines += [headline(verdict) for verdict in overview.verdicts if verdict.state not in ("ok", "running", "held")]
        lines = lines[:1] if len(lines) == 2 else lines
        lines += [f"PROBLEM: {problem}" for problem in overview.problems]
        lines += [f"UNDELIVERED: {each.subject} ({each.channel}: {each.error})" for each in overview.undelivered]
        for line in dict.fromkeys(lines):
            print(line)  # noqa: T201
    ctx.exit(reporting.nagios_status(overview) if nagios else reporting.exit_status(overview))


@click.command(
    short_help="The same as metrics for Prometheus.",
    epilog="""\b
Examples:
  backhaul metrics
  backhaul metrics -o /var/lib/node_exporter/textfile/backhaul.prom
  backhaul metrics --push http://127.0.0.1:9091/metrics/job/backhaul/instance/db7""",
)
@_STORE
@click.option("-o", "--output", metavar="FILE", help="Write it into FILE, at once (the textfile collector's).")
@click.option("--push", "gateway", metavar="URL", help="Put it to a Pushgateway.")
def metrics(store: str | None, output: str | None, gateway: str | None) -> None:
    """Print the verdicts, ages, durations and sizes of all jobs."""
    from backhaul.reporting.metrics import metrics_text

    text = metrics_text(_overview((), store))
    if output is not None:
        from backhaul.operations.atomic_file import write_atomically

        try:
            write_atomically(Path(output), text.encode(), mode=0o644)
        except OSError as error:
            raise FailedError(
                f"Could not write {output}", error.strerror or str(error), "Name another file, or make room."
            ) from error
    if gateway is not None:
        _put(gateway, text.encode())
    if output is None and gateway is None:
        print(text, end="")  # noqa: T201


def _put(url: str, body: bytes) -> None:
    import urllib.error
    import urllib.request

    from backhaul.formats.redaction import redact_text

    shown = redact_text(url)
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"{shown} is no Pushgateway", "its URL begins with http:// or https://", "Correct --push.")
    request = urllib.request.Request(url, body, {"Content-Type": "text/plain; version=0.0.4"}, method="PUT")  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=20) as reply:  # noqa: S310 - the scheme was looked at
            reply.read(1000)
    except (urllib.error.URLError, OSError) as error:
        raise FailedError(
            f"The metrics could not be put to {shown}", redact_text(str(error)), "See the gateway."
        ) from error


@click.group(cls=ExampleGroup, short_help="Try the channels by which people are told.")
def notify() -> None:
    """Try the channels by which people are told, and see what became of messages."""


@notify.command(
    epilog="""\b
Examples:
  backhaul notify test
  backhaul notify test ops --as-failure""",
)
@click.argument("names", metavar="[CHANNEL]...", nargs=-1)
@click.option("--as-failure", is_flag=True, help="Say that a job has failed, as an alert does.")
@option_json("Print one JSON object on stdout.")
def test(names: tuple[str, ...], as_failure: bool, as_json: bool) -> None:
    """Send a message by each CHANNEL, or by all, on the very way that alerts go."""
    import socket

    import msgspec
    from rich.text import Text

    from backhaul.jobs.alerts import pretended_failure
    from backhaul.jobs.host import JobHost
    from backhaul.planning.alerts import CHANGED
    from backhaul.reporting import messages

    with JobHost() as host:
        channels = names or tuple(host.config.channels)
        if not channels:
            raise ConfigurationError(
                "There is no channel", "the config has no [notify.NAME]", "Write one: see docs/CONFIG.md."
            )
        unknown = [name for name in channels if name not in host.config.channels]
        if unknown:
            raise UsageError(
                f"There is no channel {unknown[0]}", f"the config has {', '.join(host.config.channels)}", "Correct it."
            )
        if as_failure:
            overview = pretended_failure(socket.gethostname(), host.now())
            message = messages.alert(overview, overview.verdicts[0], CHANGED)
        else:
            message = messages.report(host.overview(), "test")
            subject = f"TEST: {message.subject}"
            message = msgspec.structs.replace(
                message, subject=subject, text=f"This is a test of the channel.\n\n{message.text}", failure=False
            )
        deliveries = host.alerts.deliver(message, channels, everyone=True)
    if as_json:
        print_json("notify", {"deliveries": deliveries})
    else:
        out = console(sys.stdout)
        for each in deliveries:
            line = Text("  ✗ " if each.error else "  ✓ ", "red" if each.error else "green")
            out.print(line.append(each.channel + (f": {each.error}" if each.error else ""), ""))
    wrong = [each for each in deliveries if each.error]
    if wrong:
        raise NotifyError(
            f"{len(wrong)} of {len(deliveries)} channels did not take the message",
            "\n".join(f"{each.channel}: {each.error}" for each in wrong),
            "Correct them in the config, and try again.",
        )


@notify.command("log")
@option_json("Print one JSON object on stdout.")
def log_(as_json: bool) -> None:
    """Show what became of the last messages."""
    from backhaul.jobs.host import JobHost

    with JobHost() as host:
        deliveries = host.history.deliveries()
    if as_json:
        print_json("notify", {"deliveries": deliveries})
        return
    for each in deliveries:
        state = f"NOT delivered: {each.error}" if each.error else "delivered"
        print(f"{each.at}  {each.channel}  {state}  {each.subject}")  # noqa: T201
