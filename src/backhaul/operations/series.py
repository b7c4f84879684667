"""A series in a store: which backups are committed, their manifests, and the right to make a new one."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import socket
from collections.abc import Iterable

import msgspec

from backhaul.errors import (
    BackupNotFoundError,
    FormatError,
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    StoreRefusedError,
)
from backhaul.formats import drill as drill_format
from backhaul.formats import hold as hold_format
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names
from backhaul.formats.when import When
from backhaul.model.backup_hold import BackupHold
from backhaul.model.claim import Claim
from backhaul.model.drill import DrillRecord
from backhaul.model.manifest import Manifest
from backhaul.model.objects import StoredObject
from backhaul.planning.selection import select_backup
from backhaul.stores.base import Store
from backhaul.transforms.digest import crc64nvme, encode_crc64nvme


class CommittedBackup(msgspec.Struct, frozen=True):
    """A manifest as it lies in the store, and what it says; ``etag`` tells it from whatever replaces it."""

    text: bytes
    manifest: Manifest
    etag: str | None = None


def new_claim(now: dt.datetime) -> Claim:
    """Return a claim that no other run has."""
    return Claim(run=secrets.token_hex(8), host=socket.gethostname(), pid=os.getpid(), since=now.isoformat())


def take_claim(store: Store, backup: str, claim: Claim) -> bool:
    """Reserve an id in a series; tell whether it was free.

    This is also the first request that a run makes: it finds wrong credentials, missing buckets and
    read-only disks before the dump begins.
    """
    body = msgspec.json.encode(claim)
    try:
        store.put(names.object_key(backup, names.CLAIM), body, crc64nvme(body), if_absent=True, kind="working")
    except PreconditionError:
        return False
    # Asked only now: a run that committed this id in between has released its claim, and whoever looks
    # for its manifest before claiming may look too early.
    if is_committed(store, backup):
        release_claim(store, backup)
        return False
    return True


def renew_claim(store: Store, backup: str, claim: Claim) -> None:
    """Write the claim once more, over its older self: it is young again, and its run is alive to ``clean``."""
    body = msgspec.json.encode(claim)
    store.put(names.object_key(backup, names.CLAIM), body, crc64nvme(body), if_absent=False, kind="working")


def owns_claim(store: Store, backup: str, claim: Claim) -> bool:
    """Tell whether the claim is still this run's: stores that ignore conditions let a second run take it."""
    body = msgspec.json.encode(claim)
    content = bytearray(len(body))
    try:
        store.read_into(names.object_key(backup, names.CLAIM), 0, memoryview(content))
    except (ObjectNotFoundError, IntegrityError):
        return False
    return content == body


def release_claim(store: Store, backup: str) -> None:
    """Give the id back, or, after the commit, remove what is no longer needed."""
    store.delete(names.object_key(backup, names.CLAIM))


def is_committed(store: Store, backup: str) -> bool:
    """Tell whether the backup's manifest is there."""
    return store.stat(names.object_key(backup, names.MANIFEST)) is not None


def write_manifest(store: Store, manifest: Manifest) -> StoredObject:
    """Commit: from the moment that this returns the backup exists.

    Raises:
        PreconditionError: another run committed that id.
    """
    body = manifest_format.encode(manifest)
    return store.put(names.object_key(manifest.id, names.MANIFEST), body, crc64nvme(body), if_absent=True)


def read_manifest(store: Store, backup: str) -> Manifest:
    """Read what the manifest of a backup says. Raises as ``read_backup`` does."""
    return read_backup(store, backup).manifest


def read_backup(store: Store, backup: str) -> CommittedBackup:
    """Read the manifest of a backup.

    Raises:
        BackupNotFoundError: there is none: the backup is not committed, or is gone.
        IntegrityError: it is not one, or of a newer major version.
    """
    key = names.object_key(backup, names.MANIFEST)
    where = f"{store.url}/{key}"
    found = store.stat(key)
    if found is None:
        raise BackupNotFoundError(f"There is no backup {backup} in {store.url}", f"{where} does not exist", _LIST)
    if found.size > manifest_format.MAX_SIZE:
        raise IntegrityError(f"{where} is not a manifest", f"it has {found.size} bytes", _LIST)
    content = bytes(_read_checked(store, key, found, where))
    try:
        return CommittedBackup(content, manifest_format.decode(content, where=where, expected_id=backup), found.etag)
    except FormatError as error:
        raise IntegrityError(error.what, error.why, error.todo) from error


