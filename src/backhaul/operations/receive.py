"""receive: one host's part of a fan-out, from the sender's offer to the receipt.

The order: who we are is said; what we are asked for is made ready, and what can be seen to fail is said before the
dump begins; then chunks come in, are passed on, and go to the consumer; the END is compared with what has come; the
last piece goes out, the consumer ends, the file gets its name; the sender is told. Whatever fails before the END
kills the consumer and removes the file. Whatever fails at the consumer does not end the passing on.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import platform
import queue
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul import version
from backhaul.databases.proofs import count_restored
from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    FailedError,
    IntegrityError,
    PeerError,
    TargetError,
    UsageError,
)
from backhaul.formats import chunk, names
from backhaul.formats.age_keys import Identity
from backhaul.formats.fan_out_messages import VERSION, Alive, Bye, Hello, Offer, Refusal
from backhaul.formats.redaction import redact_command
from backhaul.formats.roster import Host
from backhaul.formats.source_url import parse_source_url
from backhaul.model.fan_out import Receipt, ReceivedStream, ReceiveResult, SessionEnd, Start, StreamEnd
from backhaul.model.manifest import SourceRecord
from backhaul.network.accepting import serve_connections
from backhaul.network.authority import SEND
from backhaul.network.control import SILENCE, ConnectionLostError, Control, plain_address
from backhaul.network.credentials import Credentials
from backhaul.network.gathering import listen
from backhaul.network.receiver import FromStoreError, ReceiverSession, SessionLostError
from backhaul.operations import memory
from backhaul.operations.consuming import RestoreConsumer, StreamsConsumer
from backhaul.operations.progress import PullProgress
from backhaul.operations.pull import PullOptions, pull
from backhaul.operations.restore import RestoreOptions, restore, target_of
from backhaul.operations.spooling import check_spool, spool_space
from backhaul.pipeline.chunk_log import ChunkLog
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.base import Target
from backhaul.targets.command import CommandTarget
from backhaul.targets.file import FileTarget
from backhaul.targets.several import SeveralTargets
from backhaul.targets.stream import StreamTarget

DEFAULT_MEMORY = 256 << 20
DEFAULT_SPOOL_SIZE = 100 * 10**9
DEFAULT_MAX_WAIT = 3600.0
_OPENING = 10.0
_REDIAL = 1.0
_SAY_AGAIN = 600.0
_LOOK = 0.5


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


class _LookedAtError(Exception):
    """The sender only looked who is here."""


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
    _check(options)
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
                return _Reception(control, credentials, options, progress, on_error_line, on_news).run()
            except (_LookedAtError, _TurnedAwayError, PeerError, OSError) as error:
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


class _TurnedAwayError(Exception):
    """The sender does not take us now; the text says why."""


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
    _check(options)
    memory.settle_allocator()
    with listen(address, port, "receive") as listener:
        service = _Service(listener, credentials, options, on_news)
        on_ready(listener.getsockname()[1])
        _tell_systemd("READY=1")
        while sessions is None or sessions > 0:
            control = service.next()
            try:
                reception = _Reception(
                    control, credentials, options, make_progress(), on_error_line, on_news, service.data_listener
                )
                on_session(reception.run())
            except (_LookedAtError, _TurnedAwayError):
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
                control.send(_hello(self._credentials, self._options, data_listener.getsockname()[1], busy))
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


class _Reception:
    """One session, from the greeting to the receipt."""

    def __init__(
        self,
        control: Control,
        credentials: Credentials,
        options: ReceiveOptions,
        progress: PullProgress | None,
        on_error_line: Callable[[bytes], None] | None,
        on_news: Callable[[str], None],
        greeted: socket.socket | None = None,
    ) -> None:
        self._control = control
        self._options = options
        self._progress = progress or PullProgress()
        self._on_error_line = on_error_line
        self._on_news = on_news
        self._listener = greeted or listen("", options.data_port, "receive")
        if greeted is None:
            with contextlib.suppress(ConnectionLostError):  # what is wrong is said when nothing comes back
                control.send(_hello(credentials, options, self._listener.getsockname()[1], ""))
        self._consumer: StreamsConsumer | RestoreConsumer | None = None
        self._start: Start | None = None
        self._targets: list[SeveralTargets] = []
        self._commands: list[CommandTarget] = []
        self._file = ""
        self._began = time.monotonic()
        self._from_store: str | None = None
        self._recycler = Recycler(memory.RECYCLED)
        self._source: SourceRecord | None = None
        self._rows: dict[str, int] = {}
        self._wrong: list[str] = []
        self._pulled: tuple[ReceivedStream, ...] = ()

    def run(self) -> ReceiveResult:
        """Receive. Raises as ``receive`` does."""
        session: ReceiverSession | None = None
        try:
            offer = self._offer()
            try:
                _check_able(self._options)
            except BackhaulError as error:
                with contextlib.suppress(ConnectionLostError):
                    self._control.send(Refusal(reason=f"{error.what}: {error.why}"))
                raise
            space = spool_space(self._options.spool, self._options.spool_size)
            recycler = self._recycler
            log = ChunkLog(self._options.memory, space=space, opened_ahead=memory.OPENED_AHEAD, recycler=recycler)
            session = ReceiverSession(self._control, offer, self._listener, log, recycler)
            session.start()
            return self._receive(session)
        except ConnectionLostError as error:
            raise _lost(f"the connection to {self._control.name} is lost: {error}") from error
        finally:
            if session is not None:
                session.close()
            else:
                self._control.release()
            self._listener.close()

    def _offer(self) -> Offer:
        while True:
            try:
                message = self._control.receive()
            except ConnectionLostError as error:
                raise _TurnedAwayError(str(error)) from error
            if isinstance(message, Offer):
                if message.version != VERSION:
                    raise FailedError(
                        f"{self._control.name} speaks another version",
                        f"{message.tool} has {message.version}, this host has {VERSION}",
                        "Install the same version of backhaul on both.",
                    )
                if (len(message.session), len(message.key), len(message.signer)) != (16, 32, 32):
                    raise FailedError(
                        f"{self._control.name} does not begin as a sender does",
                        "its keys are of other sizes",
                        "Install the same version of backhaul on both.",
                    )
                self._on_news(f"{message.sender} has this host on its list; waiting for the start")
                return message
            if isinstance(message, Bye):
                if message.reason == LOOKED:
                    raise _LookedAtError
                raise _TurnedAwayError(message.reason)
            if not isinstance(message, Alive):
                raise FailedError(
                    f"{self._control.name} does not begin as a sender does",
                    f"it says {type(message).__name__}",
                    "See what runs there.",
                )

    def _receive(self, session: ReceiverSession) -> ReceiveResult:
        failure: BackhaulError | None = None
        try:
            with Supervisor("receive") as group:
                consumed = threading.Event()
                # (Whoever waits for a consumer that stands still sees no end of the session.)
                group.start(lambda: session.watch(consumed), "watch")
                try:
                    self._consume(session, group)
                finally:
                    consumed.set()
            if self._consumer is not None:
                self._consumer.commit()
                self._count_rows()
        except FromStoreError as error:
            try:
                self._take_from_store(str(error))
            except BackhaulError as failed:
                session.send_receipt(self._receipt(session, "failed", f"{failed.what}: {failed.why}"), patience=1.0)
                raise
        except SessionLostError as error:
            self._abort()
            raise self._lost_session(session, str(error)) from error
        except OSError as error:
            self._abort()
            raise self._lost_session(session, f"the spool failed: {error.strerror or error}") from error
        except BaseException as error:
            self._abort()
            if not isinstance(error, BackhaulError):
                raise
            if session.failure is not None:
                raise self._lost_session(session, session.failure) from error
            failure = error
        if failure is not None:
            self._pass_on(session, failure)
            raise failure
        return self._result(session)

    def _consume(self, session: ReceiverSession, group: Supervisor) -> None:
        ends: list[StreamEnd] = []
        for header, body in session.chunks(group.check):
            group.check()
            if header.kind == chunk.DATA:
                consumer = self._begun()
                if header.stream >= len(consumer.sinks):
                    raise _not_whole(f"a chunk of stream {header.stream} came, and there are {len(consumer.sinks)}")
                consumer.sinks[header.stream].put(body, header.raw)
            elif header.kind == chunk.START:
                self._start = start = chunk.decode_body(bytes(body), Start)
                _check_start(start)
                self._began = time.monotonic()
                self._on_news(f"{start.sender} sends {start.id}")
                self._consumer = self._make_consumer(start, group)
            elif header.kind == chunk.STREAM_END:
                end = chunk.decode_body(bytes(body), StreamEnd)
                self._begun().sinks[end.stream].end(end)
                ends.append(end)
            else:
                last = chunk.decode_body(bytes(body), SessionEnd)
                expected = tuple(sorted(ends, key=lambda end: end.stream))
                if last.chunks != header.number or last.streams != expected or len(ends) != len(self._begun().sinks):
                    raise _not_whole("the END of the session names other streams, or chunks, than have come")
                self._source = last.source
                self._begun().finish()
                return
        raise SessionLostError("the sender has given up")

    def _begun(self) -> StreamsConsumer | RestoreConsumer:
        if self._consumer is None:
            raise _not_whole("it does not begin with START")
        return self._consumer

    # -- where it goes -----------------------------------------------------------------------------------

    def _make_consumer(self, start: Start, group: Supervisor) -> StreamsConsumer | RestoreConsumer:
        if self._options.into is not None:
            if start.source is None:
                raise UsageError(
                    f"What {start.sender} sends can't be restored as it comes",
                    "it is a command's output, or the streams of a whole server",
                    "Give receive the command that reads it, after --; or send --from the URL of one database.",
                )
            url = parse_source_url(self._options.into)
            target = target_of(url, start.source, self._options.restoring, self._progress, self._on_error_line)
            return RestoreConsumer(group, start, target, self._progress.delivered, self._recycler)
        directory = self._options.output is not None and self._options.output.endswith("/")
        if len(start.streams) > 1 and not directory:
            raise UsageError(
                f"{start.sender} sends {len(start.streams)} streams",
                f"{', '.join(stream.name for stream in start.streams)}: no file and no command takes them all",
                "Give receive --into URL to restore them side by side, or -o DIR/ to keep each in a file.",
            )
        return StreamsConsumer(
            group, start, lambda stream: self._make_target(start, stream), self._progress.delivered, self._recycler
        )

    def _make_target(self, start: Start, stream: str) -> Target:
        targets: list[Target] = []
        output = self._options.output
        if output is not None and output != "-":
            self._file = output.replace("{id}", start.id).replace("{sender}", _plain(start.sender))
            if output.endswith("/"):
                names.check_stream_name(stream)
                try:
                    Path(self._file).mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise TargetError(
                        f"Could not write {self._file}", error.strerror or str(error), "Check the directory."
                    ) from error
                targets.append(FileTarget(f"{self._file}{stream}"))
            else:
                targets.append(FileTarget(self._file))
        elif output == "-":
            targets.append(StreamTarget(1))
        if self._options.command:
            environment = {
                **os.environ,
                "BACKHAUL_ID": start.id,
                "BACKHAUL_SENDER": start.sender,
                "BACKHAUL_STREAM": stream,
            }
            command = CommandTarget(self._options.command, self._on_error_line, environment=environment)
            self._commands.append(command)
            targets.append(command)
        several = SeveralTargets(targets)
        self._targets.append(several)
        return several

    def _abort(self) -> None:
        if self._consumer is not None:
            self._consumer.abort()
        for target in self._targets:
            target.abort()

    def _count_rows(self) -> None:
        """Count what was restored: what is not as it was at the source is said, and is no complete end."""
        if not self._options.counts or self._options.into is None or self._source is None:
            return
        url = parse_source_url(self._options.into)
        if url.kind not in ("postgresql", "mariadb"):
            return
        for record in self._source.databases:
            found, check = count_restored(url, record)
            self._rows |= {f"{record.name}/{name}": rows for name, rows in found.items() if isinstance(rows, int)}
            if check.state == "failed":
                self._wrong.append(f"{check.name}: {check.detail}")

    # -- the end -----------------------------------------------------------------------------------------

    def _take_from_store(self, reference: str) -> None:
        """Read the backup: the stream went by before this host came."""
        self._abort()
        self._targets, self._commands = [], []
        self._from_store = reference
        self._on_news(f"too late for the stream: reading {reference}")
        if self._options.into is not None:
            restored = restore(
                reference,
                self._options.into,
                msgspec.structs.replace(self._options.restoring, identities=self._options.identities),
                progress=self._progress,
                on_error_line=self._on_error_line,
            )
            self._wrong += restored.shortfalls
            if self._options.counts:
                self._wrong.append("the rows were not counted: the backup was read from the store")
            return
        if names.parse_backup_id(reference.rpartition("@")[2]) is None:
            raise _not_whole(f"{reference} is no backup in a store")
        start = self._start or Start(
            version=1,
            id=reference.rpartition("@")[2],
            sender=self._control.name,
            tool="",
            codec="none",
            streams=(),
            roster=(),
        )
        self._start = start
        target = self._make_target(start, "data")
        result = pull(reference, target, PullOptions(identities=self._options.identities), progress=self._progress)
        self._pulled = (ReceivedStream(name=result.stream, size=result.raw_size, blake3=""),)

    def _pass_on(self, session: ReceiverSession, failure: BackhaulError) -> None:
        """The consumer has failed: the others shall have the stream all the same, and the sender hears of it."""
        session.stop_consuming()
        self._on_news(f"{failure.what}: the stream is passed on all the same")
        session.pass_on_to_the_end()
        session.send_receipt(self._receipt(session, "failed", f"{failure.what}: {failure.why}"))

    def _lost_session(self, session: ReceiverSession, reason: str) -> FailedError:
        session.send_receipt(self._receipt(session, "failed", reason), patience=1.0)
        if self._start is None:
            return FailedError("No dump came", reason, "Nothing was touched. See to the sender, and send again.")
        return _lost(reason)

    def _received(self) -> tuple[ReceivedStream, ...]:
        if self._consumer is None:
            return self._pulled
        return tuple(sink.received for sink in self._consumer.sinks if sink.received is not None)

    def _failed(self) -> tuple[str, ...]:
        failed = [f"{error.what}: {error.why}" for target in self._targets for _, error in target.failed]
        # What a restore could not bring back is no complete end here either.
        short = self._consumer.shortfalls if self._consumer is not None and self._from_store is None else ()
        return (*failed, *short, *self._wrong)

    def _exit_status(self) -> int | None:
        return self._commands[0].exit_status if self._commands else None

    def _consumer_name(self) -> str:
        if self._options.into is not None:
            return parse_source_url(self._options.into).text
        return " ".join(redact_command(self._options.command))

    def _receipt(self, session: ReceiverSession, outcome: str, reason: str = "") -> Receipt:
        return Receipt(
            outcome="complete" if outcome == "complete" else "failed",
            streams=self._received(),
            file=self._file if outcome == "complete" or self._failed() else "",
            consumer=self._consumer_name(),
            exit_status=self._exit_status(),
            seconds=round(time.monotonic() - self._began, 3),
            spooled=session.log.most_spooled,
            rows=self._rows,
            reason=reason,
            remarks=tuple(self._consumer.remarks) if self._consumer is not None else (),
        )

    def _result(self, session: ReceiverSession) -> ReceiveResult:
        failed = self._failed()
        seconds = time.monotonic() - self._began
        receipt = self._receipt(session, "failed" if failed else "complete", "; ".join(failed))
        taken = session.send_receipt(receipt)
        start = self._start
        streams = self._received()
        return ReceiveResult(
            id=start.id if start is not None else "",
            sender=start.sender if start is not None else self._control.name,
            session=session.keys.session.hex(),
            streams=streams,
            raw_size=sum(stream.size for stream in streams),
            received=session.received,
            passed_on=session.passed_on,
            seconds=seconds,
            spooled=session.log.most_spooled,
            from_store=self._from_store,
            file=receipt.file,
            consumer=receipt.consumer,
            exit_status=receipt.exit_status,
            rows=self._rows,
            receipt_taken=taken,
            failed=failed,
            remarks=receipt.remarks,
            memory=memory.fan_out_bound(self._options.memory, len(start.streams) if start is not None else 1),
            peak_memory=memory.peak_memory(),
        )


LOOKED = "it only looked who is here"
"""The sender's last word to a receiver whom it only asked how it is."""


