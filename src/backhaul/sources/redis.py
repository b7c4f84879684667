"""Redis as a source: the dump that a replica would get, through the protocol, its checksum compared."""

from __future__ import annotations

import datetime as dt
import re
import time
from collections.abc import Callable, Sequence

from backhaul.databases.redis import DumpChecker, RedisConnection, RedisError
from backhaul.errors import ConfigurationError, SourceError
from backhaul.model.manifest import WHOLE, DatabaseRecord, ProducerRecord, SourceRecord, StreamPart, TableRecord
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.base import NamedStream, utc

_BUFFER = 1 << 18
_KEYS = re.compile(r"keys=(\d+)")


class RedisSource:
    """See the module, and ``SourceSet``."""

    parallel = 1

    def __init__(self, url: SourceUrl, *, now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC)) -> None:
        self.name = url.text
        self.total_tables = 0
        self._url = url
        self._now = now
        self._version = ""
        self._state_of = ""
        self._keys: dict[str, int] = {}
        self._dump: _Dump | None = None

    def check(self) -> None:
        """See ``SourceSet.check``."""
        DumpChecker()
        connection = RedisConnection(self._url)
        try:
            self._version = connection.information("server").get("redis_version", "unknown")
            self._keys = key_counts(connection)
        except (RedisError, OSError) as error:
            raise ConfigurationError(
                f"Redis at {connection.address} refused a question", str(error), "Allow the account INFO and PSYNC."
            ) from error
        finally:
            connection.close()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``."""
        self._state_of = utc(self._now())
        self._dump = _Dump(self._url)
        return (NamedStream(name="dump.rdb", source=self._dump, part=StreamPart(section=WHOLE)),)

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        assert self._dump is not None
        return SourceRecord(kind="redis", server=self._version, address=self._dump.address, state_of=self._state_of)

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._dump is not None
        # (Counted when the connection was tried, so of another moment than the dump.)
        tables = tuple(TableRecord(name=name, rows=keys, apart=True) for name, keys in self._keys.items())
        return SourceRecord(
            kind="redis",
            server=self._version,
            address=self._dump.address,
            state_of=self._state_of,
            size=self._dump.size,
            seconds=self._dump.seconds,
            coordinates=self._dump.coordinates,
            databases=(DatabaseRecord(name="redis", size=self._dump.size, tables=tables),),
            cluster=True,
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        if self._dump is not None:
            self._dump.abort()


def key_counts(connection: RedisConnection) -> dict[str, int]:
    """Return how many keys each database has."""
    counts = {}
    for name, text in connection.information("keyspace").items():
        match = _KEYS.search(text)
        counts[name] = int(match[1]) if match else 0
    return counts


class _Dump:
    """The bytes of a dump. See ``Source``."""

    def __init__(self, url: SourceUrl) -> None:
        self.name = url.text
        self.address = ""
        self.coordinates: dict[str, str] = {}
        self.size = 0
        self.seconds = 0.0
        self._url = url
        self._connection: RedisConnection | None = None
        self._checker = DumpChecker()
        self._left: int | None = None
        self._mark = b""
        self._held = b""
        self._ended = False
        self._buffer = memoryview(bytearray(_BUFFER))
        self._ready = self._buffer[:0]
        self._started = 0.0
        self._group: Supervisor | None = None

    def check(self) -> None:
        """See ``Source.check``."""

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""
        self._group = group
        self._started = time.monotonic()
        self._connection = RedisConnection(self._url)
        self.address = self._connection.address
        try:
            identity, offset, self._left, self._mark = self._connection.begin_dump()
        except (RedisError, OSError) as error:
            raise SourceError(
                f"Redis at {self.address} gave no dump", str(error), "Allow the account PSYNC and REPLCONF."
            ) from error
        self.coordinates = {"replication_id": identity, "offset": offset}

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        while not self._ready and not self._ended:
            self._receive()
        piece = self._ready[: len(buffer)]
        buffer[: len(piece)] = piece
        self._ready = self._ready[len(piece) :]
        return len(piece)

    def _receive(self) -> None:
        """Take what the server has sent; of a dump of unknown size what may be its mark is held back."""
        assert self._group is not None and self._connection is not None
        if self._left == 0:
            self._ended = True
            return
        held = len(self._held)
        room = self._buffer[held:] if self._left is None else self._buffer[: min(self._left, len(self._buffer))]
        try:
            count = self._connection.read_into(room, self._group.fileno(), self._group.check)
        except OSError as error:
            raise SourceError(f"The dump of {self.name} broke off", str(error), "Push again.") from error
        if count == 0:
            raise SourceError(
                f"The dump of {self.name} broke off",
                f"the server closed the connection after {self._checker.size} bytes",
                "See the server's log (client-output-buffer-limit replica, a failed fork), and push again.",
            )
        if self._left is not None:
            self._left -= count
            self._ready = self._buffer[:count]
        else:
            self._buffer[:held] = self._held
            whole = self._buffer[: held + count]
            self._ended = bytes(whole[-len(self._mark) :]) == self._mark
            kept = max(0, len(whole) - len(self._mark))
            self._ready, self._held = whole[:kept], b"" if self._ended else bytes(whole[kept:])
        self._checker.feed(self._ready)

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        marker = self._checker.check(self.name)
        self.size = self._checker.size
        self.seconds = round(time.monotonic() - self._started, 3)
        return ProducerRecord(kind="protocol", path=self.address, seconds=self.seconds, markers=(marker,))

    def abort(self) -> None:
        """See ``Source.abort``."""
        if self._connection is not None:
            self._connection.close()
