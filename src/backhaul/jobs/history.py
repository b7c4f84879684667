"""What this host remembers of its jobs: runs, their logs, who was told what.

Where the state directory takes no more writes, because its disk is full or read-only, the last records are kept in
memory (``volatile_directory``) until it does again: no job is begun twice for it, and nobody is told the same twice.

Each run has a directory, ``jobs/runs/<job>/<run>/`` in the state directory, with its log and its record; SQLite
(``jobs/history.sqlite``) holds the same records for quick answers. A database that is damaged is set aside, not
deleted, and made anew from the directories.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import hashlib
import os
import shutil
import socket
import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import msgspec

from backhaul.errors import BackhaulError, ConfigurationError, FormatError
from backhaul.formats import run_record
from backhaul.model.job import DIED, RUNNING, JobCard, RunRecord
from backhaul.model.verdict import Delivery
from backhaul.operations.atomic_file import write_atomically
from backhaul.operations.journal import STATE_VARIABLE, state_directory
from backhaul.operations.locks import locked
from backhaul.planning.alerts import Told
from backhaul.processes.identity import is_alive

_VERSION = 1
_TABLES = """
CREATE TABLE runs(
    job TEXT, id TEXT, started REAL, state TEXT, document BLOB, PRIMARY KEY(job, id)
) WITHOUT ROWID;
CREATE INDEX runs_by_start ON runs(job, started);
CREATE TABLE jobs(name TEXT PRIMARY KEY, fingerprint TEXT, since TEXT, card BLOB) WITHOUT ROWID;
CREATE TABLE marks(name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE told(job TEXT PRIMARY KEY, state TEXT, run TEXT, at TEXT) WITHOUT ROWID;
CREATE TABLE deliveries(number INTEGER PRIMARY KEY, job TEXT, at TEXT, document BLOB);
"""
_DELIVERIES_KEPT = 1000
# So long another process may hold the database.
_BUSY = 5.0
# A run says in the stores every quarter of an hour that it goes on; one that has not for so long is gone.
HEARTBEAT = 900.0
STALE = dt.timedelta(hours=1)
_RECORD = "record.json"
_LOG = "log"


def volatile_directory() -> Path:
    """Return a directory that needs no disk, and is this account's alone; it need not be there.

    /run/backhaul for root, else in ``XDG_RUNTIME_DIR``, else in /dev/shm.
    """
    if os.geteuid() == 0:
        return Path("/run/backhaul")
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "backhaul" if runtime else Path(f"/dev/shm/backhaul-{os.getuid()}")


def jobs_directory() -> Path:
    """Return where the state of jobs lies."""
    return state_directory() / "jobs"


class History:
    """See the module. One process may have it open while others do.

    Nothing that it can't write is an error of whoever runs a job: ``problems`` says it, and the job goes on.

    Args:
        directory: of the state of jobs.
        volatile: for what can't be written there; None for ``volatile_directory``.
        alive: tells whether a process of a record is still there.
        now: the clock.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        volatile: Path | None = None,
        alive: Callable[[int, str], bool] = is_alive,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self.directory = directory or jobs_directory()
        self.problems: list[str] = []
        self._alive = alive
        self._now = now
        self._path = self.directory / "history.sqlite"
        name = hashlib.sha256(str(self.directory.absolute()).encode()).hexdigest()[:16]
        self._volatile = (volatile or volatile_directory()) / f"jobs-{name}"
        self._kept_on_disk = True
        self._database = self._open()
        if self._kept_on_disk:
            self._take_in_volatile()

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
            kept = kept or self._kept_on_disk
        return kept or self._keep_volatile(f"run {record.job} {record.id}", run_record.encode(record))

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
        found = {record.id: record for (document,) in rows for record in _decoded(document)}
        for path in self._volatile.glob(f"run {job} *"):
            with contextlib.suppress(OSError, FormatError):
                record = run_record.decode(path.read_bytes(), RunRecord, where=str(path))
                found[record.id] = record
        newest = sorted(found.values(), key=lambda run: (dt.datetime.fromisoformat(run.started), run.id), reverse=True)
        return [self._settled(record) for record in newest[:limit]]

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
            if run is good or run.state == RUNNING or not run_record.is_run_id(run.id):
                continue
            with contextlib.suppress(OSError):
                shutil.rmtree(self.run_directory(job, run.id))
            with self._writing("the removal of old records"):
                self._database.execute("DELETE FROM runs WHERE job = ? AND id = ?", (job, run.id))

    def take_in(self, records: Sequence[RunRecord]) -> None:
        """Take in records that were found elsewhere: beside the backups, after this host lost its own."""
        with self._writing("records from elsewhere"):
            for record in records:
                self._insert(record, replace=False)

    # -- jobs ------------------------------------------------------------------------------------------

    def known_since(self, card: JobCard) -> str:
        """Return since when a job is known with this window (ISO, UTC): now, if it is not."""
        return self.note_job(card, write=False)

    def note_job(self, card: JobCard, *, write: bool = True) -> str:
        """Note a job as it is configured; return since when it is known with this window (ISO, UTC).

        What was before is not missing: a window that was changed today missed nothing yesterday.

        Args:
            card: the job.
            write: note it; else only say what would be noted, unless it is not known at all.
        """
        fingerprint = msgspec.json.encode((card.kind, card.window)).decode()
        since = self._now().astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        with self._reading():
            row = self._database.execute("SELECT fingerprint, since FROM jobs WHERE name = ?", (card.name,)).fetchone()
            if row is not None and row[0] == fingerprint:
                since = str(row[1])
            if row is not None and not write:
                return since
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

    def gone_jobs(self, names: Collection[str]) -> list[JobCard]:
        """Return the jobs that were known once and are not among these."""
        rows: list[tuple[bytes]] = []
        with self._reading():
            rows = self._database.execute("SELECT card FROM jobs").fetchall()
        found = []
        for (document,) in rows:
            with contextlib.suppress(msgspec.DecodeError):
                found.append(msgspec.json.decode(document, type=JobCard))
        return [card for card in found if card.name not in names]

    def forget_job(self, name: str) -> None:
        """Forget that a job is known; its records stay."""
        with self._writing(f"the job {name}"):
            self._database.execute("DELETE FROM jobs WHERE name = ?", (name,))

    def forget(self, name: str) -> int:
        """Remove all that is known of a job, its logs too; return how many runs there were."""
        runs = self.runs(name, limit=1 << 30)
        with contextlib.suppress(OSError):
            shutil.rmtree(self.directory / "runs" / name)
        with self._writing(f"the removal of {name}"):
            self._database.execute("DELETE FROM runs WHERE job = ?", (name,))
            self._database.execute("DELETE FROM jobs WHERE name = ?", (name,))
            self._database.execute("DELETE FROM told WHERE job = ?", (name,))
            self._database.execute("DELETE FROM deliveries WHERE job = ?", (name,))
        return len(runs)

    def note_mark(self, name: str, value: str) -> None:
        """Note a fact of this host: when somebody looked around last, and the like."""
        with self._writing(f"the mark {name}"):
            self._database.execute("INSERT OR REPLACE INTO marks VALUES(?, ?)", (name, value))

    def mark(self, name: str) -> str:
        """Return a fact of this host; empty for none."""
        with self._reading():
            row = self._database.execute("SELECT value FROM marks WHERE name = ?", (name,)).fetchone()
            if row is not None:
                return str(row[0])
        return ""

    # -- alerts ----------------------------------------------------------------------------------------

    def told(self, job: str) -> Told | None:
        """Return what was last delivered of a job; None for nothing."""
        with contextlib.suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode((self._volatile / f"told {job}").read_bytes(), type=Told)
        with self._reading():
            row = self._database.execute("SELECT state, run, at FROM told WHERE job = ?", (job,)).fetchone()
            if row is not None:
                return Told(*row)
        return None

    def note_told(self, job: str, told: Told) -> None:
        """Note what was delivered of a job."""
        with self._writing("what was told"):
            self._insert_told(job, told)
            if self._kept_on_disk:
                return
        self._keep_volatile(f"told {job}", msgspec.json.encode(told))

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
        if record.state != RUNNING:
            return record
        if record.host == socket.gethostname() and self._alive(record.pid, record.boot):
            return record
        if record.host != socket.gethostname() and not is_stale(record, self._now()):
            return record
        with contextlib.suppress(OSError, FormatError):
            # The database may have missed the end: it was locked, or its disk full.
            path = self.run_directory(record.job, record.id) / _RECORD
            kept = run_record.decode(path.read_bytes(), RunRecord, where=str(path))
            if kept.state != RUNNING and (kept.job, kept.id) == (record.job, record.id):
                return kept
        return died(record)

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

    def _insert_told(self, job: str, told: Told) -> None:
        self._database.execute("INSERT OR REPLACE INTO told VALUES(?, ?, ?, ?)", (job, told.state, told.run, told.at))

    def _keep_volatile(self, name: str, data: bytes) -> bool:
        try:
            self._volatile.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = self._volatile.stat()
            if status.st_uid != os.geteuid():
                raise PermissionError(f"{self._volatile} is somebody else's")
            write_atomically(self._volatile / name, data)
        except OSError as error:
            self._problem(f"nor in {self._volatile}: {error.strerror or error}")
            return False
        return True

    def _take_in_volatile(self) -> None:
        """Bring home what could not be written there, if it can be now."""
        for path in sorted(self._volatile.glob("*")) if self._volatile.is_dir() else ():
            kind, _, rest = path.name.partition(" ")
            try:
                if kind == "run":
                    record = run_record.decode(path.read_bytes(), RunRecord, where=str(path))
                    if not self._alive(record.pid, record.boot) or record.state != RUNNING:
                        self._insert(record)
                        path.unlink()
                elif kind == "told":
                    self._insert_told(rest, msgspec.json.decode(path.read_bytes(), type=Told))
                    path.unlink()
            except (OSError, FormatError, msgspec.DecodeError, sqlite3.Error):
                continue

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
        except _NewerError as error:
            self._problem(f"{self._path} is of a newer Backhaul ({error}): it is not used; install that one")
        except sqlite3.DatabaseError as error:
            return self._made_anew(error)
        return self._without_writing()

    def _connected(self, path: Path | str) -> sqlite3.Connection:
        connection = sqlite3.connect(path, isolation_level=None, timeout=_BUSY, check_same_thread=False)
        try:
            (version,) = connection.execute("PRAGMA user_version").fetchone()
            if version == 0:
                self._make_tables(connection)
            elif version > _VERSION:
                raise _NewerError(f"version {version}, and {_VERSION} is known")
            connection.execute("SELECT COUNT(*) FROM runs").fetchone()
            (health,) = connection.execute("PRAGMA quick_check(1)").fetchone()
            if health != "ok":
                raise sqlite3.DatabaseError(health)
        except BaseException:
            connection.close()
            raise
        return connection

    def _make_tables(self, connection: sqlite3.Connection) -> None:
        """Make the tables, and fill them from the directories; on the first night several timers do at once."""
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            if connection.execute("PRAGMA user_version").fetchone() == (0,):
                for statement in _TABLES.split(";"):
                    connection.execute(statement)
                self._fill(connection)
                connection.execute(f"PRAGMA user_version = {_VERSION}")
            connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    def _without_writing(self) -> sqlite3.Connection:
        self._kept_on_disk = False
        with contextlib.suppress(sqlite3.Error):
            connection = sqlite3.connect(
                f"{self._path.absolute().as_uri()}?mode=ro", uri=True, isolation_level=None, check_same_thread=False
            )
            try:
                if connection.execute("PRAGMA user_version").fetchone() == (_VERSION,):
                    connection.execute("SELECT COUNT(*) FROM runs").fetchone()
                    return connection
            except BaseException:
                connection.close()
                raise
            connection.close()
        return self._connected(":memory:")

    def _made_anew(self, error: sqlite3.Error) -> sqlite3.Connection:
        aside = self._path.with_name(f"{self._path.name}.damaged-{self._now():%Y%m%dT%H%M%SZ}")
        try:
            with locked(str(self._path.with_name("history.lock")), what="The repair of the history"):
                for suffix in ("-wal", "-shm"):
                    with contextlib.suppress(FileNotFoundError):
                        os.rename(f"{self._path}{suffix}", f"{aside}{suffix}")
                os.rename(self._path, aside)
                connection = self._connected(self._path)
        except (OSError, sqlite3.Error, BackhaulError) as again:
            self._problem(f"{self._path} is damaged ({error}), and can't be set aside: {again}")
            return self._without_writing()
        self._problem(f"{self._path} was damaged ({error}): it is {aside.name} now, and was made anew from the logs")
        return connection

    def _fill(self, connection: sqlite3.Connection) -> None:
        """Read the records of all runs from their directories."""
        self._database = connection
        for path in sorted((self.directory / "runs").glob(f"*/*/{_RECORD}")):
            with contextlib.suppress(OSError, FormatError, sqlite3.Error):
                record = run_record.decode(path.read_bytes(), RunRecord, where=str(path))
                if (record.job, record.id) == (path.parent.parent.name, path.parent.name):
                    self._insert(record)


class _NewerError(sqlite3.DatabaseError):
    """The database was made by a version that this one does not know."""


def is_stale(record: RunRecord, now: dt.datetime) -> bool:
    """Tell whether a run that nobody here can look at has not said for long that it goes on."""
    return now - dt.datetime.fromisoformat(record.seen or record.started) > STALE


def died(record: RunRecord) -> RunRecord:
    """Return the record of a run that has no end, and will have none."""
    why = "its process is gone: it was killed, or its host went down"
    return msgspec.structs.replace(record, state=DIED, why=why)


# What is in the database was looked at before it was put there: reports read hundreds of them.
_records = msgspec.json.Decoder(RunRecord)


def _decoded(document: bytes) -> Iterator[RunRecord]:
    with contextlib.suppress(msgspec.DecodeError, ValueError):
        record = _records.decode(document)
        dt.datetime.fromisoformat(record.started)  # what they are put in order by
        yield record


def undelivered(deliveries: Sequence[Delivery]) -> tuple[Delivery, ...]:
    """Return the last alert of each job that no channel took.

    Args:
        deliveries: newest first.
    """
    newest: dict[str, list[Delivery]] = {}
    for each in deliveries:
        batch = newest.setdefault(each.job, [])
        if not batch or (batch[0].subject, batch[0].at) == (each.subject, each.at):
            batch.append(each)
    return tuple(batch[-1] for batch in newest.values() if all(each.error for each in batch))