def _check_start(start: Start) -> None:
    """Let nothing of a session's names become a path, or a word, that it must not be.

    Raises:
        IntegrityError: the session's names are none.
    """
    streams = [stream.name for stream in start.streams]
    try:
        for name in streams:
            names.check_stream_name(name)
    except UsageError as error:
        raise _not_whole(f"{error.what}: {error.why}") from error
    if names.parse_backup_id(start.id) is None or len(set(streams)) != len(streams) or not streams:
        raise _not_whole("its START names no backup, or its streams are not told apart")


def _check(options: ReceiveOptions) -> None:
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
    _check_able(options)


def _check_able(options: ReceiveOptions) -> None:
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


def _hello(credentials: Credentials, options: ReceiveOptions, port: int, busy: str) -> Hello:
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


def _lost(reason: str) -> FailedError:
    return FailedError(
        "The dump did not arrive whole",
        reason,
        "The consumer was killed, and no file was kept. See to the sender, and send again.",
    )


def _not_whole(why: str) -> IntegrityError:
    return IntegrityError("The session is not whole", why, "See that both hosts run the same version, and send again.")


def _plain(name: str) -> str:
    plain = "".join(letter if letter.isalnum() or letter in "._-" else "_" for letter in name)
    return plain if plain.strip(".") else "_"


def _clock() -> str:
    return dt.datetime.now().astimezone().strftime("%H:%M:%S")


def _tell_systemd(state: str) -> None:
    """Tell the service manager, if there is one, as ``sd_notify(3)`` does."""
    path = os.environ.get("NOTIFY_SOCKET")
    if path:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as connection:
            connection.connect(f"\0{path[1:]}" if path.startswith("@") else path)
            connection.send(state.encode())
