"""prune: the retention of a series. What is known of each backup makes a plan; the guard judges it; then it is applied.

A backup goes manifest first, so that from the first delete on it is not listed any more and nobody reads it; its
records and streams follow, a leftover claim comes last. Whatever a death leaves of it is what a dead push leaves, and
``clean`` collects it.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import shutil
import time
import zoneinfo
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import msgspec

from backhaul.errors import (
    BackhaulError,
    BackupNotFoundError,
    IntegrityError,
    PreconditionError,
    StoreError,
    UsageError,
)
from backhaul.formats import catalog, names
from backhaul.formats.quantities import format_size
from backhaul.model.drill import FAILED, PROVED
from backhaul.model.location import Location
from backhaul.model.manifest import Manifest
from backhaul.model.mirror import Refusal
from backhaul.model.objects import StoredObject
from backhaul.model.results import PrunedBackup, PruneResult
from backhaul.operations import series
from backhaul.operations.places import series_at
from backhaul.operations.refused import GuardError
from backhaul.planning.guard import MaxDelete
from backhaul.planning.retention import (
    IT_FITS,
    BackupFacts,
    KeepRules,
    PlannedBackup,
    RetentionPlan,
    choose_for_room,
    hold_in_words,
    judge_retention,
    plan_retention,
    removal_limit,
)
from backhaul.stores.base import Store
from backhaul.stores.local import flush_directory
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.digest import crc64nvme

_PARALLEL_QUESTIONS = 16
# Some file systems give room back late: how long it is waited for, in seconds.
_SETTLING = (0.5, 1.0, 2.0, 4.0)
_CHANGED = "its manifest is another one than a moment ago"

T = TypeVar("T")
R = TypeVar("R")


class PruneOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What to keep, and what may go.

    Attributes:
        keep_last: the newest so many.
        keep_daily, keep_weekly, keep_monthly, keep_yearly: the newest good one of each of so many days, ISO weeks,
            months, years that have one.
        keep_within: everything younger, in seconds.
        keep_free: bytes that are to be free on the disk; of a series on a local disk only. Alone it keeps what fits.
        max_delete: how many backups a run may remove; by default half of them, and always three.
        unproved_ok: the newest backup that a drill proved may go although all newer ones are unproved.
        timezone: the IANA name of the zone whose days, weeks, months and years count.
        patience: seconds for which a store that is ill or away is tried again.
    """

    keep_last: int | None = None
    keep_daily: int | None = None
    keep_weekly: int | None = None
    keep_monthly: int | None = None
    keep_yearly: int | None = None
    keep_within: float | None = None
    keep_free: int | None = None
    max_delete: MaxDelete = MaxDelete()
    unproved_ok: bool = False
    timezone: str = "UTC"
    patience: float = DEFAULT_PATIENCE


def check_options(options: PruneOptions) -> None:
    """Refuse rules that mean nothing anywhere.

    Raises:
        UsageError: there is none, one would keep nothing, or nobody knows the time zone.
    """
    _rules(options)
    _zone(options.timezone)


