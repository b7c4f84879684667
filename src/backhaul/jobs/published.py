"""The records of runs beside the backups: history that survives its host, and that another host can judge by."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import msgspec

from backhaul.errors import BackhaulError, FormatError
from backhaul.formats import run_record
from backhaul.formats.catalog import RECORD as MIRROR_RECORD
from backhaul.formats.run_record import RecordName
from backhaul.model.job import JobCard, RunRecord
from backhaul.operations.places import store_at
from backhaul.stores.base import Store
from backhaul.stores.open import open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.digest import crc64nvme

# So many runs of a job are kept in a store; some more lie there between two removals.
KEPT = 500
_SLACK = 50
# Of so many runs a judge looks at the records.
_JUDGED = 60
_PARALLEL = 16


class Published(msgspec.Struct, frozen=True):
    """A job as a store has it: its card, and the records of its last runs, newest first."""

    card: JobCard
    runs: tuple[RunRecord, ...]


def publish(place: str, card: JobCard, record: RunRecord, *, patience: float) -> None:
    """Put a run's record, and the job's card, into a store.

    Args:
        place: STORE.
        card: the job.
        record: of the run, as it is now; its older self is replaced.
        patience: seconds for which a store that is ill or away is tried again.

    Raises:
        BackhaulError: it could not be.
    """
    with _opened(place, patience) as store:
        _put(store, run_record.record_key(card.host, card.name), run_record.encode(card))
        _put(store, run_record.record_key(record.host, record.job, record.id), run_record.encode(record))


def retire(card: JobCard, *, patience: float) -> None:
    """Say in all places of a job that nothing is expected of it any more.

    Raises:
        BackhaulError: a store refuses.
    """
    gone = run_record.encode(msgspec.structs.replace(card, retired=True))
    for place in card.places:
        with _opened(place, patience) as store:
            _put(store, run_record.record_key(card.host, card.name), gone)


def forget_old(place: str, card: JobCard, *, patience: float) -> None:
    """Remove all but the newest records of a job, once there are many more.

    Raises:
        BackhaulError: the store refuses.
    """
    with _opened(place, patience) as store:
        prefix = f"{run_record.DIRECTORY}{card.host}/{card.name}/"
        keys = sorted(
            entry.key for entry in store.list(prefix) if (name := run_record.parse_record_key(entry.key)) and name.run
        )
        if len(keys) > KEPT + _SLACK:
            for key in keys[:-KEPT]:
                store.delete(key)


def read_published(place: str, *, patience: float, on_problem: Callable[[str], None]) -> list[Published]:
    """Return the jobs whose records lie in a store: at its root, or else anywhere below it.

    Args:
        place: STORE.
        patience: seconds for which a store that is ill or away is tried again.
        on_problem: told of each record that can't be read.

    Raises:
        BackhaulError: the store could not be listed.
    """
    with _opened(place, patience) as store:
        found = _named(store, run_record.DIRECTORY)
        # A mirror is all that lies below it; elsewhere there may be jobs of other places, which must not go unheard.
        if not found or store.stat(MIRROR_RECORD) is None:
            found = _named(store, "")
        with ThreadPoolExecutor(_PARALLEL) as pool:

            def read(job: tuple[tuple[str, str, str], dict[str, str]]) -> Published | None:
                _, keys = job
                return _read_job(store, keys, on_problem)

            return [job for job in pool.map(read, sorted(found.items())) if job is not None]


def read_own(place: str, card: JobCard, *, patience: float) -> Sequence[RunRecord]:
    """Return the records that a store has of one job of one host, newest first.

    Raises:
        BackhaulError: the store could not be listed.
    """
    with _opened(place, patience) as store:
        for keys in _named(store, f"{run_record.DIRECTORY}{card.host}/{card.name}/").values():
            found = _read_job(store, keys, lambda problem: None)
            return found.runs if found is not None else ()
    return ()


def _named(store: Store, prefix: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """Return the keys of records by where they lie, host and job; and for each, by run (empty for the card)."""
    found: dict[tuple[str, str, str], dict[str, str]] = {}
    for entry in store.list(prefix):
        name: RecordName | None = run_record.parse_record_key(entry.key)
        if name is not None and entry.size <= run_record.MAX_SIZE:
            root = entry.key.partition(run_record.DIRECTORY)[0]
            found.setdefault((root, name.host, name.job), {})[name.run] = entry.key
    return found


def _read_job(store: Store, keys: dict[str, str], on_problem: Callable[[str], None]) -> Published | None:
    card = None
    runs = []
    newest = sorted((run for run in keys if run), reverse=True)[:_JUDGED]
    for run in ["", *newest] if "" in keys else []:
        try:
            data = _read(store, keys[run])
            if run:
                record = run_record.decode(data, RunRecord, where=f"{store.url}/{keys[run]}")
                _check_place(keys[run], (record.host, record.job, record.id), store)
                runs.append(record)
            else:
                card = run_record.decode(data, JobCard, where=f"{store.url}/{keys[run]}")
                _check_place(keys[run], (card.host, card.name, ""), store)
        except FormatError as error:
            on_problem(f"{error.what}: {error.why}")
        except BackhaulError as error:
            on_problem(f"{store.url}/{keys[run]} can't be read: {error.why or error.what}")
    return Published(card, tuple(runs)) if card is not None else None


def _check_place(key: str, says: tuple[str, str, str], store: Store) -> None:
    """Refuse a record that lies where another one belongs.

    Raises:
        FormatError: it does.
    """
    name = run_record.parse_record_key(key)
    if name is None or (name.host, name.job, name.run) != says:
        raise FormatError(f"{store.url}/{key} is of another job", f"it says {'/'.join(says)}", "It is left as it is.")


def _read(store: Store, key: str) -> bytes:
    found = store.stat(key)
    if found is None:
        raise FormatError(f"{store.url}/{key} is gone", "it was there when the store was listed", "Ask again.")
    content = bytearray(found.size)
    store.read_into(key, 0, memoryview(content), etag=found.etag)
    return bytes(content)


def _put(store: Store, key: str, body: bytes) -> None:
    store.put(key, body, crc64nvme(body), if_absent=False, kind="working")


@contextlib.contextmanager
def _opened(place: str, patience: float) -> Iterator[Store]:
    store = open_store(store_at(place), policy=RetryPolicy(patience))
    try:
        yield store
    finally:
        store.close()
