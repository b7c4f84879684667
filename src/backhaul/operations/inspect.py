"""list and show: what a series holds."""

from __future__ import annotations

import contextlib
from concurrent.futures import ThreadPoolExecutor

import msgspec

from backhaul.errors import BackhaulError, StoreRefusedError
from backhaul.formats import names
from backhaul.model.objects import StoredObject
from backhaul.model.results import BackupSummary, ListResult, ShowResult
from backhaul.operations import series
from backhaul.operations.places import reference_at, series_at
from backhaul.stores.open import open_store
from backhaul.stores.retry import RetryPolicy

# Someone waits for the answer: a store that is away is said to be away soon.
PATIENCE = 10.0
_PARALLEL_READS = 16


def list_backups(text: str, *, long: bool = False) -> ListResult:
    """Return the committed backups of a series, newest last.

    Args:
        text: SERIES.
        long: read the manifests too, for raw sizes and durations: one request for each backup. (The record of the last
            drill is read in any case, where there was one.)

    Raises:
        StoreError: the series could not be listed. (An empty or absent series is an empty list.)
    """
    location = series_at(text)
    store = open_store(location, policy=RetryPolicy(PATIENCE))
    try:
        committed = series.committed_backups(store)
        backups = [_summary(i, objects) for i, objects in committed.items()]
        drilled = {i: keys for i, objects in committed.items() if (keys := _drills(objects))}
        if drilled:

            def latest(summary: BackupSummary) -> BackupSummary:
                records = series.read_drills(store, drilled.get(summary.id, [])[-1:])
                if not records:
                    return summary
                return msgspec.structs.replace(summary, drill=records[-1].result, drilled=records[-1].started)

            with ThreadPoolExecutor(_PARALLEL_READS) as pool:
                backups = list(pool.map(latest, backups))
        if long:

            def read(summary: BackupSummary) -> BackupSummary:
                try:
                    manifest = series.read_manifest(store, summary.id)
                except BackhaulError as error:
                    return msgspec.structs.replace(summary, problem=f"{error.what}: {error.why}")
                return msgspec.structs.replace(
                    summary,
                    raw_size=manifest.raw_size,
                    seconds=max((producer.seconds for producer in manifest.producers), default=None),
                )

            with ThreadPoolExecutor(_PARALLEL_READS) as pool:
                backups = list(pool.map(read, backups))
        return ListResult(series=text, backups=tuple(backups))
    finally:
        store.close()


def show_backup(reference: str) -> ShowResult:
    """Return one backup's manifest.

    Raises:
        BackupNotFoundError: there is none.
        IntegrityError: its manifest can't be read.
    """
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(PATIENCE))
    try:
        backup = series.find_backup(store, when)
        manifest = series.read_manifest(store, backup)
        drills = series.read_drills(store, series.drill_keys(store, backup))
        holds = {}
        with contextlib.suppress(StoreRefusedError):  # an account that may read but not list
            holds = {key: series.read_hold(store, key) for key in series.hold_keys(store, backup)}
        return ShowResult(
            series=location.text,
            manifest=manifest,
            drills=tuple(drills),
            holds=tuple(hold for hold in holds.values() if hold is not None),
            unreadable_holds=tuple(key for key, hold in holds.items() if hold is None),
        )
    finally:
        store.close()


def _drills(objects: list[StoredObject]) -> list[str]:
    return sorted(entry.key for entry in objects if series.is_record(entry.key, "drill"))


def _summary(backup: str, objects: list[StoredObject]) -> BackupSummary:
    streams: set[str] = set()
    encrypted = True
    size = 0
    for entry in objects:
        name = names.parse_key(entry.key)
        if name is not None and name.kind == "stream":
            streams.add(name.stream)
            encrypted = encrypted and name.encrypted
            size += entry.size
    start = names.parse_backup_id(backup)
    assert start is not None
    return BackupSummary(
        id=backup,
        started=start.isoformat().replace("+00:00", "Z"),
        streams=tuple(sorted(streams)),
        stored_size=size,
        encrypted=encrypted and bool(streams),
        problem=None if streams else "its streams are missing",
    )
