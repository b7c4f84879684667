"""A directory as a source: GNU tar's archive of it, in an order that does not change, with holes and xattrs."""

from __future__ import annotations

import datetime as dt
import os
import re
import time
from collections.abc import Callable, Sequence
from typing import ClassVar

from backhaul.databases.prerequisites import Prerequisites, Program
from backhaul.model.manifest import WHOLE, DatabaseRecord, SourceRecord, StreamPart, TableRecord
from backhaul.model.source_url import SourceUrl
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.base import NamedStream, utc
from backhaul.sources.command import CommandSource

# GNU tar's status for "some files differ": they changed while they were read.
_CHANGED = 1
_MOST_ENTRIES = 1000
_TOTALS = re.compile(rb"Total bytes written: (\d+)")
_NAME = re.compile(rb"^\./([^/]*)(/?)")


class DirectorySource:
    """See the module, and ``SourceSet``.

    Args:
        url: which directory; ``?changing=accept`` takes files that change while they are read.
        on_error_line: told each line of tar's that is news.
        on_file: told each name.
        now: the clock.
    """

    parallel = 1
    _LOCALE: ClassVar = {"LC_ALL": "C"}

    def __init__(
        self,
        url: SourceUrl,
        *,
        on_error_line: Callable[[bytes], None] | None = None,
        on_file: Callable[[str], None] = lambda name: None,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.name = url.text
        self.total_tables = 0
        self._path = url.path
        self._changing = url.options.get("changing", "refuse")
        self._on_error_line = on_error_line
        self._on_file = on_file
        self._now = now
        self._tar: Program | None = None
        self._entries: dict[str, int] = {}
        self._files = 0
        self._size = 0
        self._state_of = ""
        self._started = 0.0

    def check(self) -> None:
        """See ``SourceSet.check``."""
        missing = Prerequisites(f"A backup of {self.name}")
        self._tar = missing.program("tar")
        try:
            os.listdir(self._path)
        except OSError as error:
            missing.add("to read the directory", error.strerror or str(error), "Check the path and its permissions.")
        if self._changing not in ("refuse", "accept"):
            missing.add("changing=refuse or =accept", f"the URL says {self._changing!r}", "Correct the URL.")
        missing.require()

    def open(self, group: Supervisor) -> Sequence[NamedStream]:
        """See ``SourceSet.open``."""
        assert self._tar is not None
        self._started = time.monotonic()
        self._state_of = utc(self._now())
        command = [
            self._tar.path,
            "--create",
            "--file=-",
            f"--directory={self._path}",
            "--format=posix",
            # Nothing of the moment or of the order on the disk: the same files give the same bytes.
            "--sort=name",
            "--pax-option=exthdr.name=%d/PaxHeaders/%f,delete=atime,delete=ctime",
            "--numeric-owner",
            # (Later versions of the format have the number of tar's process in them.)
            "--sparse",
            "--sparse-version=0.0",
            "--acls",
            "--xattrs",
            "--xattrs-include=*",
            "--verbose",
            "--totals",
            ".",
        ]
        source = CommandSource(
            command,
            self._on_error_line,
            name=f"tar of {self._path}",
            is_chatter=self._listen,
            environment={**os.environ, **self._LOCALE},
            accepted=(0, _CHANGED) if self._changing == "accept" else (0,),
        )
        return (NamedStream(name="files", source=source, part=StreamPart(section=WHOLE)),)

    def _listen(self, line: bytes) -> bool:
        totals = _TOTALS.match(line)
        if totals is not None:
            self._size = int(totals[1])
            return True
        match = _NAME.match(line)
        if match is None:
            return False
        self._files += 1
        name = match[1].decode(errors="backslashreplace")
        if name in self._entries or len(self._entries) < _MOST_ENTRIES:
            self._entries[name] = self._entries.get(name, 0) + 1
        self._on_file(line.decode(errors="backslashreplace"))
        return True

    def outline(self) -> SourceRecord | None:
        """See ``SourceSet.outline``."""
        assert self._tar is not None
        return SourceRecord(
            kind="dir",
            server="",
            address=self._path,
            state_of=self._state_of,
            tools={"tar": self._tar.version},
        )

    def finish(self) -> SourceRecord:
        """See ``SourceSet.finish``."""
        assert self._tar is not None
        entries = tuple(
            TableRecord(name=name or ".", rows=count, kind="file") for name, count in sorted(self._entries.items())
        )
        return SourceRecord(
            kind="dir",
            server="",
            address=self._path,
            state_of=self._state_of,
            tools={"tar": self._tar.version},
            size=self._size,
            seconds=round(time.monotonic() - self._started, 3),
            coordinates={"names": str(self._files)},
            databases=(DatabaseRecord(name=self._path, size=self._size, tables=entries),),
        )

    def abort(self) -> None:
        """See ``SourceSet.abort``."""
