"""A SQLite database as a target: a file that gets its name when every byte was right."""

from __future__ import annotations

import os
from collections.abc import Sequence

from backhaul.databases.prerequisites import Prerequisites
from backhaul.model.manifest import SourceRecord, StreamRecord
from backhaul.targets.file import FileTarget
from backhaul.targets.sections import Phase, Step


class SQLiteRestore:
    """See the module, and ``RestoreTarget``."""

    def __init__(self, path: str, *, replace: bool = False) -> None:
        self.name = path
        self.remarks: list[str] = []
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
        for suffix in ("-wal", "-journal", "-shm"):
            if os.path.lexists(self._path + suffix):
                missing.add(
                    f"{self._path}{suffix} to be gone",
                    "it belongs to the database that is there: SQLite would apply it to the restored one",
                    f"Stop what uses it; sqlite3 {self._path} 'pragma wal_checkpoint(truncate)'; or name another file.",
                )
        missing.require()

    def phases(self, jobs: int) -> Sequence[Phase]:
        """See ``RestoreTarget.phases``."""
        return (Phase("file", (Step(self._stream, lambda: FileTarget(self._path)),)),)

    def commit(self) -> None:
        """See ``RestoreTarget.commit``. The file had its name as soon as all of it was right."""

    def abort(self) -> None:
        """See ``RestoreTarget.abort``."""


def _size(path: str) -> int:
    try:
        return os.stat(path).st_size
    except OSError:
        return 0
