"""``backhaul send``, and what it shares with a push to ``send:ROSTER``."""

from __future__ import annotations

import datetime as dt
import sys
from collections.abc import Callable, Mapping
from typing import Any

import click

from backhaul.cli.command import TAIL, TailCommand, option_json
from backhaul.cli.output import ReportedError, announce, console, print_json
from backhaul.cli.source import check_source, open_source
from backhaul.errors import FailedError, IncompleteError, InterruptedByUserError, UsageError
from backhaul.formats.quantities import format_duration, format_size, parse_duration
from backhaul.model.fan_out import COMPLETE, FanOutResult

_EPILOG = """\b
Examples:
  backhaul send --hosts db2,db3,db4 -- pg_dump -Fc -Z0 orders
  backhaul send --hosts db2,db3,db4 --require 2 --spool /var/tmp --from postgresql:///orders
  backhaul send --min-receivers 3 --min-wait 1m --max-wait 10m -- mariadb-dump app
  backhaul send --hosts db2,db3 --transport multicast -- pg_dump -Fc -Z0 orders
  backhaul send --hosts db2,db3 --check
  backhaul push s3://acme/db7/orders 'send:db2,db3?require=1' -- pg_dump -Fc -Z0 orders

\b
On each receiver, one of:
  backhaul receive --from db1 -o orders.dump -- pg_restore -d orders
  backhaul receive --listen --into postgresql:///orders --replace

\b
Keys: backhaul keys makes them. The dump goes to the first receiver, which passes it on to
the next: this host sends it once. Nobody takes an aborted dump for a whole one."""


