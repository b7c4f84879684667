"""One reception of a fan-out, from the sender's offer to the receipt.

The order: who we are is said; what we are asked for is made ready, and what can be seen to fail is said before the
dump begins; then chunks come in, are passed on, and go to the consumer; the END is compared with what has come; the
last piece goes out, the consumer ends, the file gets its name; the sender is told. Whatever fails before the END
kills the consumer and removes the file. Whatever fails at the consumer does not end the passing on.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul.databases.proofs import count_restored
from backhaul.errors import BackhaulError, FailedError, IntegrityError, TargetError, UsageError
from backhaul.formats import chunk, names
from backhaul.formats.fan_out_messages import VERSION, Alive, Bye, Offer, Refusal
from backhaul.formats.redaction import redact_command
from backhaul.formats.source_url import parse_source_url
from backhaul.model.fan_out import FanOutStream, Receipt, ReceivedStream, ReceiveResult, SessionEnd, Start, StreamEnd
from backhaul.model.manifest import SourceRecord
from backhaul.network.control import ConnectionLostError, Control
from backhaul.network.credentials import Credentials
from backhaul.network.gathering import listen
from backhaul.network.receiver import FromStoreError, ReceiverSession, SessionLostError
from backhaul.operations import memory
from backhaul.operations.consuming import RestoreConsumer, StreamsConsumer
from backhaul.operations.from_store import manifest_of, pull_streams
from backhaul.operations.progress import PullProgress
from backhaul.operations.receive_options import ReceiveOptions, check_able, hello
from backhaul.operations.restore import restore, target_of
from backhaul.operations.spooling import spool_space
from backhaul.pipeline.chunk_log import ChunkLog
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.base import Target
from backhaul.targets.command import CommandTarget
from backhaul.targets.file import FileTarget
from backhaul.targets.several import SeveralTargets
from backhaul.targets.stream import StreamTarget

LOOKED = "it only looked who is here"
"""The sender's last word to a receiver whom it only asked how it is."""


class LookedAtError(Exception):
    """The sender only looked who is here."""


class TurnedAwayError(Exception):
    """The sender does not take us now; the text says why."""


class Reception:
    """See the module.

    Args:
        control: the connection to the sender; released at the end.
        credentials: who we are.
        options: what to do with what comes.
        progress: counters to keep up to date, or None.
        on_error_line: told each line of a consumer's stderr.
        on_news: told what people may want to know, as it happens.
        greeted: where links are taken, if the sender has had the greeting; None to greet it here.
    """

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
                control.send(hello(credentials, options, self._listener.getsockname()[1], ""))
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
        # What was read from a store, for one that came too late.
        self._pulled: tuple[ReceivedStream, ...] = ()
        self._restored = 0
        self._remarks: tuple[str, ...] = ()

    def run(self) -> ReceiveResult:
        """Receive. Raises as ``receive`` does."""
        session: ReceiverSession | None = None
        try:
            offer = self._offer()
            try:
                check_able(self._options)
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
                raise TurnedAwayError(str(error)) from error
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
                    raise LookedAtError
                raise TurnedAwayError(message.reason)
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
                self._take_from_store(error.reference, error.streams)
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
        self._check_places(start)
        return StreamsConsumer(
            group, start, lambda stream: self._make_target(start, stream), self._progress.delivered, self._recycler
        )

    def _check_places(self, start: Start) -> None:
        """Make sure that there is a place for each stream."""
        directory = self._options.output is not None and self._options.output.endswith("/")
        if len(start.streams) > 1 and not directory:
            raise UsageError(
                f"{start.sender} sends {len(start.streams)} streams",
                f"{', '.join(stream.name for stream in start.streams)}: no file and no command takes them all",
                "Give receive --into URL to restore them side by side, or -o DIR/ to keep each in a file.",
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

    def _take_from_store(self, reference: str, sent: tuple[ReceivedStream, ...]) -> None:
        """Read the backup: the stream went by before this host came."""
        self._abort()
        _check_unwritten(self._options.output, self._progress.raw)
        self._consumer, self._targets, self._commands = None, [], []
        self._from_store, self._began = reference, time.monotonic()
        self._on_news(f"too late for the stream: reading {reference}")
        if names.parse_backup_id(reference.rpartition("@")[2]) is None:
            raise _not_whole(f"{reference} is no backup in a store")
        # Before anything is begun: what is read is compared with this manifest, so it has to be of what was sent.
        manifest = manifest_of(sent, reference, self._options.identities)
        self._source = manifest.source
        start = self._start = Start(
            version=1,
            id=manifest.id,
            sender=self._start.sender if self._start is not None else self._control.name,
            tool="",
            codec="none",
            streams=tuple(FanOutStream(name=record.name, part=record.part) for record in manifest.streams),
            roster=(),
            source=manifest.source,
        )
        if self._options.into is not None:
            restored = restore(
                reference,
                self._options.into,
                msgspec.structs.replace(self._options.restoring, identities=self._options.identities),
                progress=self._progress,
                on_error_line=self._on_error_line,
                expected=manifest,
            )
            self._pulled = sent
            self._restored, self._remarks = restored.raw_size, restored.remarks
            self._wrong += restored.shortfalls
            self._count_rows()
            return
        self._check_places(start)
        pull_streams(
            reference,
            manifest,
            lambda stream: self._make_target(start, stream),
            self._options.identities,
            self._progress,
        )
        self._pulled = sent

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
        short = self._consumer.shortfalls if self._consumer is not None else ()
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
            remarks=tuple(self._consumer.remarks) if self._consumer is not None else self._remarks,
        )

    def _result(self, session: ReceiverSession) -> ReceiveResult:
        failed = self._failed()
        seconds = time.monotonic() - self._began
        receipt = self._receipt(session, "failed" if failed else "complete", "; ".join(failed))
        taken = session.send_receipt(receipt)
        if session.rejected:
            raise IntegrityError(
                f"{self._control.name} has sent something else than what came here",
                session.rejected,
                "Use nothing of it. See that both hosts run the same version, and send again.",
            )
        start = self._start
        streams = self._received()
        return ReceiveResult(
            id=start.id if start is not None else "",
            sender=start.sender if start is not None else self._control.name,
            session=session.keys.session.hex(),
            streams=streams,
            raw_size=self._restored or sum(stream.size for stream in streams),
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


def _check_unwritten(output: str | None, count: int) -> None:
    """Let nothing follow the first part of another reading where that can't be taken back.

    Raises:
        TargetError: stdout has bytes already.
    """
    if output == "-" and count:
        raise TargetError(
            "The stream can't begin anew on stdout",
            f"{count} bytes of it are out already, and only the store still has all of it",
            "Throw away what was written, and pull the backup from the store; or receive into a file.",
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
