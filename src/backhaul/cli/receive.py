"""``backhaul receive``."""

from __future__ import annotations

import sys

import click

from backhaul.cli.command import TAIL, TailCommand, option_json
from backhaul.cli.keys import load_identities, option_identity
from backhaul.cli.output import ReportedError, announce, console, print_error, print_json
from backhaul.cli.send import News, option_key
from backhaul.errors import BackhaulError, FailedError, IncompleteError, UsageError
from backhaul.formats.quantities import format_duration, format_size, parse_duration, parse_size
from backhaul.formats.roster import RECEIVER_PORT, SENDER_PORT, parse_host, parse_listen
from backhaul.model.fan_out import ReceiveResult

_EPILOG = """\b
Examples:
  backhaul receive --from db1 -o orders.dump -- pg_restore -d orders
  backhaul receive --from db1 --spool /var/tmp -- mariadb app
  backhaul receive --from db1 -o /backups/orders-{id}.dump
  backhaul receive --listen --into postgresql:///orders --replace --spool /var/tmp
  backhaul receive --listen -o /backups/orders.dump --unit > /etc/systemd/system/backhaul-receive.service

\b
-o FILE and -- COMMAND may both be given: the dump is kept, and restored while it arrives.
The command is killed, and the file gets no name, unless every byte came and the sender
said that the dump ended well. What comes is passed on to the next host before it is used."""


