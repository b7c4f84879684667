"""verify: is what lies in the store what was pushed? Without reading it, or (deep) by reading all of it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import msgspec

from backhaul.errors import BackhaulError, IntegrityError, ObjectNotFoundError, PreconditionError
from backhaul.formats import names
from backhaul.formats.age_keys import Identity
from backhaul.model.manifest import Manifest, SegmentRecord, StreamRecord
from backhaul.model.results import SAME_OBJECT_CHECKS, Check, VerifyResult
from backhaul.operations import memory, series
from backhaul.operations.encryption import not_encrypted, unlock
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.pull import decoded
from backhaul.operations.reading import StoredStream
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.digest import StreamDigest
from backhaul.transforms.encrypt import StreamKey


def verify(
    reference: str,
    *,
    deep: bool = False,
    workers: int | None = None,
    patience: float = DEFAULT_PATIENCE,
    progress: PullProgress | None = None,
    identities: Sequence[Identity] = (),
) -> VerifyResult:
    """Check one backup.

    Args:
        reference: ``SERIES[@WHEN]``.
        deep: read, decode and hash every byte; else compare what the store says with the manifest.
        workers: threads that fetch (deep); as many decode, at most one a core.
        patience: seconds for which a store that is ill or away is tried again.
        progress: counters to keep up to date (deep).
        identities: for encrypted streams: whose secrets open them (needed for deep), and check the manifest's MAC.

    Returns:
        Every check; ``ok`` is False when any found a problem.

    Raises:
        BackupNotFoundError: there is no such backup.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: its manifest can't be read.
        StoreError: the store could not be asked, so nothing is known.
    """
    clock = time.monotonic()
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(patience))
    counters = progress or PullProgress()
    try:
        backup = series.find_backup(store, when)
        committed = series.read_backup(store, backup)
        manifest = committed.manifest
        checks = [Check(object=f"{backup}/{names.MANIFEST}", check="manifest", state="ok", detail="readable")]
        counters.total = manifest.raw_size
        for record in manifest.streams:
            found = _shallow(store, manifest, record)
            readable = all(check.state != "problem" or check.check in SAME_OBJECT_CHECKS for check in found)
            key = None
            if identities and record.encryption is None:
                raise not_encrypted(f"{store.url}/{names.object_key(backup, record.object)}")
            if record.encryption is not None and not identities and not deep:
                unknown = "its MAC can be checked with --identity only"
                where = names.object_key(backup, names.MANIFEST)
                found.append(Check(object=where, check="authentic", state="unverifiable", detail=unknown))
            if readable and (identities or deep):
                key, authentic = _authentic(store, committed, record, identities)
                found += authentic
                readable = all(check.state == "ok" for check in authentic)
            if deep and readable:
                content = _deep(store, manifest, record, key, workers or 2 * memory.default_workers(), counters)
                if content.state == "ok":
                    found = [_outweighed(check) for check in found]
                found.append(content)
            checks += found
        drills = series.read_drills(store, series.drill_keys(store, backup)[-1:])
    finally:
        store.close()
    return VerifyResult(
        series=location.text,
        id=backup,
        deep=deep,
        checks=tuple(checks),
        bytes_read=counters.stored,
        seconds=time.monotonic() - clock,
        drill=drills[-1] if drills else None,
    )


def _authentic(
    store: Store, backup: series.CommittedBackup, record: StreamRecord, identities: Sequence[Identity]
) -> tuple[StreamKey | None, list[Check]]:
    """Make sure of the manifest with the key of a stream, and return that; nothing where nothing is encrypted."""
    key_of = names.object_key(backup.manifest.id, names.MANIFEST)
    try:
        key = unlock(store, backup, record, identities)
    except IntegrityError as error:
        return None, [Check(object=key_of, check="authentic", state="problem", detail=error.why)]
    if key is None:
        return None, []
    detail = f"its MAC is that of whoever encrypted {record.object}"
    return key, [Check(object=key_of, check="authentic", state="ok", detail=detail)]


def _outweighed(check: Check) -> Check:
    """Return what is left of a check when every byte was read and is right."""
    if check.state != "problem":
        return check
    return msgspec.structs.replace(
        check, state="ok", detail="not the same object as at the commit, but every byte is right"
    )


def _shallow(store: Store, manifest: Manifest, record: StreamRecord) -> list[Check]:
    checks: list[Check] = []
    for segment in record.objects:
        checks += _look(store, names.object_key(manifest.id, segment.object), segment)
    return checks


def _look(store: Store, key: str, record: SegmentRecord) -> list[Check]:
    """Compare one object with what the manifest says of it, as far as the store can be asked."""

    def check(name: str, good: bool, detail: str) -> Check:
        return Check(object=key, check=name, state="ok" if good else "problem", detail=detail)

    found = store.stat(key)
    if found is None:
        return [check("exists", False, "the object is missing")]
    size = record.size
    checks = [
        check("exists", True, f"since {found.modified.isoformat(timespec='seconds')}"),
        check(
            "size",
            found.size == size,
            f"{size} bytes" if found.size == size else f"{found.size} bytes, and {size} were stored",
        ),
    ]
    known = record.store
    if found.modified_ns is not None and known.modified is not None:
        same = found.modified_ns == known.modified
        changed = "the file was written or copied since it was committed"
        return [*checks, check("unchanged", same, "the file was not written since" if same else changed)]
    # The checksum is of the bytes, whoever wrote the object. Where there is none, the ETag tells whether it is the
    # object that was committed.
    ours = f"CRC64NVME:{record.crc64nvme}"
    if found.checksum is not None:
        right = found.checksum == ours
        wrong = "" if right else f", and {ours} was stored: the bytes are others"
        checks.append(check("checksum", right, f"the store holds {found.checksum}{wrong}"))
    if known.etag is not None and found.etag is not None:
        replaced = f", and {known.etag} was stored: the object was replaced"
        if found.checksum == ours:
            replaced = ": written again since, with the same bytes"
        same = found.etag == known.etag
        checks.append(
            check("etag", same or found.checksum == ours, f"the store holds {found.etag}" + replaced * (not same))
        )
    if len(checks) == 2:
        nothing = "the store keeps nothing to compare; use --deep"
        checks.append(Check(object=key, check="checksum", state="unverifiable", detail=nothing))
    return checks


class _StoredDigest:
    """The digest of an object that comes in pieces, in order, of which neighbours may overlap."""

    def __init__(self) -> None:
        self.digest = StreamDigest()

    def feed(self, offset: int, data: memoryview | bytes) -> None:
        assert offset <= self.digest.size
        self.digest.feed(memoryview(data)[self.digest.size - offset :])


def _deep(
    store: Store, manifest: Manifest, record: StreamRecord, key: StreamKey | None, workers: int, progress: PullProgress
) -> Check:
    """Read all of a stream; once more if something is wrong, since it may be the line and not the store."""
    done = progress.raw
    found = _read_through(store, manifest, record, key, workers, progress)
    if found.state == "problem":
        progress.raw = done
        found = _read_through(store, manifest, record, key, workers, progress)
    return found


def _read_through(
    store: Store, manifest: Manifest, record: StreamRecord, key: StreamKey | None, workers: int, progress: PullProgress
) -> Check:
    where = names.object_key(manifest.id, record.objects[0].object)
    raw, stored = StreamDigest(crc=False), _StoredDigest()
    try:
        stream = StoredStream(store, manifest, record, key)
        stored.feed(0, stream.head)
        with Supervisor("verify") as group:
            for data in decoded(stream, group, workers, progress, on_stored=stored.feed):
                raw.feed(data)
                progress.raw += len(data)
        stored.feed(*stream.tail)
        progress.fetched(len(stream.head) + len(stream.tail[1]))
        stream.check_raw(raw.size, raw.blake3)
        digest = stored.digest
        if (digest.size, digest.blake3) != (record.stored.size, record.stored.blake3):
            raise stream.damaged(f"its BLAKE3 is {digest.blake3}, and {record.stored.blake3} was stored")
    except (IntegrityError, ObjectNotFoundError, PreconditionError) as error:
        return Check(object=where, check="content", state="problem", detail=_sentence(error))
    return Check(object=where, check="content", state="ok", detail=f"{raw.size} bytes decoded, BLAKE3 {raw.blake3}")


def _sentence(error: BackhaulError) -> str:
    return error.why or error.what
