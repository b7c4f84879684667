"""What a mirror run has to do: the tree, what the mirror knows and what the store lists, walked side by side.

All three come sorted by the same order (``formats.listing.place``) and are seen once, so that memory does not grow
with the mirror. The rules, for a name that is a file:

======  ======  =======  ============================================================================
here    known   stored
======  ======  =======  ============================================================================
yes     yes     as known keep, if size (and time, or content) are as known; else replace
yes     yes     another  replace: somebody else wrote there
yes     yes     no       upload: the store has lost it
yes     no      yes      check: it may be this very file (a run that died, another tool); else replace
yes     no      no       upload
no      yes     as known tombstone; one that is old enough: recycle
no      yes     another  tombstone; never recycled
no      yes     no       forget
no      no      yes      left alone: not the mirror's
======  ======  =======  ============================================================================
"""

from __future__ import annotations

import datetime as dt
import re
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from functools import lru_cache

import msgspec

from backhaul.errors import StoreError
from backhaul.formats.file_names import is_text
from backhaul.formats.listing import place
from backhaul.model.mirror import (
    DIRECTORY,
    FILE,
    FORGET,
    RECORD,
    RECYCLE,
    REPLACE,
    SKIP,
    SPECIAL,
    SYMLINK,
    TOMBSTONE,
    UNREADABLE,
    UPLOAD,
    Entry,
    LocalFile,
    Totals,
)
from backhaul.model.objects import StoredObject

COMPARE_SIZE, COMPARE_MTIME, COMPARE_MD5 = "size", "mtime", "md5"
COMPARISONS = (COMPARE_SIZE, COMPARE_MTIME, COMPARE_MD5)
# What only looking into the file can decide.
CHECK = "check"
RECORDS = ".backhaul"
# S3's limit on a key, in bytes.
_LONGEST_KEY = 1024


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How to compare, and what to do with what is gone.

    Attributes:
        compare: ``size``, ``mtime`` or ``md5``.
        recycle_after: seconds after which what is gone is deleted; None for never.
        now: the time (aware, UTC).
        order: in which the store lists.
        root: the prefix of the copy.
        prefix: the mirror's own prefix in its bucket, for the length of keys.
        unsafe_names: characters that the store does not keep.
        own_names: a pattern (re) of names that the store keeps for itself; empty for none.
        created: when the mirror was made; what is gone since before that has a date that can't be right.
        exclude: patterns of names that are not looked at, here or there.
    """

    compare: str = COMPARE_MTIME
    recycle_after: float | None = None
    now: dt.datetime
    order: str
    root: str = ""
    prefix: str = ""
    unsafe_names: str = ""
    own_names: str = ""
    created: str = ""
    exclude: tuple[str, ...] = ()


class Change(msgspec.Struct, frozen=True, gc=False):
    """One name whose state has to change, or can't be had. ``kind`` is an action's, or ``check``."""

    kind: str
    key: str
    reason: str
    local: LocalFile | None = None
    known: Entry | None = None
    stored: StoredObject | None = None
    problem: bool = False


def sort_key(key: str, kind: str, order: str) -> bytes:
    """Return what a name compares by: directories and symlinks have places that no file's name can have."""
    suffix = "/" if kind in (DIRECTORY, UNREADABLE) else "//" if kind == SYMLINK else ""
    return place(key + suffix, order)


