"""restore: the streams of a backup into a database or directory, while they are downloaded, some side by side.

The order: the backup is found and its manifest read; the target is asked whether it fits, which finds everything that
is missing before a byte is read; then phase by phase the streams go in, each checked to its last byte before its
consumer gets an end; and last the target lets the whole be seen. What fails before that leaves nothing with the name
that was asked for.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import msgspec

from backhaul.errors import BackhaulError, UsageError
from backhaul.formats.age_keys import Identity
from backhaul.formats.seekable import SeekTable
from backhaul.formats.source_url import parse_source_url
from backhaul.model.manifest import Manifest, SourceRecord, StreamRecord
from backhaul.model.memory import MemoryBound
from backhaul.model.results import RestoreResult
from backhaul.model.source_url import SourceUrl
from backhaul.operations import memory, series
from backhaul.operations.encryption import unlock
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.pull import deliver
from backhaul.operations.reading import StoredStream
from backhaul.operations.series import CommittedBackup
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.targets.sections import Phase, RestoreTarget, Step


class RestoreOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to restore.

    Attributes:
        replace: whether what is there, and is not empty, may be replaced.
        only: tables whose rows to restore; none for all.
        globals_: whether roles or accounts that the server lacks are made from the backup.
        no_owner: (PostgreSQL) whether everything belongs to the account that restores.
        jobs: streams side by side, and indexes; None for one a core.
        workers: threads that fetch, over all streams, and one more for each of several; None for two a core. For each
            stream as many decode, at most one a core.
        patience: seconds for which a store that is ill or away is tried again.
        identities: whose secrets open an encrypted backup.
    """

    replace: bool = False
    only: tuple[str, ...] = ()
    globals_: bool = False
    no_owner: bool = False
    jobs: int | None = None
    workers: int | None = None
    patience: float = DEFAULT_PATIENCE
    identities: tuple[Identity, ...] = ()


def restore(
    reference: str,
    into: str,
    options: RestoreOptions = RestoreOptions(),  # noqa: B008 - frozen
    *,
    progress: PullProgress | None = None,
    on_error_line: Callable[[bytes], None] | None = None,
    expected: Manifest | None = None,
) -> RestoreResult:
    """Restore a backup into a database or a directory.

    Args:
        reference: ``SERIES[@WHEN]``.
        into: the URL of the database, or a path.
        options: how to restore.
        progress: counters to keep up to date.
        on_error_line: told the lines of the programs' stderr that are news.
        expected: the manifest that the backup has to have; None for whichever it has.

    Raises:
        UsageError: the URL does not fit what was backed up.
        ConfigurationError: prerequisites are missing, or what is there is not empty; nothing was read.
        BackupNotFoundError: no such backup.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: what is stored is not what was pushed, or has another manifest. Nothing stands under the name
            that was asked for.
        TargetError: the server or disk refused. Nothing stands under the name that was asked for.
        StoreError: the store could not be read.
    """
    memory.settle_allocator()
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(options.patience))
    with contextlib.closing(store):
        backup = series.find_backup(store, when)
        committed = series.read_backup(store, backup)
        if expected is not None:
            series.insist_on(expected, committed, f"{location.text}@{backup}")
        source = source_of_backup(committed, location.text)
        target = target_of(parse_source_url(into), source, options, progress, on_error_line)
        run = RestoreRun(store, committed, target, options, progress or PullProgress())
        run.check()
        return run.run(location.text, into)


def source_of_backup(committed: CommittedBackup, where: str) -> SourceRecord:
    """Return what was backed up.

    Raises:
        UsageError: nobody knows: it is a command's stream.
    """
    source = committed.manifest.source
    if source is None:
        backup = f"{where}@{committed.manifest.id}"
        raise UsageError(
            f"It is not known what {backup} is a backup of",
            "it was made from a command's output, from stdin or from a file",
            f"Bring it back with the program that reads it: backhaul pull {backup} -- COMMAND. Backups made with "
            "--from URL can be restored.",
        )
    return source


