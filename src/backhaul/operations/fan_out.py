"""The fan-out as a destination: receivers are gathered, get what stores get from the same read, and give receipts.

Its order, beside that of a push: receivers come, and enough of them, before the dump begins; START says what is to
come; each frame is sealed and sent as it is made; a stream's END goes out when its producer ended well, the session's
when all did and were of one state. A push that fails before that aborts: no receiver takes what came for a whole.
"""

from __future__ import annotations

import datetime as dt
import socket
import time
from collections.abc import Callable

import msgspec

from backhaul import version
from backhaul.errors import BackhaulError, ConfigurationError, FailedError
from backhaul.formats.quantities import format_duration
from backhaul.formats.roster import RECEIVER_PORT, SENDER_PORT, Host
from backhaul.model.fan_out import (
    COMPLETE,
    FanOutResult,
    FanOutStream,
    ReceiverFate,
    SessionEnd,
    Start,
    StreamEnd,
    Transport,
)
from backhaul.model.manifest import SourceRecord
from backhaul.network.credentials import Credentials
from backhaul.network.gathering import Gathering, listen
from backhaul.network.participants import SessionOptions
from backhaul.network.sender import NobodyLeftError, SenderSession
from backhaul.operations import memory
from backhaul.operations.encoding import Transcript
from backhaul.operations.spooling import spool_space
from backhaul.pipeline.chunk_log import ChunkLog, LogClosedError
from backhaul.pipeline.recycler import Recycler
from backhaul.planning import roster
from backhaul.planning.compression_level import Line
from backhaul.sources.base import NamedStream

DEFAULT_MEMORY = 256 << 20
DEFAULT_SPOOL_SIZE = 100 * 10**9
DEFAULT_MAX_WAIT = 600.0
DEFAULT_MAX_HOLD = 600.0
# Pieces that did not compress are cut into chunks of this size: they fit the processor's cache on their way.
_PLAIN_CHUNK = 1 << 20
# The log holds far more than keeps a network busy: with so much waiting the receivers are what all wait for.
_WAITING = 64 << 20
_LOOK = 0.2
_EXPIRES_SOON = dt.timedelta(days=30)


class FanOutOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Who is to receive, and how.

    Attributes:
        hosts: the roster; empty for whoever has a key and comes.
        min_receivers: with no roster, how many must be there.
        min_wait: seconds to wait for more, from the first one that came.
        max_wait: seconds to wait for those who are not there, before it begins without them, or fails.
        require: how many must be complete in the end: ``all`` or a number.
        address: where receivers may call; empty for everywhere.
        port: and at which port; None for the usual one, if it is free.
        transport: how the stream is sent.
        group: the multicast group's address.
        group_port: its port.
        interface: the address of this host on the network that the group is of; None for the one the way to it has.
        rate: bytes a second of multicast at most; None to find out.
        parity: pieces for each one of parity; 0 for none.
        spool: a directory for what slow receivers have not taken, and late ones will want; or None.
        spool_size: most bytes there.
        memory: bytes of chunks to keep.
        slow: ``throttle`` or ``drop``.
        max_hold: seconds in all for which the dump may wait for receivers.
        receipt_wait: seconds to wait for receipts once all was sent; None for as long as the receivers are there.
    """

    hosts: tuple[Host, ...] = ()
    min_receivers: int = 1
    min_wait: float = 0.0
    max_wait: float = DEFAULT_MAX_WAIT
    require: str = "all"
    address: str = ""
    port: int | None = None
    transport: Transport = "chain"
    group: str = "239.255.74.11"
    group_port: int = 7412
    interface: str | None = None
    rate: float | None = None
    parity: int = 0
    spool: str | None = None
    spool_size: int = DEFAULT_SPOOL_SIZE
    memory: int = DEFAULT_MEMORY
    slow: str = "throttle"
    max_hold: float = DEFAULT_MAX_HOLD
    receipt_wait: float | None = None


class FanOut:
    """See the module. ``failure`` tells why it is out of the run; a push goes on without it, if that is allowed.

    Args:
        credentials: who we are.
        options: who is to receive, and how.
        on_news: told what people may want to know, as it happens.
    """

    def __init__(
        self,
        credentials: Credentials,
        options: FanOutOptions,
        on_news: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.options = options
        self.failure: BackhaulError | None = None
        self.session: SenderSession | None = None
        self._credentials = credentials
        self._on_news = on_news
        self._gathering: Gathering | None = None
        self._streams: tuple[str, ...] = ()
        self._begun = False
        self._framed = False
        self._expected = len(options.hosts) or options.min_receivers
        self._required = roster.required(options.require, self._expected)
        self._problems: dict[str, str] = {}

    @property
    def text(self) -> str:
        """The roster, as a destination's name."""
        names = ",".join(host.text(RECEIVER_PORT) for host in self.options.hosts) or str(self.options.min_receivers)
        return f"send:{names}"

    @property
    def held_seconds(self) -> float:
        """For how long the dump has waited for receivers so far."""
        return self.session.log.held_seconds if self.session is not None else 0.0

    def line(self) -> Line:
        """Return what has gone to the receivers so far, and what waits to, for who is the slowest."""
        if self.session is None or self.failure is not None:
            return Line(gone=0, held=0, room=0)
        appended = self.session.log.appended
        held, room = self.session.log.backlog()
        return Line(gone=appended - held, held=held, room=min(room, _WAITING))

    def overview(self) -> list[tuple[str, str, str]]:
        """Return each receiver's name, its state, and where it is, for people."""
        if self.session is None:
            return [(host.name, "waiting", "") for host in self.options.hosts]
        known = {name: (name, state, where) for name, state, where in self.session.overview()}
        for host in self.options.hosts:
            known.setdefault(host.name, (host.name, "waiting", ""))
        return list(known.values())

    def give_up(self, error: BackhaulError) -> None:
        """Take it out of the run before it began: nobody receives anything."""
        self.failure = error
        self.abort(f"{error.what}: {error.why}")

    # -- before the dump ---------------------------------------------------------------------------------

    def gather(self, *, store_expected: bool, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait until those are there who have to be.

        Args:
            store_expected: whether the same run makes a backup in a store that other hosts can reach.
            sleep: waits for so many seconds, or raises.

        Raises:
            ConfigurationError: the port or the spool can't be used.
            FailedError: too few have come.
        """
        options = self.options
        space = spool_space(options.spool, options.spool_size)
        recycler = Recycler(memory.RECYCLED)
        log = ChunkLog(options.memory, space=space, keep_all=space is not None, recycler=recycler)
        how = SessionOptions(
            slow=options.slow,
            max_hold=options.max_hold,
            transport=options.transport,
            group=options.group,
            group_port=options.group_port,
            interface=options.interface or "",
            rate=options.rate,
            parity=options.parity,
        )
        session = self.session = SenderSession(socket.gethostname(), log, how, recycler, self._on_news)
        session.store_expected = store_expected
        self._gathering = Gathering(self._credentials, options.hosts, self._listener(), session.admit, self._problem)
        session.on_left = self._gathering.left
        self._warn()
        self._gathering.start()
        began = time.monotonic()
        first: float | None = None
        while True:
            ready = session.ready
            now = time.monotonic()
            if ready and first is None:
                first = now
            decision = roster.may_begin(
                ready=ready,
                expected=self._expected,
                required=self._required,
                named=bool(options.hosts),
                waited=now - began,
                since_first=now - first if first is not None else 0.0,
                min_wait=options.min_wait,
                max_wait=options.max_wait,
            )
            if decision == roster.BEGIN:
                break
            if decision == roster.GIVE_UP:
                raise self._too_few_came(ready)
            sleep(_LOOK / 4)
        if not options.hosts:
            self._expected = max(self._expected, session.ready)
            self._required = roster.required(options.require, self._expected)
        session.probe_group()

    def _warn(self) -> None:
        if self._credentials.kind == "plain":
            self._on_news("without keys (--insecure-plain): whoever reaches these hosts can read or send a dump")
        expires = self._credentials.expires
        if expires is not None and expires - dt.datetime.now(dt.UTC) < _EXPIRES_SOON:
            self._on_news(
                f"this host's key is good until {expires:%Y-%m-%d} only: backhaul keys DIR --renew makes another"
            )

    def _listener(self) -> socket.socket | None:
        port = SENDER_PORT if self.options.port is None else self.options.port
        try:
            return listen(self.options.address, port, "send")
        except ConfigurationError as error:
            if self.options.port is not None or not self.options.hosts:
                raise
            self._on_news(f"{error.what}: {error.why}; only receivers that listen are reached")
            return None

    def _problem(self, host: str, reason: str) -> None:
        if self._problems.get(host) != reason:
            self._problems[host] = reason
            self._on_news(f"{host} is not there: {reason}" if host not in reason else reason)

    def _too_few_came(self, ready: int) -> FailedError:
        assert self.session is not None
        there = {receiver.name for receiver in self.session.receivers if receiver.state == "ready"}
        missing = [host.name for host in self.options.hosts if host.name not in there]
        why = "; ".join(
            [self._problems.get(name, f"{name} did not come") for name in missing]
            + list({r.name: f"{r.name}: {r.reason}" for r in self.session.receivers if r.reason}.values())
        )
        return FailedError(
            f"{ready} of {self._required} required receivers came in {format_duration(self.options.max_wait)}",
            why or "nobody called",
            "The dump was not begun. Start the receivers (send --check shows who is there), "
            "wait longer (--max-wait), or ask for fewer (--require).",
        )

    # -- the streams -------------------------------------------------------------------------------------

    def begin(self, backup: str, streams: tuple[NamedStream, ...], codec: str, source: SourceRecord | None) -> None:
        """Send START. Nobody else is on the roster from now on; who is may still come late."""
        assert self.session is not None
        if self._begun or self.failure is not None:
            return
        self._begun = True
        self._streams = tuple(stream.name for stream in streams)
        self._framed = codec == "zstd"
        names = [host.name for host in self.options.hosts] or [r.name for r in self.session.receivers]
        if not self.options.hosts and self._gathering is not None:
            self._gathering.stop()
        start = Start(
            version=1,
            id=backup,
            sender=socket.gethostname(),
            tool=f"backhaul {version.VERSION}",
            codec="zstd" if codec == "zstd" else "none",
            streams=tuple(FanOutStream(name=stream.name, part=stream.part) for stream in streams),
            roster=tuple(names),
            source=source,
        )
        self._guard(lambda session: session.begin(start))

    def put(self, stream: str, piece: bytes | memoryview, raw: int, check: Callable[[], None]) -> None:
        """Send a piece of a stream; waits while receivers have no room.

        Args:
            stream: its name.
            piece: a frame, or the bytes themselves.
            raw: its bytes, decoded.
            check: called now and then while it waits; what it raises ends the waiting.
        """
        if self.failure is not None:
            return
        number = self._streams.index(stream)
        if self._framed:
            self._guard(lambda session: session.put(number, piece, raw, check))
            return
        view = memoryview(piece)
        for start in range(0, len(view), _PLAIN_CHUNK):
            part = view[start : start + _PLAIN_CHUNK]
            self._guard(lambda session, part=part: session.put(number, part, len(part), check))  # type: ignore[misc]

    def end_stream(self, stream: str, transcript: Transcript, check: Callable[[], None]) -> None:
        """Say that a stream was whole."""
        if self.failure is not None:
            return
        number = self._streams.index(stream)
        end = StreamEnd(
            stream=number,
            chunks=self.session.chunks_of(number) if self.session is not None else 0,
            size=transcript.raw.size,
            blake3=transcript.raw.blake3,
            producer=transcript.producer,
        )
        self._guard(lambda session: session.end_stream(end, check))

    def end(self, source: SourceRecord | None, check: Callable[[], None]) -> None:
        """Say that all was whole."""

        def make(chunks: int, ends: tuple[StreamEnd, ...]) -> SessionEnd:
            return SessionEnd(chunks=chunks, streams=ends, source=source)

        self._guard(lambda session: session.end(make, check))

    def _guard(self, step: Callable[[SenderSession], None]) -> None:
        """Do it; a failure takes the fan-out out of the run, and nothing else."""
        if self.failure is not None or self.session is None:
            return
        try:
            step(self.session)
        except (NobodyLeftError, LogClosedError):
            self._fail("nobody is left who receives")
        except OSError as error:
            self._fail(f"the spool failed: {error.strerror or error}")
        except BackhaulError as error:
            self._fail(f"{error.what}: {error.why}")

    def _fail(self, reason: str) -> None:
        assert self.session is not None
        self.failure = self._error(reason)
        self.session.abort(reason)

    # -- the end -----------------------------------------------------------------------------------------

    def wait(self, *, reference: str | None, sleep: Callable[[float], None] = time.sleep) -> None:
        """Wait for the receipts; after it ``failure`` tells whether enough are complete.

        Args:
            reference: the backup of the same run in a store, for those who came too late; None if there is none.
            sleep: see ``gather``.
        """
        session = self.session
        if session is None or self.failure is not None:
            return
        if reference is not None:
            session.send_to_store_readers(reference)
        else:
            session.no_store("the backup did not get into the store")
        session.wait_for_receipts(lambda: sleep(0.0), self.options.receipt_wait)
        complete = sum(fate.state == COMPLETE for fate in self._fates())
        if complete < self._required:
            self.failure = self._error("")

    def abort(self, reason: str) -> None:
        """Tell the receivers that there is no whole stream; harmless after the end."""
        if self.session is not None:
            self.session.abort(reason)

    def close(self) -> None:
        """Let go of everybody."""
        if self._gathering is not None:
            self._gathering.stop()
        if self.session is not None:
            self.session.close()

    def _fates(self) -> tuple[ReceiverFate, ...]:
        """Return the fate of each of the roster, by its last coming, and of those that never came."""
        assert self.session is not None
        fates = {fate.name: fate for fate in self.session.fates()}
        for host in self.options.hosts:
            if host.name not in fates:
                reason = self._problems.get(host.name, "it never came")
                fates[host.name] = ReceiverFate(name=host.name, state="waiting", reason=reason)
        return tuple(fates.values())

    def _error(self, reason: str) -> FailedError:
        fates = self._fates()
        complete = [fate.name for fate in fates if fate.state == COMPLETE]
        failed = "; ".join(f"{f.name}: {f.state}: {f.reason}" for f in fates if f.state != COMPLETE)
        error = FailedError(
            f"{len(complete)} of {self._required} required receivers have the whole stream",
            "; ".join(text for text in (reason, failed) if text),
            f"Complete: {', '.join(complete)}. See the others, and send again." if complete else "Send again.",
        )
        error.details = {"receivers": [msgspec.to_builtins(fate) for fate in fates]}
        return error

    def result(self) -> FanOutResult:
        """Return what became of it."""
        session = self.session
        return FanOutResult(
            session=session.keys.session.hex() if session is not None else "",
            roster=self.text,
            transport=self.options.transport,
            payload=session.payload if session is not None else 0,
            sent=session.sent if session is not None else 0,
            held_seconds=round(self.held_seconds, 3),
            spooled=session.log.most_spooled if session is not None else 0,
            required=self._required,
            receivers=self._fates() if session is not None else (),
            reason=(self.failure.why or self.failure.what) if self.failure is not None else "",
        )