def excluded(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Return whether a key is excluded: its name, its path, or a directory above it fits a pattern (as the shell's)."""
    if not patterns:
        return lambda key: False

    @lru_cache(4096)
    def directory(path: str) -> bool:
        parent, _, name = path.rpartition("/")
        if any(fnmatchcase(name, pattern) or fnmatchcase(path, pattern.rstrip("/")) for pattern in patterns):
            return True
        return bool(parent) and directory(parent)

    def check(key: str) -> bool:
        return directory(key)

    return check


def name_problem(key: str, rules: Rules) -> str:
    """Return why a name can't be a mirrored object's, or nothing."""
    if not is_text(key):
        return "its name is not UTF-8, which S3 demands of keys"
    if key == RECORDS or key.startswith(f"{RECORDS}/"):
        return f"{RECORDS} is where the mirror keeps its own records"
    length = len(key.encode()) + len((rules.prefix + rules.root).encode())
    if length > _LONGEST_KEY:
        return f"its key would have {length} bytes, and S3 takes {_LONGEST_KEY}"
    unsafe = [character for character in rules.unsafe_names if character in key]
    if unsafe:
        return f"its name holds {unsafe[0]!r}, which the store does not keep"
    if rules.own_names and re.search(rules.own_names, key):
        return "its name is one that the store uses for files in the making"
    return ""


def in_order(
    objects: Iterator[StoredObject], order: str, url: str, *, strip: str = ""
) -> Iterator[tuple[bytes, StoredObject]]:
    """Yield objects with their places; the copy's prefix is taken off the keys.

    Raises:
        StoreError: they do not come in the order that was promised.
    """
    last = b""
    for entry in objects:
        key = entry.key[len(strip) :]
        if not strip and (key.startswith(f"{RECORDS}/") or key == RECORDS):
            continue
        here = place(key, order)
        if here <= last:
            raise StoreError(
                f"{url} lists its objects in another order than was expected",
                f"{key!r} came behind one that it belongs before",
                "Name the provider as it is (provider=NAME); backhaul doctor tells which it is.",
            )
        last = here
        yield here, entry


def diff(
    local: Iterator[tuple[bytes, LocalFile]],
    known: Iterator[tuple[bytes, Entry]],
    stored: Iterator[tuple[bytes, StoredObject]],
    rules: Rules,
    totals: Totals,
) -> Iterator[Change]:
    """Yield what has to change, in order; what can stay is only counted.

    Keys of entries and objects are relative to the copy's root, as those of the tree are.
    """
    is_excluded = excluded(rules.exclude)
    end = b"\xff" * 5000  # behind every name: paths have 4,096 bytes at most
    none: tuple[bytes, None] = (end, None)
    here_place, here = next(local, none)
    known_place, entry = next(known, none)
    stored_place, found = next(stored, none)
    hidden: bytes | None = None  # the place of a directory that could not be read
    mtime, size_only = rules.compare == COMPARE_MTIME, rules.compare == COMPARE_SIZE
    kept, counted_local, live = totals.kept, totals.local, totals.live
    while here is not None or entry is not None or found is not None:
        at = min(here_place, known_place, stored_place)
        file, record, thing = None, None, None
        if here_place == at:
            file = here
            here_place, here = next(local, none)
        if known_place == at:
            record = entry
            known_place, entry = next(known, none)
        if stored_place == at:
            thing = found
            stored_place, found = next(stored, none)
        if record is not None and record.kind == FILE and not record.gone:
            live.add(record.size)
        if rules.exclude:
            key = file.key if file is not None else record.key if record is not None else thing.key if thing else ""
            if is_excluded(key):
                if file is not None and file.kind == FILE:
                    totals.excluded.add(file.identity.size)
                continue
        if file is not None and file.kind == FILE:
            counted_local.add(file.identity.size)
            # By far the most frequent case, and so the first one.
            if (
                record is not None
                and thing is not None
                and record.etag == thing.etag
                and record.size == file.identity.size == thing.size
                and ((mtime and record.modified == file.identity.modified) or size_only)
                and not record.gone
                and record.mode == file.mode
                and record.uid == file.uid
                and record.gid == file.gid
            ):
                kept.add(record.size)
                continue
        if file is not None:
            if file.kind == UNREADABLE:
                hidden = at
            yield from _present(file, record, thing, rules, kept)
        elif hidden is not None and at.startswith(hidden):
            if record is not None and record.kind == FILE:
                totals.unreadable.add(record.size)
        elif record is not None:
            yield from _absent(record, thing, rules, totals)
        elif thing is not None:
            totals.foreign.add(thing.size)


def _present(
    file: LocalFile, record: Entry | None, thing: StoredObject | None, rules: Rules, kept: object
) -> Iterator[Change]:
    key = file.key
    if file.kind == UNREADABLE:
        yield Change(SKIP, key, f"it can't be read: {file.detail}", file, record, thing, problem=True)
        return
    if file.kind == SPECIAL:
        yield Change(SKIP, key, f"it is {file.detail}, and has no content to mirror", file, record, thing, problem=True)
        return
    problem = name_problem(key, rules)
    if problem:
        yield Change(SKIP, key, problem, file, record, thing, problem=True)
        return
    if file.kind != FILE:
        if not is_text(file.detail):
            yield Change(SKIP, key, "its target is not UTF-8, as the mirror's records are", file, problem=True)
            return
        if record is None or record.gone or not _same_attributes(file, record) or record.target != file.detail:
            words = "a symlink" if file.kind == SYMLINK else "a directory"
            yield Change(RECORD, key, f"{words}, kept in the mirror's records", file, record)
        return
    size = file.identity.size
    if record is None:
        if thing is None:
            yield Change(UPLOAD, key, "new", file)
        else:
            yield Change(CHECK, key, "there is an object of that name that is not known", file, None, thing)
    elif thing is None:
        yield Change(UPLOAD, key, "the store has lost it", file, record)
    elif record.etag != thing.etag:
        yield Change(CHECK, key, "the object is another one than was put there", file, None, thing)
    elif record.size != size:
        yield Change(REPLACE, key, f"its size was {record.size}", file, record, thing)
    elif rules.compare == COMPARE_MTIME and record.modified != file.identity.modified:
        yield Change(CHECK, key, "it was written to since", file, record, thing)
    elif rules.compare == COMPARE_MD5:
        yield Change(CHECK, key, "its content is compared", file, record, thing)
    elif record.gone:
        yield Change(RECORD, key, "it is back: its tombstone goes", file, record, thing)
    else:
        yield Change(RECORD, key, "its owner or permissions have changed", file, record, thing)


def _same_attributes(file: LocalFile, record: Entry) -> bool:
    return (record.mode, record.uid, record.gid) == (file.mode, file.uid, file.gid)


def _absent(record: Entry, thing: StoredObject | None, rules: Rules, totals: Totals) -> Iterator[Change]:
    key = record.key
    if record.kind != FILE:
        yield Change(FORGET, key, f"the {record.kind} is gone", None, record)
    elif thing is None:
        yield Change(FORGET, key, "gone here, and the store has lost it", None, record)
    elif not record.gone:
        yield Change(TOMBSTONE, key, "gone here", None, record, thing)
    elif record.etag != thing.etag:
        totals.foreign.add(thing.size)
        yield Change(FORGET, key, "gone here, and another object has its name: left alone", None, record)
    elif not old_enough(record.gone, rules):
        totals.waiting.add(record.size)
    else:
        yield Change(RECYCLE, key, f"gone since {record.gone}", None, record, thing)


def old_enough(gone: str, rules: Rules) -> bool:
    """Tell whether what is gone since then is to be deleted; a date that can't be right never deletes anything."""
    if rules.recycle_after is None:
        return False
    try:
        since = dt.datetime.fromisoformat(gone)
        created = dt.datetime.fromisoformat(rules.created) if rules.created else since
        return since >= created and (rules.now - since).total_seconds() >= rules.recycle_after
    except (ValueError, TypeError):
        return False