def insist_on(manifest: Manifest, found: CommittedBackup, where: str) -> None:
    """Let a backup be read only with the manifest that was looked at before.

    Raises:
        IntegrityError: it has another one.
    """
    if found.manifest != manifest:
        raise IntegrityError(
            f"{where} is not what it was a moment ago",
            "another manifest has taken the place of its own",
            "Nothing of it was read. See who else writes to the series.",
        )


def _read_checked(store: Store, key: str, found: StoredObject, where: str) -> bytearray:
    """Read a small object; once more if it does not fit the checksum that the store has of it."""
    for _ in range(2):
        content = bytearray(found.size)
        store.read_into(key, 0, memoryview(content), etag=found.etag)
        if found.checksum in (None, f"CRC64NVME:{encode_crc64nvme(crc64nvme(content))}"):
            return content
    raise IntegrityError(
        f"{where} did not arrive as it is stored",
        f"twice its checksum was not the store's {found.checksum}",
        "Something between here and the store damages data; verify the network, or use HTTPS.",
    )


def read_drills(store: Store, keys: Iterable[str]) -> list[DrillRecord]:
    """Read the records of drills, oldest first; what is none, or can't be read, is left out."""
    found = []
    for key in sorted(keys):
        status = store.stat(key)
        if status is None or status.size > drill_format.MAX_SIZE:
            continue
        content = bytearray(status.size)
        with contextlib.suppress(FormatError, IntegrityError, ObjectNotFoundError):
            store.read_into(key, 0, memoryview(content))
            found.append(drill_format.decode(bytes(content), where=f"{store.url}/{key}"))
    return found


def drill_keys(store: Store, backup: str) -> list[str]:
    """Return the keys of the records of a backup's drills, oldest first; none where this account may not list."""
    prefix = names.object_key(backup, "drill-")
    found = []
    with contextlib.suppress(StoreRefusedError):
        found = [entry.key for entry in store.list(prefix)]
    return sorted(key for key in found if is_record(key, "drill"))


def is_record(key: str, record: str) -> bool:
    """Tell whether a key is that of a record of this kind: ``drill`` or ``hold``."""
    name = names.parse_key(key)
    return name is not None and name.record == record


def hold_keys(store: Store, backup: str) -> list[str]:
    """Return the keys of the records of a backup's holds, oldest first.

    Raises:
        StoreError: they could not be listed: it is not known whether there are any.
    """
    return sorted(e.key for e in store.list(names.object_key(backup, "hold-")) if is_record(e.key, "hold"))


def read_hold(store: Store, key: str) -> BackupHold | None:
    """Read the record of a hold; None if it can't be read, or was released meanwhile.

    Raises:
        StoreError: the store did not answer: asked later it may.
    """
    where = f"{store.url}/{key}"
    try:
        status = store.stat(key)
        if status is not None and status.size <= hold_format.MAX_SIZE:
            return hold_format.decode(bytes(_read_checked(store, key, status, where)), where=where)
    except (FormatError, IntegrityError):
        pass
    except StoreError as error:
        if error.transient:
            raise
    return None


def committed_backups(store: Store) -> dict[str, list[StoredObject]]:
    """Return the objects of every committed backup, by id, oldest first."""
    objects: dict[str, list[StoredObject]] = {}
    committed = set()
    for entry in store.list():
        name = names.parse_key(entry.key)
        if name is not None:
            objects.setdefault(name.id, []).append(entry)
            if name.kind == "manifest":
                committed.add(name.id)
    return {backup: objects[backup] for backup in sorted(committed)}


def find_backup(store: Store, when: When) -> str:
    """Return the id that ``@WHEN`` means.

    Raises:
        BackupNotFoundError: nothing fits, with what there is instead.
    """
    committed = [] if when.id is not None else list(committed_backups(store))
    if when.id is not None and is_committed(store, when.id):
        return when.id
    chosen = select_backup(committed, when)
    if chosen is None:
        committed = committed or list(committed_backups(store))
        if not committed:
            raise BackupNotFoundError(
                f"There is no backup in {store.url}",
                "the series holds no committed backup",
                "Check the path; a series that was never pushed to looks the same as a wrong name.",
            )
        raise BackupNotFoundError(
            f"There is no such backup in {store.url}",
            f"it holds {len(committed)}, from {committed[0]} to {committed[-1]}",
            _LIST,
        )
    return chosen


_LIST = "Choose one that backhaul list shows."
