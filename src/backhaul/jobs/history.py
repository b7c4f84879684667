"""What this host remembers of its jobs: runs, their logs, who was told what.

Each run has a directory, ``jobs/runs/<job>/<run>/`` in the state directory, with its log and its record; SQLite
(``jobs/history.sqlite``) holds the same records for quick answers. A database that is damaged is set aside, not
deleted, and made anew from the directories.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from backhaul.errors import ConfigurationError, FormatError
from backhaul.formats import run_record
from backhaul.model.job import DIED, RUNNING, JobCard, RunRecord
from backhaul.model.verdict import Delivery
from backhaul.operations.atomic_file import write_atomically
from backhaul.operations.journal import STATE_VARIABLE, state_directory
from backhaul.planning.alerts import Told
from backhaul.processes.identity import is_alive

_VERSION = 1
_TABLES = """
CREATE TABLE runs(
    job TEXT, id TEXT, started REAL, state TEXT, document BLOB, PRIMARY KEY(job, id)
) WITHOUT ROWID;
CREATE INDEX runs_by_start ON runs(job, started);
CREATE TABLE jobs(name TEXT PRIMARY KEY, fingerprint TEXT, since TEXT, card BLOB) WITHOUT ROWID;
CREATE TABLE told(job TEXT PRIMARY KEY, state TEXT, run TEXT, at TEXT) WITHOUT ROWID;
CREATE TABLE deliveries(number INTEGER PRIMARY KEY, job TEXT, at TEXT, document BLOB);
"""
_DELIVERIES_KEPT = 1000
_RECORD = "record.json"
_LOG = "log"


def jobs_directory() -> Path:
    """Return where the state of jobs lies."""
    return state_directory() / "jobs"


class History:
    """See the module. One process may have it open while others do.

    Nothing that it can't write is an error of whoever runs a job: ``problems`` says it, and the job goes on.

    Args:
        directory: of the state of jobs.
        alive: tells whether a process of a record is still there.
        now: the clock.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        alive: Callable[[int, str], bool] = is_alive,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.directory = directory or jobs_directory()
        self.problems: list[str] = []
        self._alive = alive
        self._now = now
        self._path = self.directory / "history.sqlite"
        self._database = self._open()

    def close(self) -> None:
        """Let go of the database."""
        self._database.close()

    # -- runs ------------------------------------------------------------------------------------------

    def run_directory(self, job: str, run: str) -> Path:
        """Return where a run's log and record lie."""
        return self.directory / "runs" / job / run

    def log_path(self, job: str, run: str) -> Path:
        """Return where a run's log lies."""
        return self.run_directory(job, run) / _LOG

    def save(self, record: RunRecord) -> bool:
        """Keep a record: once when the run begins, and again when it ends; tell whether it is kept at all."""
        kept = False
        directory = self.run_directory(record.job, record.id)
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_atomically(directory / _RECORD, run_record.encode(record))
            kept = True
        except OSError as error:
            self._problem(f"the record of {record.job} can't be kept in {directory}: {error.strerror or error}")
        with self._writing(f"the record of {record.job}"):
            self._insert(record)
            return True
        return kept

    def note_progress(self, record: RunRecord) -> None:
        """Keep how far a run is, where that costs little: in the database alone."""
        with contextlib.suppress(sqlite3.Error):
            self._insert(record)

    def runs(self, job: str, limit: int = 400) -> list[RunRecord]:
        """Return the records of a job, newest first. A run whose process is gone is ``died``."""
        rows: list[tuple[bytes]] = []
        with self._reading():
            query = "SELECT document FROM runs WHERE job = ? ORDER BY started DESC, id DESC LIMIT ?"
            rows = self._database.execute(query, (job, limit)).fetchall()
        return [self._settled(record) for (document,) in rows for record in _decoded(document)]

    def find(self, job: str, run: str = "") -> RunRecord | None:
        """Return one record: the newest whose id begins so; None for none."""
        return next((record for record in self.runs(job) if record.id.startswith(run)), None)

    def names(self) -> list[str]:
        """Return the names of all jobs that have records."""
        rows: list[tuple[str]] = []
        with self._reading():
            rows = self._database.execute("SELECT DISTINCT job FROM runs ORDER BY job").fetchall()
        return [name for (name,) in rows]

    def forget_old(self, job: str, keep: int) -> None:
        """Remove the logs and records of all but the newest runs; of the one that ended well last never."""
        runs = self.runs(job, limit=1 << 30)
        good = next((run for run in runs if run.state == "ok"), None)
        for run in runs[keep:]:
            if run is good or run.state == RUNNING:
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(self.run_directory(job, run.id))
            with self._writing("the removal of old records"):
                self._database.execute("DELETE FROM runs WHERE job = ? AND id = ?", (job, run.id))

    def take_in(self, records: Sequence[RunRecord]) -> None:
        """Take in records that were found elsewhere: beside the backups, after this host lost its own."""
        with self._writing("records from the store"):
            for record in records:
                self._insert(record, replace=False)

    # -- jobs ------------------------------------------------------------------------------------------

    def seen(self, card: JobCard) -> str:
        """Note a job as it is configured; return since when it is known with this window (ISO, UTC).

        What was before is not missing: a window that was changed today missed nothing yesterday.
        """
        fingerprint = msgspec.json.encode((card.kind, card.window)).decode()
        since = self._now().astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._reading():
            row = self._database.execute("SELECT fingerprint, since FROM jobs WHERE name = ?", (card.name,)).fetchone()
            if row is not None and row[0] == fingerprint:
                since = str(row[1])
        document = msgspec.json.encode(msgspec.structs.replace(card, known_since=since))
        with self._writing(f"the job {card.name}"):
            self._database.execute(
                "INSERT INTO jobs VALUES(?, ?, ?, ?) ON CONFLICT(name) DO UPDATE SET fingerprint = ?2, since = ?3, "
                "card = ?4 WHERE card IS NOT ?4",
                (card.name, fingerprint, since, document),
            )
        return since

    def card(self, name: str) -> JobCard | None:
        """Return a job as it was last seen; None for one that never was."""
        with self._reading():
            row = self._database.execute("SELECT card FROM jobs WHERE name = ?", (name,)).fetchone()
            if row is not None:
                with contextlib.suppress(msgspec.DecodeError):
                    return msgspec.json.decode(row[0], type=JobCard)
        return None

    # -- alerts ----------------------------------------------------------------------------------------

    def told(self, job: str) -> Told | None:
        """Return what was last delivered of a job; None for nothing."""
        with self._reading():
            row = self._database.execute("SELECT state, run, at FROM told WHERE job = ?", (job,)).fetchone()
            if row is not None:
                return Told(*row)
        return None

    def note_told(self, job: str, told: Told) -> None:
        """Note what was delivered of a job."""
        with self._writing("what was told"):
            self._database.execute(
                "INSERT OR REPLACE INTO told VALUES(?, ?, ?, ?)", (job, told.state, told.run, told.at)
            )

    def note_delivery(self, delivery: Delivery) -> None:
        """Note what became of a message."""
        with self._writing("a delivery"):
            self._database.execute(
                "INSERT INTO deliveries(job, at, document) VALUES(?, ?, ?)",
                (delivery.job, delivery.at, msgspec.json.encode(delivery)),
            )
            self._database.execute(
                "DELETE FROM deliveries WHERE number <= (SELECT MAX(number) FROM deliveries) - ?", (_DELIVERIES_KEPT,)
            )

    def deliveries(self, limit: int = 50) -> list[Delivery]:
        """Return what became of the last messages, newest first."""
        rows: list[tuple[bytes]] = []
        with self._reading():
            query = "SELECT document FROM deliveries ORDER BY number DESC LIMIT ?"
            rows = self._database.execute(query, (limit,)).fetchall()
        found = []
        for (document,) in rows:
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(document, type=Delivery))
        return found

    # -- inside ----------------------------------------------------------------------------------------

    def _settled(self, record: RunRecord) -> RunRecord:
        if record.state != RUNNING or record.host != socket.gethostname() or self._alive(record.pid, record.boot):
            return record
        return msgspec.structs.replace(
            record, state=DIED, why="its process is gone: it was killed, or this host went down"
        )

    def _insert(self, record: RunRecord, *, replace: bool = True) -> None:
        verb = "REPLACE" if replace else "IGNORE"
        started = dt.datetime.fromisoformat(record.started).timestamp()
        self._database.execute(
            f"INSERT OR {verb} INTO runs VALUES(?, ?, ?, ?, ?)",
            (record.job, record.id, started, record.state, msgspec.json.encode(record)),
        )

    def _problem(self, text: str) -> None:
        if text not in self.problems:
            self.problems.append(text)

    @contextlib.contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._problem(f"{what} can't be kept in {self._path}: {error}")

    @contextlib.contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            self._problem(f"{self._path} can't be read: {error}")

    def _open(self) -> sqlite3.Connection:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigurationError(
                f"The state of jobs can't be kept in {self.directory}",
                error.strerror or str(error),
                f"Make it writable for this account, or name another directory with {STATE_VARIABLE}.",
            ) from error
        try:
            return self._connected(self._path)
        except sqlite3.OperationalError as error:
            # The disk's fault, not the file's: what is there may be read all the same.
            self._problem(f"{self._path} can't be written: {error}")
            return self._without_writing()
        except sqlite3.DatabaseError as error:
            return self._made_anew(error)

    def _connected(self, path: Path | str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, timeout=30.0, check_same_thread=False)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                connection.execute("PRAGMA journal_mode = WAL")
                connection.executescript(f"BEGIN IMMEDIATE; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
            elif version != _VERSION:
                raise sqlite3.DatabaseError(f"it is of version {version}, and {_VERSION} is known")
            connection.execute("SELECT COUNT(*) FROM runs").fetchone()
            (health,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise sqlite3.DatabaseError(health)
        except BaseException:
            connection.close()
            raise
        return connection

    def _without_writing(self) -> sqlite3.Connection:
        with contextlib.suppress(sqlite3.Error):
            connection = sqlite3.connect(
                f"{self._path.as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            connection.execute("SELECT COUNT(*) FROM runs").fetchone()
            return connection
        connection = self._connected(":memory:")
        self._fill(connection)
        return connection

    def _made_anew(self, error: sqlite3.Error) -> sqlite3.Connection:
        aside = self._path.with_name(f"{self._path.name}.damaged-{self._now():%Y%m%dT%H%M%SZ}")
        try:
            for suffix in ("-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    os.rename(f"{self._path}{suffix}", f"{aside}{suffix}")
            os.rename(self._path, aside)
            connection = self._connected(self._path)
        except (OSError, sqlite3.Error) as again:
            self._problem(f"{self._path} is damaged ({error}), and can't be set aside: {again}")
            connection = self._connected(":memory:")
        else:
            self._problem(
                f"{self._path} was damaged ({error}): it is {aside.name} now, and was made anew from the logs"
            )
        self._fill(connection)
        return connection

    def _fill(self, connection: sqlite3.Connection) -> None:
        """Read the records of all runs from their directories."""
        self._database = connection
        for path in sorted((self.directory / "runs").glob(f"*/*/{_RECORD}")):
            with contextlib.suppress(OSError, FormatError, sqlite3.Error):
                self._insert(run_record.decode(path.read_bytes(), RunRecord, where=str(path)))


def _decoded(document: bytes) -> Iterator[RunRecord]:
    with contextlib.suppress(FormatError):
        yield run_record.decode(document, RunRecord, where="the history")
