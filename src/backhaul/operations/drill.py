"""drill: prove that a backup restores, in a server of its own that nobody can reach and that is gone afterwards.

Three ends, and they are not the same: *proved*; *failed*, which speaks of the backup; *could not test*, which speaks of
this host (no server of that version, an extension that is not installed, no room) or of the line to the store. What was
found is kept as a record beside the backup.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from backhaul import version
from backhaul.databases import proofs
from backhaul.databases.prerequisites import Prerequisites
from backhaul.databases.proofs import Question
from backhaul.databases.scratch import (
    ScratchDirectory,
    ScratchMariaDB,
    ScratchPostgreSQL,
    ScratchRedis,
)
from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    StoreError,
    UsageError,
)
from backhaul.formats import drill as drill_format
from backhaul.formats.age_keys import Identity
from backhaul.formats.quantities import format_size
from backhaul.model.drill import FAILED, PROVED, UNTESTED, DrillCheck, DrillRecord
from backhaul.model.manifest import Manifest, SourceRecord
from backhaul.model.results import DrillResult
from backhaul.model.source_url import SourceUrl
from backhaul.operations import memory, series
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.restore import RestoreOptions, RestoreRun, source_of_backup, target_of
from backhaul.operations.series import CommittedBackup
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.targets.sections import RestoreTarget
from backhaul.transforms.digest import crc64nvme

# What a restore needs above what was at the source: WAL, indexes that grow while they are made.
_MARGIN = 1.2
_LITTLE_ROOM = 64 << 20
# An extension that only works in a server that was started with its library.
_NOT_LOADED = re.compile(r"shared_preload_libraries")
_DISK_FULL = re.compile(
    r"no space left on device|disk full|errno: 28|error 28|could not extend file|free disk space", re.IGNORECASE
)


class DrillOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to drill.

    Attributes:
        questions: statements with the value that each must answer.
        database: which database is asked, where there are several.
        scratch: where the scratch server lies; None for the system's directory for temporary files.
        jobs: streams, indexes and checks at once; None for one a core.
        patience: seconds for which a store that is ill or away is tried again.
        identities: whose secrets open an encrypted backup.
        record: whether the finding is kept beside the backup.
    """

    questions: tuple[Question, ...] = ()
    database: str | None = None
    scratch: str | None = None
    jobs: int | None = None
    patience: float = DEFAULT_PATIENCE
    identities: tuple[Identity, ...] = ()
    record: bool = True


def drill(
    reference: str,
    options: DrillOptions = DrillOptions(),  # noqa: B008 - frozen
    *,
    progress: PullProgress | None = None,
    on_check: Callable[[DrillCheck], None] = lambda check: None,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
) -> DrillResult:
    """Restore a backup into a scratch server, start it, and check it.

    Args:
        reference: ``SERIES[@WHEN]``.
        options: how to drill.
        progress: counters to keep up to date.
        on_check: told each check as it is made.
        now: the clock.

    Returns:
        The finding, whatever it is.

    Raises:
        UsageError: it is not known what the backup is of.
        BackupNotFoundError: no such backup.
        IntegrityError: its manifest can't be read.
        StoreError: the store could not be asked which backup it is, or did not take the record.
    """
    memory.settle_allocator()
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(options.patience))
    with contextlib.closing(store):
        backup = series.find_backup(store, when)
        committed = series.read_backup(store, backup)
        source = source_of_backup(committed, location.text)
        _check_questions(options, source)
        started = now()
        trial = _Trial(store, committed, source, options, progress or PullProgress(), on_check)
        result, why = trial.run()
        record = DrillRecord(
            format=drill_format.FORMAT,
            version=drill_format.VERSION,
            id=backup,
            started=_iso(started),
            finished=_iso(now()),
            host=socket.gethostname(),
            tool=f"backhaul {version.VERSION}",
            result=result,
            why=why,
            server=trial.server,
            seconds=trial.seconds,
            raw_size=committed.manifest.raw_size,
            checks=tuple(trial.checks),
        )
        key = None
        if options.record:
            key = drill_format.drill_key(backup, started)
            body = drill_format.encode(record)
            store.put(key, body, crc64nvme(body), if_absent=False)
        return DrillResult(series=location.text, record=record, kept=f"{store.url}/{key}" if key else None)


