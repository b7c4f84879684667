"""The backup in a store, for a host that came too late for the stream: its manifest, and its streams into targets.

As with what comes live, no target gets its end before all of them have everything.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence

from backhaul.errors import IntegrityError
from backhaul.formats.age_keys import Identity
from backhaul.model.fan_out import ReceivedStream
from backhaul.model.manifest import Manifest
from backhaul.operations import memory, series
from backhaul.operations.encryption import unlock
from backhaul.operations.places import reference_at
from backhaul.operations.progress import PullProgress
from backhaul.operations.pull import feed
from backhaul.operations.reading import StoredStream
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.targets.base import Target


def manifest_of(sent: Sequence[ReceivedStream], reference: str, identities: Sequence[Identity]) -> Manifest:
    """Return the manifest of the backup that was made of what was sent; whoever reads the backup is to insist on it.

    Args:
        sent: the streams.
        reference: where the backup should be: ``SERIES@WHEN``.
        identities: whose secrets open an encrypted backup.

    Raises:
        BackupNotFoundError: there is no such backup.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: it is none, or was made of something else.
        StoreError: the store could not be read.
    """
    location, when = reference_at(reference)
    expected = {stream.name: (stream.size, stream.blake3) for stream in sent}
    with contextlib.closing(open_store(location, policy=RetryPolicy(DEFAULT_PATIENCE))) as store:
        committed = series.read_backup(store, series.find_backup(store, when))
        for record in committed.manifest.streams:
            size, blake3 = expected.pop(record.name, (-1, ""))
            key = unlock(store, committed, record, tuple(identities))
            if (record.raw.size, record.raw.blake3) != (size, key.conceal(blake3) if key is not None else blake3):
                raise _another(reference, f"its stream {record.name} is not the one that was sent")
    if expected:
        raise _another(reference, f"it has no stream {', '.join(expected)}")
    return committed.manifest


def _another(reference: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{reference} is another backup than the one that was sent",
        why,
        "Nothing of it was read. See who else writes to the series, and send again.",
    )


def pull_streams(
    reference: str,
    manifest: Manifest,
    make_target: Callable[[str], Target],
    identities: Sequence[Identity],
    progress: PullProgress,
) -> None:
    """Bring all streams of a backup into targets, one after the other.

    Args:
        reference: ``SERIES@WHEN``.
        manifest: the one that it has to have.
        make_target: gives the target of a stream, by its name; started, and committed or aborted, here.
        identities: whose secrets open an encrypted backup.
        progress: counters to keep up to date.

    Raises:
        BackupNotFoundError: there is no such backup.
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: what is stored is not what was pushed, or has another manifest; no target got its end.
        TargetError: a target has failed.
        StoreError: the store could not be read.
    """
    location, when = reference_at(reference)
    group = Supervisor("pull", grace=2.0)
    policy = RetryPolicy(DEFAULT_PATIENCE, sleep=group.sleep)
    workers = 2 * memory.default_workers()
    with contextlib.closing(open_store(location, policy=policy)) as store:
        committed = series.read_backup(store, series.find_backup(store, when))
        series.insist_on(manifest, committed, reference)
        records = committed.manifest.streams
        progress.total = sum(record.raw.size for record in records)
        targets = []
        with group, contextlib.ExitStack() as stack:
            for record in records:
                key = unlock(store, committed, record, tuple(identities))
                stream = StoredStream(store, committed.manifest, record, key)
                target = make_target(record.name)
                stack.callback(target.abort)
                feed(stream, target, group, workers, progress)
                targets.append(target)
            for target in targets:
                target.commit()