@click.command(cls=TailCommand, epilog=_EPILOG, short_help="Receive a dump that another host sends, as it is made.")
@click.option("--from", "from_", metavar="HOST[:PORT]", help="The sender: it is called until it is there.")
@click.option(
    "--listen",
    is_flag=False,
    flag_value=f":{RECEIVER_PORT}",
    metavar="[[ADDRESS]:PORT]",
    help=f"Or wait to be called, again and again, as a service.  [default port: {RECEIVER_PORT}]",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR/",
    help="Keep it: FILE, or a file for each stream in DIR/. {id} and {sender} are replaced.",
)
@click.option("--into", metavar="URL|PATH", help="Restore it: what was sent with --from URL, its streams side by side.")
@click.option("--replace", is_flag=True, help="With --into: replace what is there, once the restored is whole.")
@click.option("--globals", "globals_", is_flag=True, help="With --into: make the roles that are missing.")
@click.option("--no-owner", is_flag=True, help="With --into postgresql: everything belongs to who restores.")
@click.option("--counts", is_flag=True, help="With --into a database: count its rows, and compare with the original's.")
@click.option("--spool", metavar="DIR", help="Keep there what the command has not taken yet: nobody waits for it then.")
@click.option("--spool-size", metavar="SIZE", help="Most bytes there.  [default: 100G]")
@click.option("--memory", metavar="SIZE", help="Keep so much of the stream in memory.  [default: 256M]")
@click.option(
    "--max-wait",
    metavar="DURATION",
    default="1h",
    show_default=True,
    help="How long to call a sender that is not there.",
)
@click.option(
    "--data-port",
    type=click.IntRange(0, 65535),
    default=0,
    metavar="PORT",
    help="Where the sender and other receivers pass the stream to this host.  [default: any]",
)
@click.option("--name", metavar="NAME", help="This host's name, where its key has none.  [default: the host name]")
@option_identity("A key file, should the dump have to be read from a store where it is encrypted. Repeatable.")
@option_key
@click.option("--unit", is_flag=True, help="With --listen: print a systemd service unit, and do nothing else.")
@click.option("--quiet", "-q", is_flag=True, help="No progress, no news and no summary; errors only.")
@option_json("Print the result of each session as one JSON object on stdout.")
@click.pass_context
def receive(
    ctx: click.Context,
    from_: str | None,
    listen: str | None,
    output: str | None,
    into: str | None,
    replace: bool,
    globals_: bool,
    no_owner: bool,
    counts: bool,
    spool: str | None,
    spool_size: str | None,
    memory: str | None,
    max_wait: str,
    data_port: int,
    name: str | None,
    identity: tuple[str, ...],
    key: str | None,
    insecure_plain: bool,
    unit: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Receive what backhaul send sends: into a file, into COMMAND's stdin, into both, or into a database."""
    from backhaul.cli.progress import pull_progress
    from backhaul.operations import receive_options
    from backhaul.operations.fan_out_settings import credentials_of
    from backhaul.operations.progress import PullProgress
    from backhaul.operations.receive import receive as operation
    from backhaul.operations.receive_service import serve
    from backhaul.operations.restore import RestoreOptions

    command: list[str] | None = ctx.meta[TAIL]
    if command is not None and not command:
        raise UsageError("There is no command", "nothing follows the --", "Write e.g.: -- pg_restore -d orders")
    if (from_ is None) == (listen is None):
        raise UsageError(
            "receive needs a sender to call, or a port to be called at",
            "both --from and --listen are given" if from_ else "neither --from nor --listen is given",
            "Write: backhaul receive --from db1 -o FILE -- COMMAND, or --listen instead of --from db1",
        )
    if spool_size is not None and spool is None:
        raise UsageError("--spool-size has no spool", "no --spool DIR is given", "Name the directory with --spool DIR.")
    if output == "-" and (as_json or listen is not None or sys.stdout.isatty()):
        raise UsageError(
            "-o - writes the stream to stdout",
            "--json writes there too" if as_json else "that is for one session, into a pipe or file",
            "Use -o FILE or -- COMMAND.",
        )
    if into is None and (replace or globals_ or no_owner or counts):
        raise UsageError(
            "--replace, --globals, --no-owner and --counts belong to --into", "it is not given", "Leave them out."
        )
    if unit:
        _print_unit(listen)
        return
    options = receive_options.ReceiveOptions(
        output=output,
        command=tuple(command or ()),
        into=into,
        restoring=RestoreOptions(replace=replace, globals_=globals_, no_owner=no_owner),
        counts=counts,
        spool=spool,
        spool_size=parse_size(spool_size) if spool_size is not None else receive_options.DEFAULT_SPOOL_SIZE,
        memory=parse_size(memory) if memory is not None else receive_options.DEFAULT_MEMORY,
        data_port=data_port,
        max_wait=parse_duration(max_wait),
        identities=load_identities(identity),
    )
    credentials = credentials_of(key, insecure_plain=insecure_plain, name=name)
    say = News(quiet or as_json)
    if insecure_plain:
        say("without keys (--insecure-plain): whoever reaches this host can send to it, and others can read what comes")
    if from_ is not None:
        progress = PullProgress()
        with pull_progress(progress, "received", quiet=quiet or as_json) as on_error_line:
            say.through = on_error_line
            result = operation(
                parse_host(from_, SENDER_PORT),
                credentials,
                options,
                progress=progress,
                on_error_line=on_error_line,
                on_news=say,
            )
        announce("receive", result)
        error = _report(result, quiet=quiet, as_json=as_json)
        if error is not None:
            raise ReportedError(error) if as_json else error
        return
    assert listen is not None
    where = parse_listen(listen, RECEIVER_PORT)

    def ended(end: ReceiveResult | BackhaulError) -> None:
        error = end if isinstance(end, BackhaulError) else _report(end, quiet=quiet, as_json=as_json)
        if error is not None:
            print_error(error)
            if as_json and isinstance(end, BackhaulError):
                from backhaul.cli.output import error_document

                print_json("error", error_document(error))
        sys.stdout.flush()

    serve(
        where.name,
        where.port,
        credentials,
        options,
        on_session=ended,
        on_ready=lambda port: say(f"listening on port {port}"),
        on_news=say,
    )


def _report(result: ReceiveResult, *, quiet: bool, as_json: bool) -> IncompleteError | None:
    """Print what was received; return what could not be done with it."""
    if as_json:
        print_json("receive", result)
    elif not quiet:
        rate = result.raw_size / result.seconds if result.seconds else 0.0
        places = ", ".join(text for text in (result.file, result.consumer) if text)
        console().print(
            f"[bold]{result.id}[/]  {format_size(result.raw_size)} from {result.sender}, whole, "
            f"{format_duration(result.seconds)}, {format_size(rate)}/s" + (f"  ({places})" if places else ""),
            highlight=False,
        )
        for remark in result.remarks:
            console().print(f"  {remark}", style="yellow", markup=False)
        if not result.receipt_taken:
            console().print(
                "  nobody took the receipt: the sender was gone, or waited no longer", style="yellow", markup=False
            )
    if not result.failed:
        return None
    return IncompleteError(
        f"{result.id} came whole, but not everything could be done with it",
        "; ".join(result.failed),
        f"{result.file} holds it." if result.file else "Send again.",
    )


def _print_unit(listen: str | None) -> None:
    from backhaul.formats.systemd import receiver_unit
    from backhaul.jobs.schedule import own_command

    if listen is None:
        raise UsageError("--unit is for --listen", "--from calls a sender once", "Write --listen instead.")
    arguments = [word for word in sys.argv[1:] if word != "--unit"]
    try:
        sys.stdout.write(receiver_unit([*own_command(), *arguments]))
        sys.stdout.flush()
    except OSError as error:
        raise FailedError("The unit could not be printed", error.strerror or str(error), "Try again.") from error