def _check_questions(options: DrillOptions, source: SourceRecord) -> None:
    """Refuse what can't be asked, before anything is restored.

    Raises:
        UsageError: there is nobody to ask, or it is not said whom.
    """
    if not options.questions:
        return
    if source.kind == "dir":
        raise UsageError("--check asks a database", "the backup is of a directory", "Leave --check out.")
    names = [record.name for record in source.databases]
    asked = source.kind.partition("+")[0] in ("postgresql", "mariadb")
    if asked and (options.database or (names[0] if len(names) == 1 else None)) not in names:
        raise UsageError(
            f"--database {options.database!r} is not in the backup"
            if options.database
            else "--check does not say which database to ask",
            f"the backup has {', '.join(names)}",
            "Name one of these with --database NAME.",
        )


class _Trial:
    def __init__(
        self,
        store: Store,
        committed: CommittedBackup,
        source: SourceRecord,
        options: DrillOptions,
        progress: PullProgress,
        on_check: Callable[[DrillCheck], None],
    ) -> None:
        self.server = ""
        self.seconds: dict[str, float] = {}
        self.checks: list[DrillCheck] = []
        self._store = store
        self._committed = committed
        self._source = source
        self._options = options
        self._progress = progress
        self._on_check = on_check
        self._jobs = options.jobs or memory.default_workers()

    @property
    def _manifest(self) -> Manifest:
        return self._committed.manifest

    def run(self) -> tuple[str, str]:
        """Try it; return the result, and why it is not a better one."""
        accounts = {"postgresql": ("postgres",), "mariadb": ("mysql", "mariadb"), "redis": ("redis",)}
        kind = self._source.kind.partition("+")[0]
        try:
            directory = ScratchDirectory(self._options.scratch, accounts.get(kind, ()))
        except ConfigurationError as error:
            return UNTESTED, _sentence(error)
        try:
            return self._run_in(directory)
        finally:
            directory.remove()

    def _run_in(self, directory: ScratchDirectory) -> tuple[str, str]:
        try:
            self._check_room(directory)
            with self._tried(directory) as checks:
                began = time.monotonic()
                for check in checks:
                    self.checks.append(check)
                    self._on_check(check)
                self.seconds["checks"] = round(time.monotonic() - began, 3)
        except BackhaulError as error:
            return self._judge(error, directory)
        except Exception as error:
            if not proofs.is_database_error(error):
                raise
            return FAILED, f"the restored database broke off: {error}"
        failed = [check for check in self.checks if check.state == "failed"]
        if failed:
            return FAILED, "; ".join(f"{check.name}: {check.detail}" for check in failed)
        untested = [check for check in self.checks if check.state == "untested"]
        if untested:
            return UNTESTED, "; ".join(f"{check.name}: {check.detail}" for check in untested)
        return PROVED, ""

    def _judge(self, error: BackhaulError, directory: ScratchDirectory) -> tuple[str, str]:
        """Say of what an error speaks: of the backup, or of this host and the line."""
        if directory.free() < _LITTLE_ROOM or _DISK_FULL.search(error.why):
            return UNTESTED, f"the disk of the scratch server is full. {_sentence(error)}"
        if _NOT_LOADED.search(error.why):
            return UNTESTED, _sentence(error)
        if "restore" in self.seconds:
            # All of it was restored: what does not start, or does not answer any more, is what was restored.
            return FAILED, _sentence(error)
        if isinstance(error, ConfigurationError | StoreError | UsageError):
            return UNTESTED, _sentence(error)
        return FAILED, _sentence(error)

    def _check_room(self, directory: ScratchDirectory) -> None:
        needed = int(max(self._source.size, self._manifest.raw_size) * _MARGIN)
        free = directory.free()
        if free < needed:
            missing = Prerequisites("The drill")
            missing.add(
                f"{format_size(needed)} of room in {directory.path.parent}",
                f"{format_size(free)} are free",
                "Name a directory with room: --scratch DIR",
            )
            missing.require()

    @contextlib.contextmanager
    def _tried(self, directory: ScratchDirectory) -> Iterator[Iterator[DrillCheck]]:
        """Restore; yield the checks to be made while it stands."""
        kind = self._source.kind
        if kind.startswith("postgresql"):
            with self._postgresql(directory, physical=kind.endswith("+physical")) as checks:
                yield checks
        elif kind.startswith("mariadb"):
            with self._mariadb(directory, physical=kind.endswith("+physical")) as checks:
                yield checks
        elif kind == "redis":
            with self._redis(directory) as checks:
                yield checks
        elif kind == "sqlite":
            path = str(directory.path / "database")
            self._restore(SourceUrl(text=path, kind="sqlite", path=path))
            yield proofs.prove_sqlite(path, self._source, self._options.questions)
        else:
            place = directory.path / "files"
            self._restore(SourceUrl(text=str(place), kind="dir", path=str(place)))
            yield proofs.prove_directory(place, self._source)

    @contextlib.contextmanager
    def _postgresql(self, directory: ScratchDirectory, *, physical: bool) -> Iterator[Iterator[DrillCheck]]:
        server = ScratchPostgreSQL(directory)
        missing = Prerequisites("The drill")
        server.check_programs(int(self._source.server.partition(".")[0] or 0), missing, exact=physical)
        missing.require()
        self.server = server.version
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            if physical:
                users = {d.properties.get("superuser", "postgres") for d in self._source.databases}
                self._restore(_directory_url(str(server.data)))
                directory.give_all(server.data)
                user = users.pop() if users else "postgres"
                settings = self._source.settings
                self._timed("start", lambda: server.start(settings=settings, recovered_user=user))
            else:
                server.make()
                server.start(settings=self._source.settings)
                self._restore(server.url, globals_=True)
            yield proofs.prove_postgresql(
                server.url, self._source, server.bin, self._options.questions, self._options.database, self._jobs
            )

    @contextlib.contextmanager
    def _mariadb(self, directory: ScratchDirectory, *, physical: bool) -> Iterator[Iterator[DrillCheck]]:
        server = ScratchMariaDB(directory)
        missing = Prerequisites("The drill")
        wanted = tuple(int(number) for number in re.findall(r"\d+", self._source.server)[:2])
        server.check_programs(wanted, missing, exact=physical)
        missing.require()
        self.server = server.version
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            if physical:
                self._restore(_directory_url(str(server.data)))
                directory.give_all(server.data)
                self._timed("start", lambda: server.start(recovered=True))
            else:
                server.make()
                server.start()
                self._restore(server.url, globals_=True)
            yield proofs.prove_mariadb(server.url, self._source, self._options.questions, self._options.database)

    @contextlib.contextmanager
    def _redis(self, directory: ScratchDirectory) -> Iterator[Iterator[DrillCheck]]:
        server = ScratchRedis(directory)
        missing = Prerequisites("The drill")
        server.check_programs(missing)
        missing.require()
        self.server = server.version
        wanted, here = (int(text.partition(".")[0] or 0) for text in (self._source.server, server.version))
        if here < wanted:
            missing.add(
                f"a Redis server of version {wanted} or newer", f"this host has {server.version}", "Install it."
            )
            missing.require()
        with contextlib.ExitStack() as stack:
            stack.callback(server.stop)
            self._restore(_directory_url(str(server.data)))
            directory.give_all(server.data)
            self._timed("start", server.start)
            yield proofs.prove_redis(server.url, self._source, self._options.questions)

    def _restore(self, url: SourceUrl, *, globals_: bool = False) -> None:
        options = RestoreOptions(
            globals_=globals_, jobs=self._jobs, patience=self._options.patience, identities=self._options.identities
        )
        target: RestoreTarget = target_of(url, self._source, options, self._progress, lambda line: None)
        run = RestoreRun(self._store, self._committed, target, options, self._progress)
        run.check()
        result = run.run(self._store.url, url.text)
        self.seconds["restore"] = round(result.seconds, 3)
        for remark in _remarks(result.remarks):
            self.checks.append(remark)
            self._on_check(remark)

    def _timed(self, name: str, work: Callable[[], None]) -> None:
        """Do it, and count it to the time to restore: a database is back when it answers."""
        began = time.monotonic()
        work()
        self.seconds[name] = round(time.monotonic() - began, 3)


def _remarks(texts: Sequence[str]) -> list[DrillCheck]:
    return [DrillCheck(name="remark", state="skipped", detail=text) for text in texts]


def _directory_url(path: str) -> SourceUrl:
    return SourceUrl(text="a scratch directory", kind="dir", path=path, isolated=True)


def _sentence(error: BackhaulError) -> str:
    return f"{error.what}: {error.why}" if error.why else error.what


def _iso(time_: dt.datetime) -> str:
    return time_.astimezone(dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
