"""Holds on backups: prune leaves a backup alone while a record beside it says so."""

from __future__ import annotations

import contextlib
import datetime as dt
import getpass
import os
import socket
from collections.abc import Callable

from backhaul.errors import BackupNotFoundError, PreconditionError, UsageError
from backhaul.formats import hold as hold_format
from backhaul.model.backup_hold import BackupHold
from backhaul.operations import series
from backhaul.operations.places import reference_at
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.digest import crc64nvme

# Names of records have seconds: whoever sets holds faster than that takes the next free one.
_MOST_TRIES = 60


def hold_backup(
    reference: str,
    *,
    length: float | None,
    reason: str,
    patience: float = DEFAULT_PATIENCE,
    now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
) -> BackupHold:
    """Keep a backup from being pruned. Holds add up: it is free when the last one has ended or was released.

    Args:
        reference: ``SERIES[@WHEN]``.
        length: seconds that it lasts; None until it is released.
        reason: why, for whoever wants to prune it.
        patience: seconds for which a store that is ill or away is tried again.
        now: the clock.

    Returns:
        The hold as it was written beside the backup.

    Raises:
        UsageError: a length that is over at once.
        BackupNotFoundError: there is no such backup, or it was pruned at this very moment.
        StoreError: the record could not be written.
    """
    if length is not None and length <= 0:
        raise UsageError(
            "The hold would be over at once", f"it lasts {length:g} seconds", "Name a longer one, or none: without end."
        )
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(patience))
    with contextlib.closing(store):
        backup = series.find_backup(store, when)
        since = now().astimezone(dt.UTC).replace(microsecond=0)
        try:
            until = _iso(since + dt.timedelta(seconds=length)) if length is not None else None
        except OverflowError as error:
            raise UsageError(
                "The hold would last beyond the calendar", str(error), "Leave its length out: without end."
            ) from error
        hold = BackupHold(
            format=hold_format.FORMAT,
            version=hold_format.VERSION,
            id=backup,
            since=_iso(since),
            until=until,
            reason=reason,
            by=_user(),
            host=socket.gethostname(),
        )
        body = hold_format.encode(hold)
        key = _put_beside(store, backup, since, body)
        # Looked at only now: prune, which looks for holds before it takes a manifest, may have been faster.
        if not series.is_committed(store, backup):
            store.delete(key)
            raise BackupNotFoundError(
                f"There is no backup {backup} in {location.text} any more",
                "it was removed while the hold was set",
                "Choose one that backhaul list shows.",
            )
        return hold


def _put_beside(store: Store, backup: str, since: dt.datetime, body: bytes) -> str:
    """Write a record under the first name that is free, and return its key."""
    for seconds in range(_MOST_TRIES):
        key = hold_format.hold_key(backup, since + dt.timedelta(seconds=seconds))
        # Never locked by the store's settings: it must be possible to release it.
        with contextlib.suppress(PreconditionError):
            store.put(key, body, crc64nvme(body), if_absent=True, kind="working")
            return key
    raise PreconditionError(
        f"No name is free for a hold on {backup}", f"{_MOST_TRIES} were set just now", "Try again in a minute."
    )


def release_backup(reference: str, *, patience: float = DEFAULT_PATIENCE) -> int:
    """Take all holds off a backup, those that have ended and those that can't be read too; return how many there were.

    Args:
        reference: ``SERIES[@WHEN]``.
        patience: seconds for which a store that is ill or away is tried again.

    Raises:
        BackupNotFoundError: there is no such backup.
        StoreError: a record could not be removed.
    """
    location, when = reference_at(reference)
    store = open_store(location, policy=RetryPolicy(patience))
    with contextlib.closing(store):
        keys = series.hold_keys(store, series.find_backup(store, when))
        for key in keys:
            store.delete(key)
        return len(keys)


def _iso(time: dt.datetime) -> str:
    return time.isoformat(timespec="seconds").replace("+00:00", "Z")


def _user() -> str:
    try:
        return os.environ.get("SUDO_USER") or getpass.getuser()
    except (KeyError, OSError):  # an account without a name
        return str(os.getuid())
