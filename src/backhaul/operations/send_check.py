"""send --check: who is there, with what room, version and clock; nothing is sent."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Sequence

import msgspec

from backhaul import version
from backhaul.errors import ConfigurationError
from backhaul.formats.fan_out_messages import Hello
from backhaul.formats.roster import RECEIVER_PORT, Host
from backhaul.network.credentials import Credentials
from backhaul.network.gathering import Arrival, Gathering, listen
from backhaul.operations.reception import LOOKED

_LOOK = 0.05


class CheckedReceiver(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What one host of the roster says of itself.

    Attributes:
        name: as in the roster.
        there: whether it answered, and may receive.
        tool: its version.
        same_version: whether that is ours.
        clock_off: seconds that its clock is ahead of ours, but for half a round trip.
        free: bytes free where it keeps what it gets; -1 where it keeps nothing.
        spool: bytes that may wait on its disk.
        wants: what it does with a stream.
        expires: when its key does (ISO), or empty.
        reason: why it is not there.
    """

    name: str
    there: bool
    tool: str = ""
    same_version: bool = True
    clock_off: float = 0.0
    free: int = -1
    spool: int = 0
    wants: str = ""
    expires: str = ""
    reason: str = ""


class CheckResult(msgspec.Struct, frozen=True, kw_only=True):
    """Every host of the roster, in its order; then who came besides."""

    receivers: tuple[CheckedReceiver, ...]

    @property
    def complete(self) -> bool:
        """Whether all are there."""
        return bool(self.receivers) and all(receiver.there for receiver in self.receivers)


def check_receivers(
    credentials: Credentials,
    hosts: Sequence[Host],
    *,
    address: str = "",
    port: int,
    only_if_free: bool = False,
    expected: int = 0,
    max_wait: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> CheckResult:
    """Ask who is there.

    Args:
        credentials: who we are.
        hosts: the roster: those that listen are called; empty for whoever calls.
        address: where to be called.
        port: and at which port.
        only_if_free: whether to do without being called if that port is taken.
        expected: with no roster, how many to wait for.
        max_wait: seconds after which whoever was not heard of is not there.
        sleep: waits.

    Raises:
        ConfigurationError: it can't listen there.
    """
    found: dict[str, CheckedReceiver] = {}
    problems: dict[str, str] = {}

    def arrived(arrival: Arrival) -> str:
        found[arrival.name] = _described(arrival.name, arrival.hello)
        return LOOKED  # which the receiver is told

    def problem(host: str, reason: str) -> None:
        if reason != LOOKED:
            problems[host] = reason

    listener: socket.socket | None = None
    try:
        listener = listen(address, port, "send --check")
    except ConfigurationError:
        if not only_if_free:
            raise
    gathering = Gathering(credentials, hosts, listener, arrived, problem)
    deadline = time.monotonic() + max_wait
    gathering.start()
    try:
        wanted = len(hosts) or expected
        while time.monotonic() < deadline and len(found) < wanted:
            sleep(_LOOK)
    finally:
        gathering.stop()
    result = []
    for host in hosts:
        missing = CheckedReceiver(
            name=host.name, there=False, reason=problems.get(host.name, f"{host.text(RECEIVER_PORT)} did not answer")
        )
        result.append(found.pop(host.name, missing))
    return CheckResult(receivers=(*result, *found.values()))


def _described(name: str, hello: Hello) -> CheckedReceiver:
    return CheckedReceiver(
        name=name,
        there=not hello.busy,
        tool=hello.tool,
        same_version=hello.tool.split(",")[0] == f"backhaul {version.VERSION}",
        clock_off=round(hello.clock - time.time(), 2),
        free=hello.free,
        spool=hello.spool,
        wants=hello.wants,
        expires=hello.expires,
        reason=hello.busy,
    )
