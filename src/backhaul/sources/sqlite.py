"""SQLite as a source: a copy by its online backup API, while others write, then the copy's bytes.

The API needs a database to copy to, so this is the one source that stages: a file without a name, of the database's
size, in ``?stage=DIR`` or the system's directory for temporary files. The copy is of one state: a read transaction is
held while it is made (in WAL mode nobody waits for it; else writers wait until it is done).
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import sqlite3
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import quote

from backhaul.databases.prerequisites import Prerequisites
from backhaul.databases.temporary import OwnDirectory
from backhaul.errors import SourceError
from backhaul.model.manifest import WHOLE, DatabaseRecord, ProducerRecord, SourceRecord, StreamPart, TableRecord
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.base import NamedStream, utc

_PAGES_AT_ONCE = 4096
_BUSY_PATIENCE = 60.0
HEADER = b"SQLite format 3\0"


class SQLiteSource:
    """See the module, and ``SourceSet``."""

    parallel = 1

    def __init__(
        self,
        url: SourceUrl,
        *,
        count: bool = True,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self.total_tables = 0
        self._path = url.path
        self._copy = _Copy(url, url.options.get("stage") or tempfile.gettempdir(), now, count=count)

    def check(self) -> None:
        """See ``SourceSet.check``."""
        missing = Prerequisites(f"A backup of {self.name}")
        check_file(self._path, self._copy.stage, missing)
        missing.require()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``. The copy is made as the stream starts."""
        return (NamedStream(name="database", source=self._copy, part=StreamPart(section=WHOLE)),)

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        return SourceRecord(
            kind="sqlite", server=sqlite3.sqlite_version, address=self._path, state_of=self._copy.state_of
        )

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        copy = self._copy
        return SourceRecord(
            kind="sqlite",
            server=sqlite3.sqlite_version,
            address=self._path,
            state_of=copy.state_of,
            size=copy.size,
            seconds=copy.seconds,
            databases=(DatabaseRecord(name=Path(self._path).name, size=copy.size, tables=tuple(copy.tables)),),
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
        self._copy.abort()


def check_file(path: str, stage: str, missing: Prerequisites) -> None:
    """Note what keeps a database file from being copied."""
    try:
        with open(path, "rb") as file:
            header = file.read(len(HEADER))
        size = os.stat(path).st_size + _size_of(path + "-wal")
    except OSError as error:
        missing.add("to read the file", error.strerror or str(error), "Check the path and its permissions.")
        return
    if header not in (HEADER, b""):
        missing.add("a SQLite database", f"{path} does not begin like one", "Correct the path.")
    try:
        free = shutil.disk_usage(stage).free
    except OSError as error:
        missing.add(f"the directory {stage}", error.strerror or str(error), "Name one: ?stage=DIR")
        return
    if free < size:
        missing.add(
            f"room for a copy in {stage}",
            f"{size} bytes are needed there, and {free} are free",
            "Name a directory with room: ?stage=DIR",
        )


class _Copy:
    """The copy's bytes. See ``Source``."""

    def __init__(self, url: SourceUrl, stage: str, now: Callable[[], dt.datetime], *, count: bool) -> None:
        self.name = url.text
        self.stage = stage
        self.size = 0
        self.seconds = 0.0
        self.state_of = ""
        self.tables: list[TableRecord] = []
        self._path = url.path
        self._now = now
        self._count = count
        self._started = 0.0
        self._descriptor = -1
        self._position = 0
        self._group: Supervisor | None = None

    def check(self) -> None:
        """See ``Source.check``."""

    def start(self, group: Supervisor) -> None:
        """Make the copy. See ``Source.start``."""
        self._group = group
        self._started = time.monotonic()
        self.state_of = utc(self._now())
        try:
            directory = OwnDirectory("backhaul-sqlite-", self.stage)
        except OSError as error:
            raise SourceError(f"Could not copy {self.name}", f"{self.stage}: {error}", "Name a ?stage=DIR.") from error
        copy = str(directory.path / "copy")
        try:
            self._copy_to(copy, group)
            self._descriptor = os.open(copy, os.O_RDONLY | os.O_CLOEXEC)
            self.size = os.fstat(self._descriptor).st_size
        except (sqlite3.Error, OSError) as error:
            raise SourceError(
                f"Could not copy {self.name}", str(error), "See who holds it locked, and whether the disk is full."
            ) from error
        finally:
            # From here on the copy is an open file without a name: whatever happens, nothing of it stays.
            directory.remove()

    def _copy_to(self, copy: str, group: Supervisor) -> None:
        uri = f"file:{quote(self._path)}?mode=ro"
        with (
            contextlib.closing(sqlite3.connect(uri, uri=True, timeout=_BUSY_PATIENCE, isolation_level=None)) as source,
            contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as target,
        ):
            target.execute("pragma journal_mode = off")
            target.execute("pragma synchronous = off")
            # The copy is of this transaction's state, however long it takes, whoever writes.
            source.execute("begin")
            source.execute("select count(*) from sqlite_master").fetchone()
            source.backup(target, pages=_PAGES_AT_ONCE, progress=lambda *_: group.check(), sleep=0.01)
            source.execute("commit")
            self.tables = list(self._described(target, group))

    def _described(self, copy: sqlite3.Connection, group: Supervisor) -> list[TableRecord]:
        found = []
        for name in table_names(copy):
            group.check()
            rows = None
            if self._count:
                with contextlib.suppress(sqlite3.OperationalError):  # a virtual table whose module is not here
                    rows = count_rows(copy, name)
            found.append(TableRecord(name=name, rows=rows))
        return found

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        assert self._group is not None
        self._group.check()
        count = os.preadv(self._descriptor, [buffer], self._position)
        self._position += count
        return count

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        if self._position != self.size:
            raise SourceError(
                f"The copy of {self.name} changed", f"{self._position} of {self.size} bytes", "Push again."
            )
        self.seconds = round(time.monotonic() - self._started, 3)
        return ProducerRecord(kind="protocol", path=self._path, seconds=self.seconds)

    def abort(self) -> None:
        """See ``Source.abort``."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def table_names(connection: sqlite3.Connection) -> list[str]:
    """Return the tables of a database."""
    query = "select name from sqlite_master where type = 'table' order by name"
    return [name for (name,) in connection.execute(query).fetchall()]


def count_rows(connection: sqlite3.Connection, table: str) -> int:
    """Count the rows of a table."""
    name = '"' + table.replace('"', '""') + '"'
    return int(connection.execute(f"select count(*) from {name}").fetchone()[0])  # noqa: S608 - quoted


def _size_of(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