def free_on_disk(path: str) -> int:
    """Return the bytes that may still be written to the disk that holds a path, or will hold it."""
    place = Path(path).absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def prune(
    text: str,
    options: PruneOptions,
    *,
    dry_run: bool = False,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    free_space: Callable[[str], int] = free_on_disk,
    pause: Callable[[float], None] = time.sleep,
) -> PruneResult:
    """Remove the backups of a series that no rule keeps and nothing protects, oldest first.

    Args:
        text: SERIES.
        options: what to keep.
        dry_run: only say what would go; what the guard has against it is in the result then.
        now: the clock.
        free_space: says how many bytes are free on the disk of a path.
        pause: waits for so many seconds.

    Returns:
        What went and what stays, with all reasons; ``complete`` is False where something could not be done.

    Raises:
        UsageError: no rule at all, one that means nothing, or SERIES is a mirror.
        GuardError: the guard refused; nothing was removed.
        StoreError: the series could not be read, or nothing could be removed.
    """
    rules, zone = _rules(options), _zone(options.timezone)
    location = series_at(text)
    if options.keep_free is not None and location.kind != "local":
        raise UsageError(
            f"--keep-free means nothing to {text}",
            "it is about the room on a local disk, and an S3 store has no end",
            "Leave it out, and say with the other --keep options what stays.",
        )
    store = open_store(location, policy=RetryPolicy(options.patience))
    with contextlib.closing(store):
        if store.stat(catalog.RECORD) is not None:
            raise UsageError(
                f"{text} is a mirror, and no series of backups",
                f"it holds {catalog.RECORD}: what is gone at its source is in its recycler",
                "Its files go with: backhaul sync DIR MIRROR --recycle-after DURATION",
            )
        run = _Run(store, location, options, now, free_space, pause)
        run.plan(rules, zone)
        if not dry_run:
            if run.refusals:
                raise GuardError(run.refusals)
            run.apply()
        return run.result(dry_run=dry_run)


