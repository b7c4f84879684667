"""``backhaul keygen``, and what other commands share about keys: their options, and asking for a passphrase."""

from __future__ import annotations

import contextlib
import getpass
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from backhaul.cli.command import option_json
from backhaul.cli.output import console, print_json
from backhaul.errors import FailedError, IdentityError, UsageError

if TYPE_CHECKING:
    from backhaul.formats.age_keys import Identity

Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def option_identity(help_text: str) -> Callable[[Decorated], Decorated]:
    """Return the ``--identity`` option."""
    return click.option("--identity", "identity", multiple=True, metavar="FILE", help=help_text)


def load_identities(paths: tuple[str, ...]) -> tuple[Identity, ...]:
    """Read all identity files, before anything is drawn on the terminal: passphrases are asked for here."""
    if not paths:
        return ()
    from backhaul.operations.keys import read_identities

    return tuple(identity for path in paths for identity in read_identities(path, _ask))


def is_same_file(path: str, other: str) -> bool:
    """Tell whether two paths lead to one file that exists."""
    with contextlib.suppress(OSError):
        return Path(path).samefile(other)
    return False


def _ask(path: str) -> str:
    # Not from stdin, which may be data; and never in the open, which is what getpass would do without a terminal.
    try:
        with open("/dev/tty", "w") as terminal:
            try:
                return getpass.getpass(f"Passphrase for {path}: ", terminal)
            except EOFError:
                terminal.write("\n")
                raise
    except OSError as error:
        raise IdentityError(
            f"The identity file {path} takes a passphrase",
            "there is no terminal to ask for it",
            "Run this on a terminal, or pipe the identity in: age -d ... | backhaul pull --identity - ...",
        ) from error
    except UnicodeDecodeError:
        raise IdentityError(f"The passphrase for {path} is no text", "it is not UTF-8", "Try again.") from None
    except EOFError as error:
        raise IdentityError(f"The identity file {path} takes a passphrase", "none was typed", "Try again.") from error


_EPILOG = """\b
Examples:
  backhaul keygen -o orders.key
  backhaul push s3://acme/db7/orders --encrypt-to age1... -- pg_dump -Fc -Z0 orders
  backhaul pull s3://acme/db7/orders --identity orders.key -o orders.dump

\b
FILE is what opens the backups: keep it, and a copy, away from the host that pushes, which
needs the recipient only. Whoever loses every copy has lost the backups. Keep the recipient
to yourself too: who does not know it can't put a forged backup in the place of yours.
To protect FILE with a passphrase: age -p -o orders.key.age orders.key"""


@click.command(epilog=_EPILOG, short_help="Make a key: backups encrypted to it open with it alone.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Where the identity goes. Never overwritten.")
@option_json("Print the result as one JSON object on stdout.")
def keygen(output: str, as_json: bool) -> None:
    """Make a new age identity in FILE (mode 0600), and print its recipient, which backups are encrypted to."""
    from backhaul.operations.keys import keygen as operation

    if output == "-":
        raise UsageError("keygen writes a file", "-o - was given", "Name one: backhaul keygen -o backup.key")
    result = operation(output)
    if as_json:
        print_json("keygen", result)
        return
    try:
        sys.stdout.write(f"{result.recipient}\n")
        sys.stdout.flush()
    except OSError as error:
        raise FailedError(
            "The recipient could not be printed",
            error.strerror or str(error),
            f"The key is made: {result.path} holds the recipient in its first line.",
        ) from error
    if sys.stderr.isatty():
        console().print(
            f"{result.path} holds the identity (key id {result.key_id}). Keep a copy off this host: "
            "without it no backup that is encrypted to this recipient can be read.",
            style="dim",
            markup=False,
        )
