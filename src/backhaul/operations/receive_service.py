"""receive as a service: listen for senders, and receive one session after the other."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

from backhaul.errors import BackhaulError, ConfigurationError, FailedError
from backhaul.model.fan_out import ReceiveResult
from backhaul.network.accepting import serve_connections
from backhaul.network.authority import SEND
from backhaul.network.control import SILENCE, ConnectionLostError, Control, plain_address
from backhaul.network.credentials import Credentials
from backhaul.network.gathering import listen
from backhaul.operations import memory
from backhaul.operations.progress import PullProgress
from backhaul.operations.receive_options import ReceiveOptions, check, hello
from backhaul.operations.reception import LookedAtError, Reception, TurnedAwayError

_OPENING = 10.0
_SAY_AGAIN = 600.0
_LOOK = 0.5


def serve(
    address: str,
    port: int,
    credentials: Credentials,
    options: ReceiveOptions,
    *,
    on_session: Callable[[ReceiveResult | BackhaulError], None],
    on_ready: Callable[[int], None] = lambda port: None,
    make_progress: Callable[[], PullProgress] = PullProgress,
    on_error_line: Callable[[bytes], None] | None = None,
    on_news: Callable[[str], None] = lambda text: None,
    sessions: int | None = None,
) -> None:
    """Listen for senders, and receive one session after the other, until interrupted.

    Args:
        address: where to listen; empty for everywhere.
        port: and at which port; 0 for any.
        credentials: who we are.
        options: what to do with what comes.
        on_session: told each session's end.
        on_ready: told the port once it listens.
        make_progress: gives the counters of a session.
        on_error_line: see ``receive``.
        on_news: see ``receive``.
        sessions: after how many to end; None for never.

    Raises:
        UsageError: the options contradict each other.
        ConfigurationError: it can't listen, or something that is needed is missing.
    """
    check(options)
    memory.settle_allocator()
    with listen(address, port, "receive") as listener:
        service = _Service(listener, credentials, options, on_news)
        on_ready(listener.getsockname()[1])
        _tell_systemd("READY=1")
        while sessions is None or sessions > 0:
            control = service.next()
            try:
                reception = Reception(
                    control, credentials, options, make_progress(), on_error_line, on_news, service.data_listener
                )
                on_session(reception.run())
            except (LookedAtError, TurnedAwayError):
                continue
            except BackhaulError as error:
                on_session(error)
            finally:
                service.free()
            if sessions is not None:
                sessions -= 1


class _Service:
    """Lets senders in, one session at a time; the others are told that this host is busy."""

    def __init__(
        self, listener: socket.socket, credentials: Credentials, options: ReceiveOptions, on_news: Callable[[str], None]
    ) -> None:
        self.data_listener: socket.socket | None = None
        self._listener = listener
        self._credentials = credentials
        self._options = options
        self._on_news = on_news
        self._busy = ""
        self._said = ("", 0.0)
        self._lock = threading.Lock()
        self._ready: queue.Queue[tuple[Control, socket.socket]] = queue.Queue()
        listener.settimeout(_LOOK)
        self._thread = threading.Thread(
            target=serve_connections, args=(listener, self._greet, lambda: False, "greet"), name="listen", daemon=True
        )
        self._thread.start()

    def next(self) -> Control:
        """Wait for a sender that may begin."""
        while True:
            with contextlib.suppress(queue.Empty):
                control, self.data_listener = self._ready.get(timeout=_LOOK)
                return control
            if not self._thread.is_alive():
                raise FailedError(
                    "Nobody can call this host any more", "the port it listens at was closed", "Start it again."
                )

    def _say_once(self, text: str) -> None:
        """Say it, but not again and again while it is the same: whoever is turned away comes back soon."""
        now = time.monotonic()
        with self._lock:
            again = text == self._said[0] and now - self._said[1] < _SAY_AGAIN
            if not again:
                self._said = (text, now)
        if not again:
            self._on_news(text)

    def free(self) -> None:
        """The session is over: the next one may come."""
        with self._lock:
            self._busy = ""

    def _greet(self, connection: socket.socket, address: str) -> None:
        address = plain_address(address)
        try:
            connection, peer = self._credentials.secure(
                connection, server_side=True, expect_role=SEND, timeout=_OPENING
            )
            control = Control(connection, peer.name)
            with self._lock:
                busy = self._busy
                if not busy:
                    self._busy = f"it is at a session with {peer.name} since {_clock()}"
            try:
                data_listener = listen("", 0 if busy else self._options.data_port, "receive")
            except ConfigurationError:
                if not busy:
                    self.free()
                raise
            try:
                control.send(hello(self._credentials, self._options, data_listener.getsockname()[1], busy))
            except ConnectionLostError:
                data_listener.close()
                if not busy:
                    self.free()
                control.release()
                return
            if busy:
                data_listener.close()
                with contextlib.suppress(ConnectionLostError, BackhaulError):
                    control.receive(SILENCE)
                control.release()
                self._say_once(f"a session with {peer.name} was turned away: {busy}")
                return
            self._ready.put((control, data_listener))
        except OSError:
            connection.close()  # gone again
        except BackhaulError as error:
            self._say_once(f"{address} was not let in: {error.what}: {error.why}")
            with contextlib.suppress(OSError):
                connection.close()


def _clock() -> str:
    return dt.datetime.now().astimezone().strftime("%H:%M:%S")


def _tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one, as ``sd_notify(3)`` does."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            connection.send(state.encode())
