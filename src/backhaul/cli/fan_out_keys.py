"""``backhaul keys``: what the hosts of a fan-out know each other by."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import click

from backhaul.cli.command import option_json
from backhaul.cli.output import console, print_json
from backhaul.errors import FailedError, UsageError

if TYPE_CHECKING:
    from backhaul.operations.fan_out_keys import FanOutKeys

_EPILOG = """\b
Examples:
  backhaul keys fan-out --sender db1 --receiver db2,db3
  backhaul keys fan-out --receiver db4             one more, later
  backhaul keys fan-out --renew --receiver db2     a new one in the place of the old
  backhaul keys --shared fan-out.key               one key for all: simpler, and weaker

\b
With keys of its own, each host proves its name and what it may do, and only a host with the
role send can send. DIR/ca.key makes them, and never leaves the host that it was made on. A
shared key says only that a host has it: who has it can take any name, and send.
A key that got into wrong hands can't be called back: make all keys anew, in another DIR.

\b
stdout has the commands that copy the keys, one a line. They need /etc/backhaul on the other
host, and leave to write there; a user's own key lies in ~/.config/backhaul/fan-out.key."""


@click.command(epilog=_EPILOG, short_help="Make the keys of the hosts that send and receive.")
@click.argument("directory", metavar="[DIR]", required=False)
@click.option("--sender", "senders", multiple=True, metavar="HOST[,HOST]", help="Hosts that may send. Repeatable.")
@click.option("--receiver", "receivers", multiple=True, metavar="HOST[,HOST]", help="Hosts that may receive.")
@click.option("--both", "both", multiple=True, metavar="HOST[,HOST]", help="Hosts that may do either.")
@click.option("--renew", is_flag=True, help="Replace the keys of hosts that have one in DIR.")
@click.option("--shared", metavar="FILE", help="Make one key for all hosts instead. Never overwritten.")
@option_json("Print the result as one JSON object on stdout.")
def keys(
    directory: str | None,
    senders: tuple[str, ...],
    receivers: tuple[str, ...],
    both: tuple[str, ...],
    renew: bool,
    shared: str | None,
    as_json: bool,
) -> None:
    """Make a key file for each host in DIR (mode 0600), and print the commands that copy them there.

    Nothing is sent anywhere. Run again on the same DIR, it adds hosts.
    """
    hosts = _hosts(senders, receivers, both)
    if shared is not None:
        result = _shared(shared, directory, hosts, renew=renew)
    elif directory is None:
        raise UsageError(
            "backhaul keys needs a place for the keys",
            "neither DIR nor --shared was given",
            "backhaul keys DIR --sender HOST --receiver HOST, or backhaul keys --shared FILE",
        )
    else:
        from backhaul.operations.fan_out_keys import make_keys

        result = make_keys(directory, hosts, renew=renew)
    if as_json:
        print_json("keys", result)
        return
    _print_text(result)


def _hosts(senders: tuple[str, ...], receivers: tuple[str, ...], both: tuple[str, ...]) -> dict[str, frozenset[str]]:
    """Return what each host may do, by its name as it was typed."""
    found: dict[str, frozenset[str]] = {}
    for texts, roles in ((senders, {"send"}), (receivers, {"receive"}), (both, {"send", "receive"})):
        for name in (name.strip() for text in texts for name in text.split(",")):
            if not name:
                raise UsageError("A host has no name", "there is nothing before or after a comma", "Name the host.")
            found[name] = found.get(name, frozenset()) | roles
    return found


def _shared(path: str, directory: str | None, hosts: dict[str, frozenset[str]], *, renew: bool) -> FanOutKeys:
    from backhaul.operations.fan_out_keys import make_shared_key

    if directory is not None or hosts or renew:
        raise UsageError(
            "--shared makes one key for all hosts",
            "it takes no DIR, hosts or --renew: who has the key may do everything",
            "backhaul keys --shared FILE",
        )
    return make_shared_key(path)


def _print_text(result: FanOutKeys) -> None:
    try:
        for key in result.keys:
            sys.stdout.write(f"{key.copy_with}\n")
        sys.stdout.flush()
    except OSError as error:
        raise FailedError(
            "What was made could not be printed",
            error.strerror or str(error),
            f"The keys are made: {', '.join(key.path for key in result.keys)}.",
        ) from error
    lines = []
    for key in result.keys:
        until = f", good until {key.expires:%Y-%m-%d}" if key.expires else ""
        allowed = " and ".join(key.roles)
        lines.append(f"{key.path}: {key.host or 'every host'} may {allowed}{until}{', renewed' if key.renewed else ''}")
    if result.authority is None:
        lines.append(
            "Nothing was sent: copy it to every host (HOST above). Who has it can send to all of them, under any name."
        )
    else:
        lines.append("Nothing was sent: copy each to its host with the command above.")
        lines.append(
            f"{result.authority} stays here, and is never copied to a host: who has it can make a key for any host. "
            "Without it no host can be added."
        )
    for line in lines:
        console().print(line, style="dim", markup=False)
