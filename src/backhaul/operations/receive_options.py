"""What a host that receives does with what comes, whether it can, and what it says of itself."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import time
from pathlib import Path

import msgspec

from backhaul import version
from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.age_keys import Identity
from backhaul.formats.fan_out_messages import VERSION, Hello
from backhaul.formats.redaction import redact_command
from backhaul.network.credentials import Credentials
from backhaul.operations.restore import RestoreOptions
from backhaul.operations.spooling import check_spool

DEFAULT_MEMORY = 256 << 20
DEFAULT_SPOOL_SIZE = 100 * 10**9
DEFAULT_MAX_WAIT = 3600.0


class ReceiveOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to do with what comes.

    Attributes:
        output: a file; a directory (``DIR/``) for a file for each stream; ``-`` for stdout; or None. ``{id}`` and
            ``{sender}`` are replaced.
        command: reads the stream, or empty.
        into: the URL of a database, or a directory, to restore into; or None.
        restoring: how.
        counts: whether to count what was restored, and to compare it with the original; of databases.
        spool: a directory for what the consumer has not taken yet, or None.
        spool_size: most bytes there.
        memory: bytes of chunks to keep, for the next host and for the consumer.
        data_port: the TCP port for the chain; 0 for any.
        max_wait: seconds for which a sender that is not there is waited for.
        identities: open a backup in a store that is encrypted, should this host come too late for the stream.
    """

    output: str | None = None
    command: tuple[str, ...] = ()
    into: str | None = None
    restoring: RestoreOptions = RestoreOptions()
    counts: bool = False
    spool: str | None = None
    spool_size: int = DEFAULT_SPOOL_SIZE
    memory: int = DEFAULT_MEMORY
    data_port: int = 0
    max_wait: float = DEFAULT_MAX_WAIT
    identities: tuple[Identity, ...] = ()


def check(options: ReceiveOptions) -> None:
    """Find what would fail, before anybody is called or listened for.

    Raises:
        UsageError: the options contradict each other.
        ConfigurationError: see ``check_able``.
    """
    if options.into is not None and (options.output is not None or options.command):
        raise UsageError(
            "What comes goes to one kind of place", "--into, and -o or -- COMMAND, are given", "Leave one of them out."
        )
    if options.into is None and options.output is None and not options.command:
        raise UsageError(
            "receive has nowhere to put what comes",
            "neither -o FILE nor -- COMMAND nor --into URL is given",
            "Write: backhaul receive --from HOST -o FILE -- pg_restore -d app",
        )
    check_able(options)


def check_able(options: ReceiveOptions) -> None:
    """Find what would fail, before the dump begins.

    Raises:
        ConfigurationError: the command, or the directory, is not there.
    """
    if options.command:
        program = options.command[0]
        if shutil.which(program) is None:
            raise ConfigurationError(
                f"The command can't be run: {program}",
                f"there is no program {program!r} on the PATH",
                "Install it, or correct its name; a line of shell goes through sh -c '...'.",
            )
    if options.output is not None and options.output != "-" and "{" not in options.output:
        path = Path(options.output)
        directory = path if options.output.endswith("/") else path.parent
        # (DIR/ is made where it is missing; that of a FILE is not.)
        existing = directory.parent if options.output.endswith("/") and not directory.is_dir() else directory
        if not existing.is_dir() or not os.access(existing, os.W_OK):
            raise ConfigurationError(
                f"{options.output} can't be written", f"{existing} is no directory that can be written", "Make it."
            )
    if options.spool is not None:
        check_spool(options.spool)


def hello(credentials: Credentials, options: ReceiveOptions, port: int, busy: str) -> Hello:
    """Return the greeting.

    Args:
        credentials: who we are.
        options: what to do with what comes.
        port: where links are taken.
        busy: why there can be no session now, or empty.
    """
    place = options.spool or (options.output if options.output not in (None, "-") else None)
    free = -1
    if place is not None:
        with contextlib.suppress(OSError):
            path = Path(place)
            free = shutil.disk_usage(path if path.is_dir() else path.parent).free
    wants = [text for text in (options.output, " ".join(redact_command(options.command)), options.into) if text]
    return Hello(
        version=VERSION,
        name=credentials.name,
        tool=f"backhaul {version.VERSION}, Python {platform.python_version()}",
        clock=time.time(),
        port=port,
        free=free,
        spool=options.spool_size if options.spool is not None else 0,
        wants=", ".join(wants),
        busy=busy,
        expires=credentials.expires.isoformat(timespec="seconds") if credentials.expires is not None else "",
    )