class _Run:
    """One run over one series."""

    def __init__(
        self,
        store: Store,
        location: Location,
        options: PruneOptions,
        now: Callable[[], dt.datetime],
        free_space: Callable[[str], int],
        pause: Callable[[float], None],
    ) -> None:
        self.refusals: tuple[Refusal, ...] = ()
        self._store = store
        self._location = location
        self._options = options
        self._now = now
        self._free_space = free_space
        self._pause = pause
        self._etags: dict[str, str | None] = {}
        self._plan = RetentionPlan(backups=())
        self._to_go: tuple[PlannedBackup, ...] = ()
        self._for_room: tuple[PlannedBackup, ...] = ()
        self._reachable = False
        self._removed: list[PlannedBackup] = []
        self._spared: dict[str, str] = {}
        self._vanished: set[str] = set()
        self._problems: list[str] = []
        self._remarks: list[str] = []

    # -- the plan ------------------------------------------------------------------------------------------

    def plan(self, rules: KeepRules, zone: dt.tzinfo) -> None:
        """Find out what there is, decide, and have the guard judge."""
        now, options = self._now(), self._options
        objects = series.committed_backups(self._store)
        if not objects:
            self._remarks.append(f"no committed backup in {self._location.text} (a mistyped name looks the same)")
        found = {facts.id: facts for facts in _side_by_side(self._look_at, objects.items()) if facts is not None}
        self._plan = plan_retention(found.values(), rules, now=now, zone=zone, unproved_ok=options.unproved_ok)
        if self._location.kind != "local" and self._plan.removed:
            # Asked of those that would go and of no others: that is a request for each of their objects.
            going = [(backup.id, objects[backup.id]) for backup in self._plan.removed]
            for backup, lock in _side_by_side(lambda each: (each[0], self._lock_of(each[1], now)), going):
                found[backup] = msgspec.structs.replace(found[backup], lock=lock)
            self._plan = plan_retention(found.values(), rules, now=now, zone=zone, unproved_ok=options.unproved_ok)
        self._problems += [f"{facts.id} stays: {facts.problem}" for facts in found.values() if facts.unreadable]
        self._remarks += self._plan.remarks
        self._plan_room()
        self._to_go = self._plan.removed + self._for_room
        self.refusals = judge_retention(self._location.text, self._plan, self._to_go, options.max_delete)

    def _plan_room(self) -> None:
        wanted = self._options.keep_free
        if wanted is None:
            return
        coming = sum(backup.size for backup in self._plan.removed)
        missing = wanted - self._free_space(self._location.path) - coming
        chosen = choose_for_room(self._plan, missing)
        could = sum(backup.size for backup in chosen)
        if missing > could:
            # What would not be enough in the end is no reason to lose a backup.
            protected = [
                f"{b.id} ({format_size(b.size)}: {', '.join(b.reasons)})" for b in self._plan.kept if b.protected
            ]
            self._problems.append(
                f"{format_size(wanted)} can't be made free: {format_size(missing)} are missing, what may go for room"
                f" has {format_size(could)}; so nothing goes for it. Protected: {'; '.join(protected) or 'nothing'}"
            )
            return
        self._reachable = True
        self._for_room = tuple(_for_room(backup, wanted) for backup in chosen)

    def _look_at(self, entry: tuple[str, list[StoredObject]]) -> BackupFacts | None:
        """Return what is to be known of a backup; None if it was removed meanwhile."""
        backup, objects = entry
        size = sum(each.size for each in objects)
        holds = tuple(series.read_hold(self._store, e.key) for e in objects if series.is_record(e.key, "hold"))
        try:
            committed = series.read_backup(self._store, backup)
        except BackupNotFoundError:
            return None
        except BackhaulError as error:
            if isinstance(error, StoreError) and error.transient:
                raise
            return BackupFacts(id=backup, size=size, unreadable=f"{error.what}: {error.why}", holds=holds)
        self._etags[backup] = committed.etag
        return BackupFacts(
            id=backup,
            size=size,
            damage=_damage(committed.manifest, objects),
            drill=self._last_drill(objects),
            holds=holds,
        )

    def _last_drill(self, objects: Iterable[StoredObject]) -> str:
        """Return what the last drill found that found anything: one that could not test says nothing of the backup."""
        for key in sorted((each.key for each in objects if series.is_record(each.key, "drill")), reverse=True):
            try:
                records = series.read_drills(self._store, [key])
            except StoreError as error:
                if error.transient:
                    raise
                continue
            if records and records[0].result in (PROVED, FAILED):
                return records[0].result
        return ""

    def _lock_of(self, objects: Iterable[StoredObject], now: dt.datetime) -> str:
        """Return the object lock of a backup in words; empty for none, and where the store does not let it be known."""
        for each in objects:
            name = names.parse_key(each.key)
            if name is None or name.kind not in ("manifest", "stream"):
                continue
            try:
                found = self._store.stat(each.key)
            except StoreError as error:
                if error.transient:
                    raise
                self._problems.append(f"it can't be asked whether {each.key} is locked: {error.why}")
                return f"perhaps locked: {error.why}"
            if found is not None and found.legal_hold:
                return f"object lock: {each.key} is under a legal hold"
            if found is not None and found.retained_until is not None and found.retained_until > now:
                return f"object lock: {each.key} until {found.retained_until:%Y-%m-%dT%H:%M:%SZ}"
        return ""

    # -- what is done --------------------------------------------------------------------------------------

    def apply(self) -> None:
        """Remove what the plan says, and then, as long as there is too little room, what may go for it."""
        try:
            free = self._free_space(self._location.path) if self._reachable else 0
            for backup in self._plan.removed:
                self._remove(backup)
            if self._reachable:
                self._make_room(free)
        except StoreError as error:
            if not self._removed:
                raise
            self._problems.append(f"{error.what}: {error.why}. What was still to go stays until the next run")

    def _make_room(self, before: int) -> None:
        """Remove what may go until there is room; ``before`` is what was free before the first removal of the run."""
        wanted = self._options.keep_free
        assert wanted is not None
        limit = removal_limit(self._options.max_delete, len(self._plan.backups))
        size = sum(backup.size for backup in self._removed)
        may_go = iter(choose_for_room(self._plan, sum(backup.size for backup in self._plan.backups) + 1))
        while True:
            free = self._settled(min(wanted, before + size // 2))
            if free >= wanted:
                return
            missing = f"{format_size(wanted - free)} are missing still"
            if free < before + size // 2:
                # Removing on and on would not help, and would take them all.
                self._problems.append(
                    f"{missing}: {format_size(size)} were removed, and the disk has {format_size(free - before)} more"
                    " room than before. Something else fills it, or holds what was removed (a snapshot, a program that"
                    " still reads it, a hard link). So nothing more was removed"
                )
                return
            if len(self._removed) >= limit:
                words = f"at most {limit} backups may go in one run (--max-delete)"
                self._problems.append(f"{missing}; {words}")
                return
            backup = next(may_go, None)
            if backup is None:
                self._problems.append(f"{missing}, and nothing more may go")
                return
            before, size = free, 0
            if self._remove(_for_room(backup, wanted)):
                size = backup.size

    def _settled(self, expected: int) -> int:
        """Return the free bytes; where they are fewer than expected, after some patience."""
        free = self._free_space(self._location.path)
        for seconds in _SETTLING:
            if free >= expected:
                break
            os.sync()
            self._pause(seconds)
            free = self._free_space(self._location.path)
        return free

    def _remove(self, backup: PlannedBackup) -> bool:
        """Remove one backup, unless something happened to it since it was looked at; tell whether it went."""
        manifest = names.object_key(backup.id, names.MANIFEST)
        # Looked at anew: a hold may have come since, or a drill's record.
        objects = self._objects_of(backup.id)
        if manifest not in objects:
            return self._gone_already(backup)
        held = self._held(objects)
        if held:
            return self._spare(backup, held)
        try:
            text = series.read_backup(self._store, backup.id).text
            self._store.delete(manifest, etag=self._etags[backup.id])
        except BackupNotFoundError:
            return self._gone_already(backup)
        except (PreconditionError, IntegrityError):
            return self._spare(backup, _CHANGED)
        self._removed.append(backup)
        try:
            self._flush(backup.id)
            # Whoever sets a hold looks for the manifest after he has written it: one of the two sees the other.
            objects = self._objects_of(backup.id)
            held = self._held(objects)
            if held:
                with contextlib.suppress(PreconditionError):
                    self._store.put(manifest, text, crc64nvme(text), if_absent=True)
                self._removed.remove(backup)
                return self._spare(backup, held)
            if series.is_committed(self._store, backup.id):
                self._removed.remove(backup)
                return self._spare(backup, _CHANGED)
            for key in sorted(objects, key=lambda key: (objects[key].kind == "claim", key)):
                self._store.delete(key)
        except StoreError:
            self._remarks.append(f"of {backup.id} something is left: backhaul clean {self._location.text}")
            raise
        return True

    def _flush(self, backup: str) -> None:
        """Have a disk keep it that the manifest is gone: not even a power cut may leave one whose streams are gone."""
        if self._location.kind != "local":
            return
        directory = Path(self._location.path, backup)
        try:
            flush_directory(directory)
        except FileNotFoundError:
            pass  # nothing else was in it
        except OSError as error:
            raise StoreError(f"Could not flush {directory}", str(error), "Check the disk.") from error

    def _objects_of(self, backup: str) -> dict[str, names.ObjectName]:
        listed = self._store.list(names.object_key(backup, ""))
        return {entry.key: name for entry in listed if (name := names.parse_key(entry.key)) is not None}

    def _held(self, objects: dict[str, names.ObjectName]) -> str:
        """Return the first hold of a backup that lasts, in words."""
        now = self._now()
        for key, name in objects.items():
            if name.record == "hold" and (words := hold_in_words(series.read_hold(self._store, key), now)):
                return words
        return ""

    def _spare(self, backup: PlannedBackup, why: str) -> bool:
        self._spared[backup.id] = why
        if why == _CHANGED:
            self._problems.append(f"{backup.id} stays: {why}")
        return False

    def _gone_already(self, backup: PlannedBackup) -> bool:
        self._vanished.add(backup.id)
        self._remarks.append(f"{backup.id} was removed by another run meanwhile")
        return False

    # -- what came of it -----------------------------------------------------------------------------------

    def result(self, *, dry_run: bool) -> PruneResult:
        """Return what was done, or would be."""
        removed = self._to_go if dry_run else tuple(self._removed)
        gone = {backup.id for backup in removed} | self._vanished
        planned = {backup.id: backup for backup in self._plan.backups}
        kept = []
        for backup in self._plan.backups:
            if backup.id not in gone:
                reasons = backup.reasons
                if backup.id in self._spared:
                    reasons = (self._spared[backup.id],)
                elif not backup.keep and not dry_run:
                    reasons = (*reasons, "but it was not removed in this run")
                kept.append(_result_of(msgspec.structs.replace(backup, reasons=reasons), planned))
        freed = sum(backup.size for backup in removed)
        free = None
        if self._options.keep_free is not None:
            free = self._free_space(self._location.path) + (freed if dry_run else 0)
        return PruneResult(
            series=self._location.text,
            dry_run=dry_run,
            removed=tuple(_result_of(backup, planned) for backup in removed),
            kept=tuple(kept),
            freed=freed,
            free=free,
            refusals=self.refusals,
            problems=tuple(self._problems),
            remarks=tuple(self._remarks),
        )


def _result_of(backup: PlannedBackup, planned: dict[str, PlannedBackup]) -> PrunedBackup:
    return PrunedBackup(
        id=backup.id,
        size=backup.size,
        reasons=backup.reasons,
        protected=planned[backup.id].protected,
        problem=backup.problem,
    )


def _for_room(backup: PlannedBackup, wanted: int) -> PlannedBackup:
    """Return a backup that the rules keep as one that goes for room."""
    kept = [f"else kept: {reason}" for reason in backup.reasons if reason != IT_FITS]
    return msgspec.structs.replace(backup, keep=False, reasons=(f"{format_size(wanted)} are to be free", *kept))


def _damage(manifest: Manifest, objects: Iterable[StoredObject]) -> str:
    """Say what is missing of the streams that a manifest names, or of another size; empty if nothing."""
    sizes = {names.file_of(each.key): each.size for each in objects}
    for stream in manifest.streams:
        for segment in stream.objects:
            size = sizes.get(segment.object)
            if size is None:
                return f"{segment.object} is missing"
            if size != segment.size:
                return f"{segment.object} has {size} bytes, and {segment.size} were stored"
    return ""


def _side_by_side(ask: Callable[[T], R], entries: Iterable[T]) -> list[R]:
    """Ask of all entries, several at once; the first failure ends it."""
    pool = ThreadPoolExecutor(_PARALLEL_QUESTIONS)
    try:
        return list(pool.map(ask, entries))
    finally:
        pool.shutdown(cancel_futures=True)


def _rules(options: PruneOptions) -> KeepRules:
    """Return the rules, if they are any.

    Raises:
        UsageError: there are none, or one that would keep nothing.
    """
    given: Sequence[tuple[str, float | None]] = (
        ("--keep-last", options.keep_last),
        ("--keep-daily", options.keep_daily),
        ("--keep-weekly", options.keep_weekly),
        ("--keep-monthly", options.keep_monthly),
        ("--keep-yearly", options.keep_yearly),
        ("--keep-within", options.keep_within),
        ("--keep-free", options.keep_free),
    )
    if all(value is None for _, value in given):
        raise UsageError(
            "Nothing says what to keep",
            "without a rule every backup but the newest good one would go",
            "Give at least one of: " + ", ".join(name for name, _ in given),
        )
    for name, value in given:
        if value is not None and value <= 0:
            raise UsageError(f"{name} {value:g} keeps nothing", "a rule keeps at least something", "Leave it out.")
    return KeepRules(
        last=options.keep_last,
        daily=options.keep_daily,
        weekly=options.keep_weekly,
        monthly=options.keep_monthly,
        yearly=options.keep_yearly,
        within=options.keep_within,
        everything=all(value is None for _, value in given[:-1]),
    )


def _zone(name: str) -> dt.tzinfo:
    try:
        return zoneinfo.ZoneInfo(name)
    except (KeyError, ValueError, OSError) as error:
        raise UsageError(
            f"{name!r} is no time zone", str(error).strip("'"), "Write a name such as Europe/Berlin, or UTC."
        ) from error