def option_key(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--key`` and ``--insecure-plain``."""
    command = click.option(
        "--insecure-plain",
        is_flag=True,
        help="Without keys: whoever reaches the ports can read the dump, or send another in its place.",
    )(command)
    return click.option(
        "--key",
        metavar="FILE",
        help="This host's key, made by backhaul keys.  [default: /etc/backhaul/fan-out.key, "
        "or ~/.config/backhaul/fan-out.key for a user]",
    )(command)


@click.command(cls=TailCommand, epilog=_EPILOG, short_help="Send one dump to many hosts at once, as it is made.")
@click.option("--hosts", metavar="HOST[:PORT],...", help="Who receives; nobody else is let in.  [default port: 7411]")
@click.option("--min-receivers", type=click.IntRange(1, 1000), metavar="N", help="Or: whoever has a key and comes.")
@click.option("--min-wait", metavar="DURATION", help="With --min-receivers: wait for more, from the first one on.")
@click.option(
    "--max-wait",
    metavar="DURATION",
    help="Wait so long for those who are missing; then begin without them if --require allows it.  [default: 10m]",
)
@click.option(
    "--require",
    metavar="all|N",
    help="How many must have all of it: with fewer the status is 1, with these but not all 3.  [default: all]",
)
@click.option("--from", "from_", metavar="URL|PATH", help="A database, directory or file instead of a command.")
@click.option("--name", default="data", show_default=True, help="The stream's name.")
@click.option(
    "--compress",
    default="auto",
    show_default=True,
    metavar="auto|none|1..19",
    help="On its way; receivers get what the command wrote. 'none' where the network is faster than 3 Gb/s.",
)
@click.option("--expect", multiple=True, metavar="TEXT", help="The stream's last 4 KiB must hold TEXT. Repeatable.")
@click.option("--streams", type=click.IntRange(1, 64), metavar="N", help="Of a database: dumps at once.")
@click.option("--no-counts", is_flag=True, help="Don't count a database's rows.")
@click.option("--allow-empty", is_flag=True, help="Accept a stream without a single byte.")
@click.option(
    "--transport",
    type=click.Choice(["chain", "multicast"]),
    default="chain",
    show_default=True,
    help="'multicast' sends to all at once, on one LAN; those it does not reach get the chain.",
)
@click.option("--group", metavar="ADDRESS[:PORT]", help="The multicast group.  [default: 239.255.74.11:7412]")
@click.option("--interface", metavar="ADDRESS", help="This host's address on the group's network.")
@click.option("--rate", metavar="RATE", help="Bytes a second of multicast at most, e.g. 100M.  [default: found out]")
@click.option("--parity", metavar="N", help="Multicast one piece of parity for each N.  [default: none]")
@click.option(
    "--slow",
    type=click.Choice(["throttle", "drop"]),
    default="throttle",
    show_default=True,
    help="When a receiver's memory and spool are full: wait for it, or go on without it after 5 s.",
)
@click.option(
    "--max-hold",
    metavar="DURATION",
    help="How long in all the dump may wait for slow receivers; then the slowest is dropped.  [default: 10m]",
)
@click.option(
    "--receipt-wait",
    metavar="DURATION",
    help="How long to wait for receipts once all was sent; who has given none by then counts as failed, and may "
    "finish by itself.  [default: as long as the receivers are there]",
)
@click.option("--spool", metavar="DIR", help="Keep the stream there for slow and late receivers, while it is sent.")
@click.option("--spool-size", metavar="SIZE", help="Most bytes there.  [default: 100G]")
@click.option("--memory", metavar="SIZE", help="Keep so much of the stream in memory.  [default: 256M]")
@click.option("--listen", metavar="[ADDRESS:]PORT", help="Where receivers call.  [default: 7410]")
@option_key
@click.option("--workers", type=click.IntRange(1, 256), metavar="N", help="Compressing threads.  [default: one a core]")
@click.option(
    "--check", is_flag=True, help="Only show who is there: free disk, versions, clocks. Waits 5 s, or --max-wait."
)
@click.option("--quiet", "-q", is_flag=True, help="No progress, no news and no summary; errors only.")
@option_json("Print the result as one JSON object on stdout.")
def send(
    *,
    hosts: str | None,
    min_receivers: int | None,
    from_: str | None,
    name: str,
    compress: str,
    expect: tuple[str, ...],
    streams: int | None,
    no_counts: bool,
    allow_empty: bool,
    workers: int | None,
    check: bool,
    quiet: bool,
    as_json: bool,
    **settings: Any,
) -> None:
    """Send COMMAND's output, a database, a file or stdin to many hosts at once, which restore it while it arrives.

    The dump begins when the receivers are there. Each gives a receipt, and the exit status follows --require.
    """
    from backhaul.cli.progress import push_progress
    from backhaul.operations.fan_out_settings import fan_out_of
    from backhaul.operations.progress import PushProgress
    from backhaul.operations.push import PushOptions
    from backhaul.operations.push import push as operation

    command: list[str] | None = click.get_current_context().meta[TAIL]
    if check:
        _check(hosts, min_receivers, settings, as_json=as_json)
        return
    check_source("send", "backhaul send --hosts db2", command, from_)
    if settings["spool_size"] is not None and settings["spool"] is None:
        raise UsageError("--spool-size has no spool", "no --spool DIR is given", "Name the directory with --spool DIR.")
    say = News(quiet or as_json)
    fan_out = fan_out_of(hosts, min_receivers=min_receivers, on_news=say, **settings)
    options = PushOptions(name=name, compress=compress, expect=expect, allow_empty=allow_empty, workers=workers)
    progress = PushProgress()
    try:
        with push_progress(progress, quiet=quiet or as_json) as on_error_line:
            say.through = on_error_line
            source = open_source(
                command, from_, streams=streams, counts=not no_counts, progress=progress, on_error_line=on_error_line
            )
            result = operation((), source, options, fan_out=fan_out, progress=progress)
    except KeyboardInterrupt as interrupt:
        raise InterruptedByUserError(
            "The send was interrupted",
            f"by {str(interrupt) or 'SIGINT'}",
            "No receiver takes what came for a whole dump; send again.",
        ) from interrupt
    assert result.fan_out is not None
    announce("send", result)
    if as_json:
        print_json("send", result)
    elif not quiet:
        rate = result.raw_size / result.seconds if result.seconds else 0.0
        console().print(
            f"[bold]{result.id}[/]  {format_size(result.raw_size)} in, {format_size(result.fan_out.payload)} to send, "
            f"{format_size(result.fan_out.sent)} sent, {format_duration(result.seconds)}, {format_size(rate)}/s"
        )
        print_receivers(result.fan_out)
    if not result.complete:
        error = incomplete(result.fan_out)
        raise ReportedError(error) if as_json else error


def incomplete(result: FanOutResult) -> IncompleteError:
    """Return the error that says who has not got everything."""
    missing = [fate for fate in result.receivers if fate.state != COMPLETE]
    return IncompleteError(
        f"{len(result.receivers) - len(missing)} of {len(result.receivers)} receivers have the whole stream",
        "; ".join(f"{fate.name}: {fate.state}: {_plain_reason(fate.name, fate.reason)}" for fate in missing),
        "See those hosts; what they need is sent again by another run, or pulled from the store.",
    )


def _plain_reason(name: str, reason: str) -> str:
    """Return the reason without the name in front of it, where that was said already."""
    return reason.removeprefix(f"{name}: ")


def print_receivers(result: FanOutResult) -> None:
    """Print the fate of each receiver, a line each."""
    from rich.text import Text

    out = console()
    if result.held_seconds >= 0.5:
        out.print(f"  the dump waited {format_duration(result.held_seconds)} for receivers", style="yellow")
    for fate in result.receivers:
        good = fate.state == COMPLETE
        line = Text("  ✓ " if good else "  ✗ ", style="green" if good else "red").append(fate.name, "")
        remarks = [] if good else [fate.state]
        if fate.receipt is not None:
            remarks.append(f"{format_size(sum(stream.size for stream in fate.receipt.streams))}")
            remarks.append(format_duration(fate.receipt.seconds))
            remarks += [text for text in (fate.receipt.file, fate.receipt.consumer) if text]
        if fate.transport == "multicast":
            remarks.append("by multicast")
        elif fate.fed_by:
            remarks.append(f"from {', then '.join(fate.fed_by)}")
        if fate.late:
            remarks.append("came late")
        if fate.reason:
            remarks.append(_plain_reason(fate.name, fate.reason))
        out.print(line.append(f"  ({', '.join(remarks)})" if remarks else "", "dim"))


class News:
    """Says what happens, a line each with its time, on stderr; nothing if ``quiet``.

    While progress is shown the lines go ``through`` what does not tear it.
    """

    def __init__(self, quiet: bool) -> None:
        self._quiet = quiet
        self.through: Callable[[bytes], None] | None = None

    def __call__(self, text: str) -> None:
        """Say it."""
        if self._quiet:
            return
        line = f"{dt.datetime.now().astimezone():%H:%M:%S} {text}"
        if self.through is not None:
            self.through(line.encode(errors="replace"))
        else:
            console().print(line, style="dim", markup=False)


def _check(hosts: str | None, min_receivers: int | None, settings: Mapping[str, Any], *, as_json: bool) -> None:
    from backhaul.formats.roster import SENDER_PORT, parse_hosts, parse_listen
    from backhaul.operations.fan_out_settings import credentials_of
    from backhaul.operations.send_check import check_receivers

    if hosts is None and min_receivers is None:
        raise UsageError("Nobody is asked for", "neither --hosts nor --min-receivers is given", "Write --hosts db2,db3")
    listen, max_wait = settings["listen"], settings["max_wait"]
    where = parse_listen(listen, SENDER_PORT) if listen is not None else None
    result = check_receivers(
        credentials_of(settings["key"], insecure_plain=settings["insecure_plain"]),
        parse_hosts(hosts) if hosts is not None else (),
        address=where.name if where is not None else "",
        port=where.port if where is not None else SENDER_PORT,
        only_if_free=where is None and hosts is not None,
        expected=min_receivers or 0,
        max_wait=parse_duration(max_wait) if max_wait is not None else 5.0,
    )
    if as_json:
        print_json("send-check", result)
    else:
        from rich.table import Table
        from rich.text import Text

        table = Table(box=None, pad_edge=False)
        for title in ("host", "there", "free", "spool", "clock", "version", "does", ""):
            table.add_column(title, style="dim" if title in ("does", "") else None)
        for receiver in result.receivers:
            asked = bool(receiver.tool)
            table.add_row(
                Text(receiver.name, "bold"),
                Text("yes", "green") if receiver.there else Text("no", "red"),
                format_size(receiver.free) if receiver.free >= 0 else "-",
                format_size(receiver.spool) if receiver.spool else "-",
                Text(f"{round(receiver.clock_off, 1) + 0.0:+.1f} s", "" if abs(receiver.clock_off) < 2 else "yellow")
                if asked
                else "-",
                Text(receiver.tool.partition(",")[0] or "-", "" if receiver.same_version else "yellow"),
                Text(receiver.wants),
                Text(
                    _plain_reason(receiver.name, receiver.reason)
                    or (f"key until {receiver.expires[:10]}" if receiver.expires else "")
                ),
            )
        console(sys.stdout).print(table)
    if not result.complete:
        missing = [receiver for receiver in result.receivers if not receiver.there]
        error = FailedError(
            f"{len(missing)} of {len(result.receivers)} receivers are not there" if missing else "Nobody called",
            "; ".join(f"{receiver.name}: {_plain_reason(receiver.name, receiver.reason)}" for receiver in missing),
            "Start backhaul receive there; see the port, the firewall and the keys.",
        )
        raise ReportedError(error) if as_json else error
