"""A SQLite database as a target: a file that gets its name when every byte was right."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from backhaul.databases.prerequisites import Prerequisites
from backhaul.model.manifest import SourceRecord, StreamRecord
from backhaul.targets.file import FileTarget
from backhaul.targets.sections import Phase, Step


class SQLiteRestore:
    """See the module, and ``RestoreTarget``."""

    def __init__(self, path: str, *, replace: bool = False) -> None:
        self.name = path
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self._owner: tuple[int, int] | None = None
        self._path = path
        self._replace = replace
        self._stream = ""

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord]) -> None:
        """See ``RestoreTarget.check``."""
        self._stream = streams[0].name
        missing = Prerequisites(f"A restore into {self.name}")
        if os.path.lexists(self._path) and not self._replace and _size(self._path) != 0:
            missing.add(
                f"{self._path} to be absent or empty",
                "it is there, and not empty",
                "Name another file in --into, or say --replace.",
            )
        if Path(self._path).is_dir():
            missing.add(f"{self._path} to be a file", "it is a directory", "Name a file in --into.")
        elif Path(self._path).is_file():
            status = os.stat(self._path)
            self._owner = (status.st_uid, status.st_gid)
            why = _in_use(self._path)
            if why:
                missing.add(f"{self._path} to be in nobody's use", why, "Stop what uses it, or name another file.")
        for suffix in ("-wal", "-journal", "-shm"):
            if os.path.lexists(self._path + suffix):
                missing.add(
                    f"{self._path}{suffix} to be gone",
                    "it belongs to the database that is there: SQLite would apply it to the restored one",
                    f"Stop what uses it, then: sqlite3 {self._path} .tables (to open and close it); or name another.",
                )
        missing.require()

    def phases(self, jobs: int) -> Sequence[Phase]:
        """See ``RestoreTarget.phases``."""
        return (Phase("file", (Step(self._stream, lambda: FileTarget(self._path)),)),)

    def commit(self) -> None:
        """See ``RestoreTarget.commit``. The file had its name as soon as all of it was right."""
        if self._owner is not None and os.geteuid() == 0:
            os.chown(self._path, *self._owner)

    def abort(self) -> None:
        """See ``RestoreTarget.abort``."""


def _in_use(path: str) -> str:
    """Say why a database can't be locked for us alone, or nothing."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{quote(path)}?mode=rw", uri=True, timeout=0)) as connection:
            connection.execute("begin exclusive")
            connection.rollback()
    except sqlite3.OperationalError as error:
        return str(error)
    except sqlite3.DatabaseError:
        return ""  # it is none
    return ""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
