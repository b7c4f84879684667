"""receive: call a sender until it is there, and receive one session."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Callable

from backhaul.errors import FailedError, PeerError
from backhaul.formats.roster import Host
from backhaul.model.fan_out import ReceiveResult
from backhaul.network.authority import SEND
from backhaul.network.control import Control
from backhaul.network.credentials import Credentials
from backhaul.operations import memory
from backhaul.operations.progress import PullProgress
from backhaul.operations.receive_options import ReceiveOptions, check
from backhaul.operations.reception import LookedAtError, Reception, TurnedAwayError

_OPENING = 10.0
_REDIAL = 1.0


def receive(
    sender: Host,
    credentials: Credentials,
    options: ReceiveOptions,
    *,
    progress: PullProgress | None = None,
    on_error_line: Callable[[bytes], None] | None = None,
    on_news: Callable[[str], None] = lambda text: None,
) -> ReceiveResult:
    """Call a sender, again and again until it is there, and receive one session.

    Args:
        sender: where to call.
        credentials: who we are.
        options: what to do with what comes.
        progress: counters to keep up to date.
        on_error_line: told each line of a consumer's stderr.
        on_news: told what people may want to know, as it happens.

    Raises:
        UsageError: the options contradict each other.
        ConfigurationError: something that is needed is missing.
        PeerError: who answers is not who it must be.
        FailedError: the stream did not come whole. No consumer got an end, no file a name.
        TargetError: it was whole, and the consumer failed.
    """
    check(options)
    memory.settle_allocator()
    deadline = time.monotonic() + options.max_wait
    reason = ""
    while True:
        try:
            connection = socket.create_connection((sender.name, sender.port), timeout=_OPENING)
        except OSError as error:
            if (words := error.strerror or str(error)) != reason:
                reason = words
                on_news(f"{sender.name}:{sender.port} is not there yet: {words}")
        else:
            try:
                connection, peer = credentials.secure(connection, server_side=False, expect_role=SEND, timeout=_OPENING)
                control = Control(connection, peer.name)
                return Reception(control, credentials, options, progress, on_error_line, on_news).run()
            except (LookedAtError, TurnedAwayError, PeerError, OSError) as error:
                # (One that is about to end, or has too many calls, closes the connection without a word.)
                if isinstance(error, PeerError) and error.details.get("reason") not in ("closed", "timeout"):
                    raise
                if (words := str(error)) and words != reason:
                    reason = words
                    on_news(f"{sender.name} does not begin: {words}")
            finally:
                with contextlib.suppress(OSError):
                    connection.close()
        if time.monotonic() > deadline:
            raise FailedError(
                f"No session with {sender.name}:{sender.port} came about",
                f"for {options.max_wait:.0f} s: {reason}",
                "Start the sender, see the host's name, the port and the firewall; --max-wait gives it more time.",
            )
        time.sleep(_REDIAL)
