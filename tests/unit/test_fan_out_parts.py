"""Small parts of the fan-out: taking connections, names from others, memory that is used again, several targets."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, ClassVar

import pytest
from blake3 import blake3

from backhaul.errors import FailedError, IntegrityError, TargetError
from backhaul.formats import fan_out_messages as messages
from backhaul.model.fan_out import FanOutStream, Start, StreamEnd
from backhaul.model.manifest import ProducerRecord, SourceRecord, StreamRecord
from backhaul.network.accepting import serve_connections
from backhaul.operations.consuming import RestoreConsumer
from backhaul.operations.reception import _check_start, _check_unwritten, _plain
from backhaul.pipeline.recycler import Recycler
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.command import CommandTarget
from backhaul.targets.file import FileTarget
from backhaul.targets.sections import Phase, Step
from backhaul.targets.several import SeveralTargets


class Shortage(socket.socket):
    """A listener that is out of descriptors a few times, as ``accept`` says it."""

    failures: ClassVar = [errno.EMFILE, errno.ECONNABORTED, errno.ENFILE]

    def accept(self) -> tuple[socket.socket, tuple[str, int]]:
        if self.failures:
            raise OSError(self.failures.pop(), "short of something")
        return super().accept()


def test_a_shortage_ends_nobody_s_listening() -> None:
    stop, served = threading.Event(), threading.Event()

    def serve(connection: socket.socket, address: str) -> None:
        assert address == "127.0.0.1"
        connection.close()
        served.set()

    with Shortage() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(0.1)
        thread = threading.Thread(target=serve_connections, args=(listener, serve, stop.is_set, "test"))
        thread.start()
        with socket.create_connection(listener.getsockname()):
            assert served.wait(10)
        assert Shortage.failures == []
        stop.set()
        thread.join(10)
        assert not thread.is_alive()


def test_a_listener_that_is_closed_is_listened_at_no_more() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.settimeout(0.1)
    arguments = (listener, lambda connection, address: connection.close(), lambda: False, "test")
    thread = threading.Thread(target=serve_connections, args=arguments)
    thread.start()
    listener.close()
    thread.join(10)
    assert not thread.is_alive()


def start(backup: str = "20261121T020000Z", *streams: str) -> Start:
    named = tuple(FanOutStream(name=name) for name in streams or ("data",))
    return Start(version=1, id=backup, sender="db1", tool="", codec="none", streams=named, roster=())


def test_names_from_a_sender_become_no_other_path() -> None:
    _check_start(start())
    _check_start(start("20261121T020000Z", "schema", "data-1"))
    for backup in ("../../etc/cron.d/evil", "", "latest", "20261121T020000Z/x", "a\0b"):
        with pytest.raises(IntegrityError):
            _check_start(start(backup))
    for streams in (("../x",), ("a/b",), ("a", "a"), ("a\0",), (".",)):
        with pytest.raises(IntegrityError):
            _check_start(start("20261121T020000Z", *streams))
    with pytest.raises(IntegrityError):
        _check_start(Start(version=1, id="20261121T020000Z", sender="", tool="", codec="none", streams=(), roster=()))


@pytest.mark.parametrize(("name", "plain"), [("db1.example.com", "db1.example.com"), ("..", "_"), ("a/../b", "a_.._b")])
def test_a_sender_s_name_in_a_path(name: str, plain: str) -> None:
    assert _plain(name) == plain


def test_what_others_say_gives_a_terminal_no_orders() -> None:
    said = messages.encode(messages.Refusal(reason="no\x1b]0;owned\x07\x9b2J room\nleft\x7f"))
    message = messages.decode(said[messages.LENGTH.size :])
    assert isinstance(message, messages.Refusal)
    assert message.reason == "no?]0;owned??2J room\nleft?"


def test_memory_is_used_again_by_nobody_who_shares_it() -> None:
    recycler = Recycler(1000)
    buffer = recycler.take(100)
    first = id(buffer)
    recycler.give(buffer)
    del buffer
    buffer = recycler.take(100)
    assert id(buffer) == first
    view = memoryview(buffer)
    recycler.give(buffer)
    assert recycler.take(100) is not buffer
    view.release()
    other = [buffer]
    recycler.give(buffer)
    assert recycler.take(100) is not other[0]


def test_no_more_memory_is_kept_than_may_be() -> None:
    recycler = Recycler(1000)
    large = recycler.take(2000)
    recycler.give(large)
    del large
    small = [recycler.take(300) for _ in range(5)]
    while small:
        buffer = small.pop()
        recycler.give(buffer)
        del buffer
    assert recycler._kept <= 1000


def test_a_command_that_fails_does_not_cost_the_file_beside_it(tmp_path: Path) -> None:
    file = tmp_path / "kept"
    command = CommandTarget(["sh", "-c", "head -c 10 > /dev/null; exit 3"], lambda line: None)
    several = SeveralTargets([FileTarget(str(file)), command])
    content = os.urandom(3_000_000)
    with Supervisor("test") as group:
        several.start(0, group)
        for begin in range(0, len(content), 500_000):
            several.write(memoryview(content)[begin : begin + 500_000])
        several.commit()
    assert file.read_bytes() == content
    ((failed, error),) = several.failed
    assert failed is command
    assert "status 3" in error.why
    assert command.exit_status == 3


def test_the_last_one_that_fails_is_an_error(tmp_path: Path) -> None:
    several = SeveralTargets([CommandTarget(["sh", "-c", "exit 1"], lambda line: None)])
    with Supervisor("test") as group, pytest.raises(TargetError):
        several.start(0, group)
        while True:
            several.write(memoryview(bytes(100_000)))


def test_what_is_too_large_for_a_chunk_is_refused_where_it_is_made() -> None:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    from backhaul.formats import chunk
    from backhaul.transforms.seal import Sealer, SessionKeys

    signer = Ed25519PrivateKey.generate()
    sealer = Sealer(SessionKeys(bytes(16), bytes(32), signer.public_key().public_bytes_raw()), signer)
    with pytest.raises(FailedError):
        sealer.data(0, bytes(chunk.LARGEST_BODY), 1)
    assert sealer.number == 0


class Lingering:
    """A thread that has done what it had to do, and has not ended yet."""

    def __init__(self, thread: threading.Thread) -> None:
        self._thread = thread

    def is_alive(self) -> bool:
        return True


class LingeringGroup(Supervisor):
    def start(self, work: Callable[[], None], name: str) -> Any:
        return Lingering(super().start(work, name))


class Kept:
    """A target that keeps what it is given, in the order in which streams end."""

    def __init__(self, name: str, ended: list[str]) -> None:
        self.name = name
        self.data = b""
        self._ended = ended

    def start(self, raw_size: int, group: Supervisor) -> None:
        pass

    def write(self, data: memoryview) -> None:
        self.data += data

    def commit(self) -> None:
        self._ended.append(f"{self.name} {self.data.decode()}")

    def abort(self) -> None:
        pass


class TwoPhases:
    """Definitions first, then rows."""

    name = "nowhere"

    def __init__(self) -> None:
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self.ended: list[str] = []

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord]) -> None:
        pass

    def phases(self, jobs: int) -> Sequence[Phase]:
        return [
            Phase(name, (Step(name, lambda name=name: Kept(name, self.ended)),))  # type: ignore[misc]
            for name in ("schema", "data-1")
        ]

    def commit(self) -> None:
        pass

    def abort(self) -> None:
        pass


def test_a_phase_begins_when_the_one_before_it_is_done() -> None:
    """Whether or not the threads of that have ended: nobody says when they have."""
    names, target = ("schema", "data-1"), TwoPhases()
    start = Start(
        version=1,
        id="20261122T000000Z",
        sender="db1",
        tool="",
        codec="none",
        streams=tuple(FanOutStream(name=name) for name in names),
        roster=(),
        source=SourceRecord(kind="postgresql", server="", address="", state_of=""),
    )
    with LingeringGroup("restore") as group:
        consumer = RestoreConsumer(group, start, target, lambda size: None, Recycler(1 << 20))
        for number, (sink, body) in enumerate(zip(consumer.sinks, (b"one", b"two"), strict=True)):
            sink.put(memoryview(bytearray(body)), 3)
            sink.end(
                StreamEnd(
                    stream=number,
                    chunks=1,
                    size=3,
                    blake3=blake3(body).hexdigest(),
                    producer=ProducerRecord(kind="command", seconds=0.0),
                )
            )
        consumer.finish()
    assert target.ended == ["schema one", "data-1 two"]


def test_nothing_follows_the_first_part_of_another_reading_on_stdout() -> None:
    with pytest.raises(TargetError, match="can't begin anew"):
        _check_unwritten("-", 1)
    _check_unwritten("-", 0)
    _check_unwritten("file", 1)
    _check_unwritten(None, 1)