def target_of(
    url: SourceUrl,
    source: SourceRecord,
    options: RestoreOptions,
    progress: PullProgress | None = None,
    on_error_line: Callable[[bytes], None] | None = None,
) -> RestoreTarget:
    """Return the target that a URL means for a backup of that kind.

    Raises:
        UsageError: they don't fit each other, or an option does not fit.
    """
    on_table = progress.tables.begin if progress is not None else lambda name: None
    if options.only and options.replace:
        raise UsageError(
            "--only and --replace exclude each other",
            "all other tables of what is replaced would be there without their rows",
            "Restore into a new database, and copy the table from there.",
        )
    given = {
        "--only": bool(options.only) and source.kind not in ("postgresql", "mariadb"),
        "--globals": options.globals_ and source.kind not in ("postgresql", "mariadb"),
        "--no-owner": options.no_owner and source.kind != "postgresql",
    }
    for name, wrong in given.items():
        if wrong:
            raise UsageError(
                f"{name} says nothing to a backup of kind {source.kind}", "there is nothing to choose", "Leave it out."
            )
    if source.kind == "postgresql" and url.kind == "postgresql":
        from backhaul.targets.postgresql import PostgreSQLRestore, PostgreSQLRestoreOptions

        return PostgreSQLRestore(
            url,
            PostgreSQLRestoreOptions(
                replace=options.replace,
                only=options.only,
                globals_=options.globals_,
                no_owner=options.no_owner,
                tablespaces=not url.isolated,
            ),
            on_error_line=on_error_line,
            on_table=on_table,
        )
    if source.kind == "mariadb" and url.kind == "mariadb":
        from backhaul.targets.mariadb import MariaDBRestore, MariaDBRestoreOptions

        return MariaDBRestore(
            url,
            MariaDBRestoreOptions(replace=options.replace, only=options.only, globals_=options.globals_),
            on_error_line=on_error_line,
            on_table=on_table,
        )
    if source.kind == "sqlite" and url.kind in ("sqlite", "file"):
        from backhaul.targets.sqlite import SQLiteRestore

        return SQLiteRestore(url.path, replace=options.replace)
    physical = source.kind in ("postgresql+physical", "mariadb+physical", "dir", "redis")
    if physical and (url.kind in ("dir", "file") or (url.kind == source.kind and url.path not in ("", "/"))):
        from backhaul.targets.directory import DirectoryRestore

        return DirectoryRestore(url.path, replace=options.replace, on_error_line=on_error_line, hints=not url.isolated)
    wanted = {
        "postgresql": "postgresql:///NEW_DATABASE",
        "mariadb": "mariadb:///NEW_DATABASE",
        "sqlite": "sqlite:///PATH",
    }.get(source.kind, "dir:///EMPTY_DIRECTORY")
    raise UsageError(
        f"A backup of kind {source.kind} can't be restored into {url.text}",
        "a dump can't be loaded over the line"
        if source.kind == url.kind == "redis"
        else "physical backups are files: they go into a data directory, with the server stopped"
        if source.kind == url.kind
        else f"that is of kind {url.kind}",
        f"Write --into {wanted}",
    )


