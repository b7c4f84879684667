"""``backhaul pull``."""

from __future__ import annotations

import sys

import click

from backhaul.cli.command import TAIL, TailCommand, option_json
from backhaul.cli.keys import is_same_file, load_identities, option_identity
from backhaul.cli.output import console, print_json
from backhaul.errors import UsageError
from backhaul.formats.quantities import format_duration, format_size, parse_duration

_EPILOG = """\b
Examples:
  backhaul pull s3://acme/db7/orders -- pg_restore -d orders_copy
  backhaul pull s3://acme/db7/orders@2026-11-20 -o orders.dump
  backhaul pull s3://acme/db7/orders --identity orders.key -- pg_restore -d orders_copy
  backhaul pull /mnt/usb/orders@20261121T020000Z | pg_restore -f orders.sql
  backhaul pull s3://acme/mirrors/db7 -o /restored

\b
WHEN is a backup's id, 'latest' (the default), or a date or time in UTC: the newest backup
at or before it; a date alone means the end of that day.

\b
Prefer -- COMMAND or -o FILE to a pipe: if the backup turns out to be damaged, the
command is killed and the file never appears, while a pipe can't tell its reader."""


@click.command(cls=TailCommand, epilog=_EPILOG, short_help="Bring a backup back: to stdout, a file, or a command.")
@click.argument("series", metavar="SERIES[@WHEN]|MIRROR")
@click.option(
    "-o",
    "--output",
    metavar="FILE|DIR",
    help="Write FILE, replacing it once every byte was checked; or of a mirror all files into DIR, replacing none.",
)
@click.option("--stream", metavar="NAME", help="Which stream, if the backup has several.")
@option_identity("A key file that opens the backup if it is encrypted; '-' for stdin. Repeatable.")
@click.option(
    "--retry-for",
    default="60s",
    show_default=True,
    metavar="DURATION",
    help="How long a store that is ill or away is tried again.",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 256),
    metavar="N",
    help="Fetching threads; as many decode, at most one a core.  [default: two a core]",
)
@click.option("--quiet", "-q", is_flag=True, help="No progress and no summary; errors only.")
@option_json("Print the result as one JSON object on stderr (stdout is data).")
@click.pass_context
def pull(
    ctx: click.Context,
    series: str,
    output: str | None,
    stream: str | None,
    identity: tuple[str, ...],
    retry_for: str,
    workers: int | None,
    quiet: bool,
    as_json: bool,
) -> None:
    """Write a backup to stdout, to FILE, or to COMMAND's stdin.

    Every frame's checksum and the hash of the whole are compared. A command gets the end of its input
    only when all of it was right; otherwise it is killed.
    """
    from backhaul.cli.progress import pull_progress
    from backhaul.operations.progress import PullProgress
    from backhaul.operations.pull import PullOptions
    from backhaul.operations.pull import pull as operation
    from backhaul.targets.base import Target
    from backhaul.targets.command import CommandTarget
    from backhaul.targets.file import FileTarget
    from backhaul.targets.stream import StreamTarget

    command: list[str] | None = ctx.meta[TAIL]
    if command is not None and not command:
        raise UsageError(
            "There is no command", "nothing follows the --", "Write e.g.: backhaul pull SERIES -- pg_restore -d app"
        )
    if command and output is not None:
        raise UsageError("The backup can go to one place only", "both -o and -- COMMAND were given", "Leave one out.")
    to_terminal = not command and output in (None, "-") and sys.stdout.isatty()
    if to_terminal:
        raise UsageError(
            "The backup would go to the terminal",
            "stdout is no pipe and no file",
            "Use -o FILE or -- COMMAND.",
        )
    if output is not None and any(is_same_file(output, path) for path in identity):
        raise UsageError(
            "The backup would replace the key that opens it", f"{output} is given as --identity too", "Name another -o."
        )
    if output is not None and _means_mirror(series, output):
        from backhaul.cli.mirror import pull_mirror

        if identity or stream:
            raise UsageError(
                f"{series} is a mirror",
                "--identity and --stream are for backups",
                "Leave them out: files are as they were.",
            )
        pull_mirror(series, output, workers=workers, retry_for=retry_for, quiet=quiet, as_json=as_json)
        return
    identities = load_identities(identity)
    progress = PullProgress()
    with pull_progress(progress, "pulled", quiet=quiet or as_json) as on_error_line:
        target: Target
        if command:
            target = CommandTarget(command, on_error_line)
        elif output is not None and output != "-":
            target = FileTarget(output)
        else:
            target = StreamTarget(1)
        options = PullOptions(stream=stream, workers=workers, patience=parse_duration(retry_for), identities=identities)
        result = operation(series, target, options, progress=progress)
    if as_json:
        print_json("pull", result, file=sys.stderr)
    elif not quiet:
        rate = result.raw_size / result.seconds if result.seconds else 0.0
        console().print(
            f"[bold]{result.id}[/]  {format_size(result.raw_size)} checked and delivered,"
            f" {format_duration(result.seconds)}, {format_size(rate)}/s"
        )


def _means_mirror(series: str, output: str) -> bool:
    """Tell whether a mirror is to be pulled: it is one, or what is no series goes into a directory."""
    from pathlib import Path

    from backhaul.formats.location import names_backup
    from backhaul.operations.kind import is_mirror, is_series

    if output == "-" or names_backup(series):
        return False
    if is_mirror(series):
        return True
    return (output.endswith("/") or Path(output).is_dir()) and not is_series(series)
