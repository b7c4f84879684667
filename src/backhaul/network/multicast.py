"""A session's multicast at the sender: its socket, its loop, its thread, and its place in the log."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping

from backhaul.model.reception import Reception
from backhaul.network.multicast_loop import MulticastLoop
from backhaul.network.multicast_sender import Address, MulticastSender
from backhaul.pipeline.chunk_log import ChunkLog, Reader
from backhaul.pipeline.supervisor import StoppedError, Supervisor
from backhaul.planning.pace import Pace
from backhaul.transforms.seal import SessionKeys

# Bytes a second to begin with: what any LAN takes. It doubles until something is lost.
_START_RATE = 32 << 20


class Multicast:
    """See the module. ``report``, ``remove`` and ``end`` are for any thread.

    Args:
        keys: the session's.
        interface: the IPv4 address by which multicasts leave.
        group, port: where they go.
        rate: bytes a second at most; None to find out.
        parity: pieces for each one of parity; 0 for none.
        on_damaged: told a receiver's place and the number of a chunk that came to it damaged.
        on_failure: told why it can't go on.

    Raises:
        ConfigurationError: this host has no such address.
    """

    def __init__(
        self,
        keys: SessionKeys,
        *,
        interface: str,
        group: str,
        port: int,
        rate: float | None,
        parity: int,
        on_damaged: Callable[[int, int], None],
        on_failure: Callable[[str], None],
    ) -> None:
        self._sender = MulticastSender(keys, interface=interface, group=group, port=port, parity=parity)
        self._pace = Pace(_START_RATE, rate)
        self._on_damaged = on_damaged
        self._on_failure = on_failure
        self._loop: MulticastLoop | None = None
        self._reader: Reader | None = None
        self._next: dict[int, int] = {}
        self._lock = threading.Lock()
        self._group: Supervisor | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    @property
    def sent(self) -> int:
        """Bytes of datagrams that were sent, without the headers of IP and UDP."""
        return self._sender.sent.bytes

    def probe(self, token: bytes, count: int) -> None:
        """Send so many probes; before ``start``."""
        self._sender.probe(token, count)

    def start(self, log: ChunkLog, members: Mapping[int, Address]) -> None:
        """Begin to send what the log has and will have, to these receivers."""
        self._reader = log.reader("multicast", log.start)
        self._next = dict.fromkeys(members, self._reader.position)
        self._loop = MulticastLoop(
            self._sender, log, members, pace=self._pace, on_damaged=self._on_damaged, first=self._reader.position
        )
        self._thread = threading.Thread(target=self._run, args=(self._loop,), name="multicast", daemon=True)
        self._thread.start()

    def _run(self, loop: MulticastLoop) -> None:
        try:
            with Supervisor("multicast") as group:
                self._group = group
                if not self._closed:
                    loop.run(group)
        except StoppedError:
            pass
        except Exception as error:  # noqa: BLE001 - whatever it is, the receivers are to get the rest another way
            self._on_failure(getattr(error, "why", "") or str(error) or type(error).__name__)
        finally:
            # Whatever ends the loop: nothing is kept for it any more, and nobody waits for it.
            if self._reader is not None:
                self._reader.close()

    def report(self, index: int, reception: Reception) -> None:
        """Take a receiver's report; what all have need not be kept for them."""
        if self._loop is None:
            return
        self._loop.report(index, reception)
        with self._lock:
            if index in self._next:
                self._next[index] = max(self._next[index], reception.next)
                self._advance()

    def remove(self, index: int) -> None:
        """Wait for this receiver no more."""
        if self._loop is not None:
            self._loop.remove(index)
        with self._lock:
            self._next.pop(index, None)
            self._advance()

    def _advance(self) -> None:
        if self._reader is not None and self._next:
            self._reader.advance(min(self._next.values()))

    def end(self, count: int) -> None:
        """Say how many chunks there are in all."""
        if self._loop is not None:
            self._loop.end(count)

    def close(self) -> None:
        """End it."""
        self._closed = True
        if self._group is not None:
            self._group.stop()
        if self._thread is not None:
            self._thread.join(5.0)
        self._sender.close()