class RestoreRun:
    """One restore: a backup, its target, and what is in between. ``drill`` makes one into a server of its own."""

    def __init__(
        self,
        store: Store,
        committed: CommittedBackup,
        target: RestoreTarget,
        options: RestoreOptions,
        progress: PullProgress,
    ) -> None:
        self.target = target
        self.phases: dict[str, float] = {}
        self._store = store
        self._committed = committed
        self._options = options
        self._progress = progress
        self._jobs = options.jobs or memory.default_workers()
        self._largest_table: SeekTable | None = None
        self._encrypted = False
        # Lanes and threads of each phase so far.
        self._in_use: set[tuple[int, int]] = set()
        self._streams: list[str] = []
        self._size = 0

    def check(self) -> None:
        """Ask the target whether the backup fits. Raises as ``RestoreTarget.check`` does."""
        manifest = self._committed.manifest
        assert manifest.source is not None
        self.target.check(manifest.source, manifest.streams)
        for record in manifest.streams[:1]:
            unlock(self._store, self._committed, record, self._options.identities)

    def run(self, where: str, into: str) -> RestoreResult:
        """Restore; the target was checked. Raises as ``restore`` does."""
        clock = time.monotonic()
        records = {record.name: record for record in self._committed.manifest.streams}
        try:
            phases = self.target.phases(self._jobs)
            steps = [step for phase in phases for step in phase.steps]
            self._streams = [step.stream for step in steps]
            self._size = self._progress.total = sum(records[name].raw.size for name in self._streams)
            source = self._committed.manifest.source
            assert source is not None
            self._progress.tables.total = sum(
                table.kind == "table" for database in source.databases for table in database.tables
            )
            for phase in phases:
                self._run_phase(phase, records)
            self._progress.tables.phase = "finishing"
            began = time.monotonic()
            self.target.commit()
            self.phases["finishing"] = round(time.monotonic() - began, 3)
        except BaseException as error:
            known = len(self.target.remarks)
            self.target.abort()
            if isinstance(error, BackhaulError):
                error.todo = " ".join([error.todo, *self.target.remarks[known:]]).strip()
            raise
        return self._result(where, into, time.monotonic() - clock)

    def _run_phase(self, phase: Phase, records: dict[str, StreamRecord]) -> None:
        began = time.monotonic()
        self._progress.tables.phase = phase.name
        phase.before()
        lanes = max(1, min(self._jobs, len(phase.steps)))
        total = self._options.workers or 2 * memory.default_workers()
        workers = total if lanes == 1 else -(-total // lanes) + 1
        self._in_use.add((lanes, workers))
        todo = iter(phase.steps)
        lock = threading.Lock()
        group = Supervisor("restore")

        def lane() -> None:
            while True:
                with lock:
                    step = next(todo, None)
                if step is None:
                    return
                self._run_step(step, records[step.stream], group, workers)

        with group:
            threads = [group.start(lane, f"lane-{number}") for number in range(lanes)]
            with group.condition:
                while not group.stopped and any(thread.is_alive() for thread in threads):
                    group.condition.wait(0.5)
        self.phases[phase.name] = round(time.monotonic() - began, 3)

    def _run_step(self, step: Step, record: StreamRecord, group: Supervisor, workers: int) -> None:
        target = step.make()
        try:
            key = unlock(self._store, self._committed, record, self._options.identities)
            stream = StoredStream(self._store, self._committed.manifest, record, key)
            if stream.table is not None and (
                self._largest_table is None or len(stream.table) > len(self._largest_table)
            ):
                self._largest_table = stream.table
            self._encrypted = self._encrypted or stream.encrypted
            deliver(stream, target, group, workers, self._progress)
        except BaseException:
            target.abort()
            raise

    def _result(self, where: str, into: str, seconds: float) -> RestoreResult:
        table = self._largest_table
        return RestoreResult(
            series=where,
            id=self._committed.manifest.id,
            into=parse_source_url(into).text,
            streams=tuple(self._streams),
            raw_size=self._size,
            fetched=self._progress.stored,
            seconds=seconds,
            phases=self.phases,
            jobs=self._jobs,
            remarks=tuple(dict.fromkeys(self.target.remarks)),
            shortfalls=tuple(dict.fromkeys(self.target.shortfalls)),
            memory=self._memory(table),
            peak_memory=memory.peak_memory(),
        )

    def _memory(self, table: SeekTable | None) -> MemoryBound:
        # (Not all phases have as many streams as there may be lanes, and few lanes have more threads, rounded up.)
        bounds = [
            memory.pull_bound(
                workers,
                max(table.raw_sizes) if table else 0,
                max(table.stored_sizes) if table else 0,
                len(table) if table else 0,
                encrypted=self._encrypted,
                lanes=lanes,
            )
            for lanes, workers in self._in_use or {(1, 1)}
        ]
        return max(bounds, key=lambda bound: bound.total)
