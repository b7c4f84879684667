"""Gathering: receivers call the sender, and the sender calls those that listen; who knows the key is let in."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
from collections.abc import Callable, Sequence

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, PeerError
from backhaul.formats.fan_out_messages import VERSION, Bye, Hello
from backhaul.formats.roster import RECEIVER_PORT, Host
from backhaul.network.accepting import serve_connections
from backhaul.network.authority import RECEIVE
from backhaul.network.control import ConnectionLostError, Control, plain_address
from backhaul.network.credentials import Credentials, Peer

_OPENING = 10.0
_REDIAL = 1.0
_REFUSED = 5.0
_LOOK = 0.5
_BACKLOG = 64


class Arrival(msgspec.Struct, frozen=True):
    """A receiver that is there: its name in the roster, its connection, and what it said."""

    name: str
    control: Control
    hello: Hello
    peer: Peer


def listen(address: str, port: int, what: str) -> socket.socket:
    """Return a listening socket; a port of 0 is any free one.

    Raises:
        ConfigurationError: it can't be had.
    """
    try:
        if address:
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            return socket.create_server((address, port), family=family, backlog=_BACKLOG)
        try:
            return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=_BACKLOG)
        except (OSError, ValueError) as error:
            if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
                raise
            return socket.create_server(("", port), backlog=_BACKLOG)  # this host has no IPv6
    except OSError as error:
        raise ConfigurationError(
            f"{what} can't listen on {address or '*'}:{port}",
            error.strerror or str(error),
            "Another one runs there, perhaps; name another port.",
        ) from error


class Gathering:
    """Lets receivers in until it is stopped.

    Args:
        credentials: who we are.
        hosts: the roster; empty for whoever has a key.
        listener: where receivers call, or None; closed by ``stop``.
        on_arrival: told who came, and whether it may stay: it returns the reason why not, or an empty text.
        on_problem: told a host, or an address, and why it is not let in, or not there.
    """

    def __init__(
        self,
        credentials: Credentials,
        hosts: Sequence[Host],
        listener: socket.socket | None,
        on_arrival: Callable[[Arrival], str],
        on_problem: Callable[[str, str], None],
    ) -> None:
        self._credentials = credentials
        self._hosts = hosts
        self._listener = listener
        self._on_arrival = on_arrival
        self._on_problem = on_problem
        self._present: set[str] = set()
        # Those that called and were not let in: why says more than that they don't answer when they are called.
        self._refused: set[str] = set()
        self._gone: set[str] = set()
        self._stop = threading.Event()
        self._lock = threading.Lock()

    def start(self) -> None:
        """Begin."""
        if self._listener is not None:
            self._listener.settimeout(_LOOK)
            # (One that says nothing must not keep the others waiting.)
            threading.Thread(
                target=serve_connections,
                args=(self._listener, self._called, self._stop.is_set, "greet"),
                name="gather",
                daemon=True,
            ).start()
        for host in self._hosts:
            threading.Thread(target=self._dial, args=(host,), name=f"dial-{host.name}", daemon=True).start()

    def stop(self) -> None:
        """Let nobody in any more."""
        self._stop.set()
        if self._listener is not None:
            self._listener.close()

    def left(self, name: str) -> None:
        """Note that a receiver is gone: it may come back."""
        with self._lock:
            self._present.discard(name)
            self._gone |= {name}

    def _called(self, connection: socket.socket, address: str) -> None:
        self._let_in(connection, plain_address(address), None)

    def _dial(self, host: Host) -> None:
        while not self._stop.is_set():
            with self._lock:
                present = host.name in self._present
                gone, self._gone = host.name in self._gone, self._gone - {host.name}
            if gone:  # it was here, and has refused, perhaps: it is not to be asked again at once
                self._stop.wait(_REFUSED)
            if not present:
                try:
                    connection = socket.create_connection((host.name, host.port), timeout=_OPENING)
                except OSError as error:
                    if host.name not in self._refused:
                        self._on_problem(host.name, f"{host.text(RECEIVER_PORT)}: {error.strerror or error}")
                else:
                    if not self._let_in(connection, host.name, host):
                        # It is there, and busy perhaps: neither side is to be filled with tries.
                        self._stop.wait(_REFUSED - _REDIAL)
            self._stop.wait(_REDIAL)

    def _let_in(self, connection: socket.socket, address: str, dialled: Host | None) -> bool:
        """Find out who is there; tell whether it is let in."""
        control: Control | None = None
        kept = False
        who = dialled.name if dialled is not None else address
        try:
            connection, peer = self._credentials.secure(
                connection, server_side=dialled is None, expect_role=RECEIVE, timeout=_OPENING
            )
            control = Control(connection, who)
            hello = control.greeted(_OPENING)
            if not isinstance(hello, Hello):
                raise PeerError(
                    f"{who} is no receiver", f"it began with {type(hello).__name__}", "See what runs there."
                )
            if hello.version != VERSION:
                raise PeerError(
                    f"{who} speaks another version",
                    f"{hello.version}, and not {VERSION}",
                    "Install the same version on both.",
                )
            name = self._roster_name(hello, peer, address, dialled)
            control.name = who = name
            reason = self._admit(Arrival(name, control, hello, peer))
            if reason:
                if dialled is None:
                    self._refused.add(name)
                self._on_problem(name, reason)
                control.send(Bye(reason=reason))
            kept = not reason
        except (ConnectionLostError, OSError) as error:
            self._on_problem(who, str(error))
        except BackhaulError as error:
            reason = f"{error.what}: {error.why}" if error.why else error.what
            self._on_problem(who, reason)
            if control is not None:
                with contextlib.suppress(ConnectionLostError):
                    control.send(Bye(reason=reason))
        finally:
            if not kept:
                if control is not None:
                    control.release()
                with contextlib.suppress(OSError):
                    connection.close()
        return kept

    def _admit(self, arrival: Arrival) -> str:
        with self._lock:
            if self._stop.is_set():
                return "nobody is let in any more"
            if arrival.name in self._present:
                return f"{arrival.name} is here already"
            self._present.add(arrival.name)
        reason = self._on_arrival(arrival) or arrival.hello.busy
        if reason:
            self.left(arrival.name)
        return reason

    def _roster_name(self, hello: Hello, peer: Peer, address: str, dialled: Host | None) -> str:
        """Return under which name of the roster the one who is there takes part.

        Raises:
            PeerError: it is not of the roster.
        """
        name = peer.name if peer.kind == "certificate" else hello.name
        if dialled is not None:
            if peer.kind == "certificate" and not _is_address(dialled.name) and not _same(dialled.name, name):
                raise PeerError(
                    f"{dialled.name} is not {dialled.name}",
                    f"its key is that of {name}",
                    f"Give it its own key, or write {name} in the roster.",
                )
            return dialled.name
        if not self._hosts:
            return name
        for host in self._hosts:
            if _same(host.name, name) or host.name == address:
                return host.name
        raise PeerError(
            f"{name} ({address}) is not of the roster",
            f"that is {', '.join(host.name for host in self._hosts)}",
            f"Add it: --hosts ...,{name}",
        )


def _same(host: str, name: str) -> bool:
    """Tell whether two names mean one host: ``db2`` and ``db2.example.com`` do."""
    host, name = host.lower().rstrip("."), name.lower().rstrip(".")
    return host == name or host.startswith(f"{name}.") or name.startswith(f"{host}.")


def _is_address(text: str) -> bool:
    for family in (socket.AF_INET, socket.AF_INET6):
        with contextlib.suppress(OSError):
            socket.inet_pton(family, text)
            return True
    return False
