"""plan: what a mirror run would do, and why, as a file; approved by the guard or not.

``planning.mirror_diff`` says what has changed; here it is found out what that costs: whether the content is in the
mirror already under another name, or most of it in pieces. Files are read for that, objects never.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterator

import msgspec

from backhaul.errors import UsageError
from backhaul.formats import catalog
from backhaul.formats.file_names import shown
from backhaul.formats.mirror_plan import PlanHead, PlanTail, PlanWriter
from backhaul.model.mirror import (
    DELTA,
    FILE,
    FORGET,
    RECORD,
    RECYCLE,
    RENAME,
    REPLACE,
    SKIP,
    SYMLINK,
    TOMBSTONE,
    UNREADABLE,
    UPLOAD,
    Action,
    Entry,
    LocalFile,
    MirrorRecord,
    Totals,
)
from backhaul.model.objects import StoredObject
from backhaul.operations.mirror.content import SMALLEST_WITH_CHUNKS, ChangedError, ContentReader
from backhaul.operations.mirror.listing import listing
from backhaul.operations.mirror.records import Records, iso, new_id
from backhaul.operations.mirror.state import Content, MirrorState
from backhaul.pipeline.supervisor import Supervisor
from backhaul.planning import delta
from backhaul.planning.guard import MaxDelete, judge
from backhaul.planning.mirror_diff import (
    CHECK,
    COMPARE_MTIME,
    COMPARE_SIZE,
    COMPARISONS,
    Change,
    Rules,
    diff,
    in_order,
    old_enough,
)
from backhaul.sources.tree import Tree
from backhaul.stores.base import COPY_LIMIT, Store
from backhaul.stores.local import OWN_NAMES
from backhaul.stores.multipart import multipart_etag
from backhaul.transforms.digest import encode_crc64nvme

# Parts of what is sent; larger ones where a file would have too many.
PART_SIZE = 16 << 20
# Sending less than this is as quick as having it copied.
_SMALLEST_COPY = 32 << 10
# Names that a refusal says.
_NAMES_SAID = 10_000


class PlanOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to compare, and what the guard allows.

    Attributes:
        compare: ``size``, ``mtime`` (with size) or ``md5`` (the content).
        recycle_after: seconds after which what is gone is deleted for good; None for never.
        max_delete: what the guard lets pass.
        exclude: patterns of names that are left alone, here and there.
        sentinel: a file that must be in the directory.
        accept_source: the source may be another one than last time.
        allow_empty: the source may be empty.
        anew: begin a second copy beside the one that is there.
        overwrite: objects that a new mirror did not write may be replaced.
    """

    compare: str = COMPARE_MTIME
    recycle_after: float | None = None
    max_delete: MaxDelete = MaxDelete()
    exclude: tuple[str, ...] = ()
    sentinel: str | None = None
    accept_source: bool = False
    allow_empty: bool = False
    anew: bool = False
    overwrite: bool = False


def part_size_for(size: int, store: Store) -> int:
    """Return the size of the parts of a file that is sent."""
    limits = store.profile.limits
    layout = store.parts(size).layout
    return max(limits.min_part, min(PART_SIZE, layout.largest), -(-size // limits.max_parts))


class Planner:
    """Makes one plan.

    Args:
        tree: the directory.
        store: the mirror.
        records: loaded.
        state: of this mirror.
        group: whose threads list, and whose stop ends the planning.
        options: how.
        now: the time (aware).
        ended: whether the window has ended: nothing is looked into any more then.
    """

    def __init__(
        self,
        tree: Tree,
        store: Store,
        records: Records,
        state: MirrorState,
        group: Supervisor,
        options: PlanOptions,
        now: dt.datetime,
        ended: Callable[[], bool] = lambda: False,
    ) -> None:
        sentinel = options.sentinel
        if sentinel is not None and (sentinel.startswith("/") or set(sentinel.split("/")) & {"", ".", ".."}):
            raise UsageError(
                f"{sentinel!r} is no sentinel",
                "it is a file's name within the directory",
                "Write e.g. --sentinel .mounted",
            )
        if options.compare not in COMPARISONS:
            raise UsageError(f"{options.compare!r} is no comparison", "known are " + ", ".join(COMPARISONS), "")
        self._tree = tree
        self._store = store
        self._records = records
        self._state = state
        self._group = group
        self._options = options
        self._now = now
        self._ended = ended
        self.reader = ContentReader(tree, state, check=group.check)
        self.totals = Totals()
        self._deletes: list[str] = []
        self._first_names: dict[tuple[int, int], str] = {}
        self._fresh = records.record is None
        self._objects_of: dict[str, Entry | None] = {}
        self._signatures_loaded = False

    def head(self, place: str, mirror: str, host: str) -> PlanHead:
        """Return the plan's head."""
        record = self._records.record
        return PlanHead(
            id=new_id(),
            made=iso(self._now),
            directory=self._tree.path,
            mirror=mirror,
            place=place,
            root=self._root(record),
            source=self._tree.record(host),
            record=record,
            options={
                "compare": self._options.compare,
                "recycle_after": self._options.recycle_after,
            },
            exclude=self._options.exclude,
        )

    def _root(self, record: MirrorRecord | None) -> str:
        if record is None:
            return ""
        if record.building is not None:
            return record.building.root
        if not self._options.anew:
            return record.root
        plain_is_free = record.root and not self._state.holds_plain_files(catalog.DIRECTORY)
        return "" if plain_is_free else f"{catalog.COPIES}{self._now.astimezone(dt.UTC):%Y%m%dT%H%M%SZ}/"

    def write(self, writer: PlanWriter, head: PlanHead, prefix: str) -> PlanTail:
        """Compare everything, write the actions, have the guard judge, write the tail and return it.

        Raises:
            SourceError: the directory can't be read.
            StoreError: the store can't be read.
        """
        options, order = self._options, self._records.order
        rules = Rules(
            compare=options.compare,
            recycle_after=options.recycle_after,
            now=self._now,
            order=order,
            root=head.root,
            prefix=prefix,
            unsafe_names=self._store.profile.unsafe_names,
            own_names=OWN_NAMES if self._store.profile.name == "local" else "",
            created=head.record.created if head.record is not None else "",
            exclude=options.exclude,
        )
        self._root_now = head.root
        skip = len(head.root)
        known = ((place, _relative(entry, skip)) for place, entry in self._known(head.root, order))
        stored = in_order(
            listing(self._store, self._state, head.root, self._group), order, self._store.url, strip=head.root
        )
        for change in diff(self._tree.scan(order), known, stored, rules, self.totals):
            self._group.check()
            for action in self._resolved(change):
                self._add(writer, action)
        self._retired(writer, head, rules)
        record = head.record
        before = record.mounts if record is not None else {}
        tail = PlanTail(
            totals=self.totals,
            refusals=judge(
                self._tree.name,
                self.totals,
                self._deletes,
                options.max_delete,
                record=record,
                source=head.source,
                sentinel_missing=options.sentinel or "" if self._sentinel_missing() else "",
                vanished_mounts=[path for path, kind in sorted(before.items()) if self._tree.mounts.get(path) != kind]
                if not options.accept_source
                else (),
                accept_source=options.accept_source,
                allow_empty=options.allow_empty,
                counts_live=self._counting_copy(record, head.root),
                records_lost=self._records.lost,
                overwrite=options.overwrite,
            ),
            mounts=self._tree.mounts,
        )
        writer.finish(tail)
        return tail

    def _sentinel_missing(self) -> bool:
        return self._options.sentinel is not None and self._tree.look(self._options.sentinel) is None

    def _known(self, root: str, order: str) -> Iterator[tuple[bytes, Entry]]:
        for place, entry in self._state.entries(root, order):
            if root or not entry.key.startswith(catalog.DIRECTORY):
                yield place, entry

    def _counting_copy(self, record: MirrorRecord | None, root: str) -> int | None:
        """Return how many files the copy that counts has, while another one is built; None else."""
        if record is None or record.root == root:
            return None
        return sum(entry.kind == FILE and not entry.gone for _, entry in self._known(record.root, self._records.order))

    def _retired(self, writer: PlanWriter, head: PlanHead, rules: Rules) -> None:
        """Recycle what is left of older copies. (Conditional deletes tell whether they are still the same.)"""
        record = head.record
        if record is None or record.building is not None or head.root != record.root:
            return
        for entry in self._state.tombstones():
            older = entry.key.startswith(catalog.COPIES) if not record.root else not entry.key.startswith(record.root)
            if not older:
                continue
            if not old_enough(entry.gone, rules):
                self.totals.waiting.add(entry.size)
                continue
            reason = f"an older copy, replaced on {entry.gone}"
            action = Action(
                kind=RECYCLE, key=entry.key, reason=reason, size=entry.size, etag=entry.etag, gone=entry.gone
            )
            self.totals.retired.add(entry.size)
            writer.add(msgspec.structs.replace(action, source="/"))

    def _add(self, writer: PlanWriter, action: Action) -> None:
        totals = self.totals
        if action.kind == KEEP:
            totals.kept.add(action.size)
            return
        totals.of(action.kind).add(action.size)
        totals.to_send += action.sent
        totals.problems += action.problem
        if action.kind in (TOMBSTONE, RECYCLE) and len(self._deletes) < _NAMES_SAID:
            self._deletes.append(action.key)
        writer.add(action)

    # -- what a change costs -----------------------------------------------------------------------------

    def _resolved(self, change: Change) -> Iterator[Action]:
        file, known, thing = change.local, change.known, change.stored
        if change.kind == SKIP:
            size = file.identity.size if file is not None else 0
            unsafe = file is None or file.kind == UNREADABLE or file.detail.startswith("unreadable")
            name = shown(change.key)
            yield Action(kind=SKIP, key=name, reason=change.reason, size=size, problem=True, unsafe=unsafe)
        elif file is None:
            size = known.size if known is not None else 0
            etag = thing.etag or "" if thing is not None else ""
            gone = known.gone if known is not None else ""
            kind = known.kind if known is not None else FILE
            entry = known if change.kind == FORGET and kind != FILE else None
            yield Action(
                kind=change.kind, key=change.key, reason=change.reason, size=size, etag=etag, gone=gone, entry=entry
            )
        elif file.kind != FILE:
            target = file.detail if file.kind == SYMLINK else ""
            entry = Entry(key=file.key, kind=file.kind, target=target, mode=file.mode, uid=file.uid, gid=file.gid)
            yield Action(kind=RECORD, key=change.key, reason=change.reason, entry=entry)
        else:
            yield self._content_action(change, file)

    def _content_action(self, change: Change, file: LocalFile) -> Action:
        for last in (False, True):
            try:
                return self._decide(change, file)
            except ChangedError:
                seen = self._tree.look(file.key)
                if last or seen is None or seen.kind != FILE:
                    break
                file = seen
            except OSError as error:
                why = f"it can't be read: {error.strerror or error}"
                return _skip(file, why)
        return _skip(file, "it changed while it was read")

    def _decide(self, change: Change, file: LocalFile) -> Action:
        known, thing = change.known, change.stored
        if change.kind == RECORD and known is not None:
            return self._record(file, known, change.reason)
        if change.kind == CHECK and known is not None and known.blake3 and known.size == file.identity.size:
            if self.reader.content(file).blake3 == known.blake3:
                same = (known.mode, known.uid, known.gid) == (file.mode, file.uid, file.gid)
                if known.modified == file.identity.modified and same and not known.gone:
                    return self._kept(file)
                return self._record(file, known, "its content is as it was")
        elif change.kind == CHECK and thing is not None:
            found = self._adopted(file, thing)
            if found is not None:
                return self._record(file, found, "the object there is this very file")
        if file.identity.size > self._store.profile.limits.max_object:
            return _skip(file, "it is larger than the largest object of the store")
        kind = UPLOAD if thing is None else REPLACE
        reason = change.reason
        if change.kind == CHECK and known is None:
            reason += ", and was not found to be this file"
            self.totals.unknown.add(file.identity.size)
        plain = Action(
            kind=kind,
            key=file.key,
            reason=reason,
            size=file.identity.size,
            sent=file.identity.size,
            identity=file.identity,
            etag=thing.etag or "" if thing is not None else "",
        )
        return self._cheaper(file, plain) or plain

    def _kept(self, file: LocalFile) -> Action:
        return Action(kind=KEEP, key=file.key, reason="as it was", size=file.identity.size)

    def _record(self, file: LocalFile, known: Entry, reason: str) -> Action:
        entry = msgspec.structs.replace(
            known,
            modified=file.identity.modified,
            mode=file.mode,
            uid=file.uid,
            gid=file.gid,
            xattrs=self._xattrs(file),
            gone="",
        )
        return Action(kind=RECORD, key=file.key, reason=reason, size=known.size, identity=file.identity, entry=entry)

    def _xattrs(self, file: LocalFile) -> dict[str, str]:
        with self._tree.open(file.key) as opened:
            return opened.xattrs()

    def _adopted(self, file: LocalFile, thing: StoredObject) -> Entry | None:
        """Return what is to be known of an object that is this very file, if that can be told without reading it."""
        size = file.identity.size
        if thing.size != size:
            return None
        entry = Entry(
            key=file.key, size=size, modified=file.identity.modified, etag=thing.etag or "", sparse=_is_sparse(file)
        )
        if self._options.compare == COMPARE_SIZE:
            return entry
        found = self._store.stat(self._root_now + file.key)
        if found is None or found.etag != thing.etag:
            return None
        if found.checksum is not None:
            content = self.reader.content(file, chunks=True)
            same = found.checksum == f"CRC64NVME:{encode_crc64nvme(content.crc64nvme)}"
            return _with_content(entry, content) if same else None
        etag = (found.etag or "").strip('"')
        if self._store.profile.md5_etags and len(etag) == 32:
            content = self.reader.content(file, md5=True, chunks=True)
            return _with_content(entry, content) if content.md5 == etag else None
        parked = self._state.parked(self._root_now + file.key)
        if parked is not None and parked[1].identity == file.identity:
            parts = self._state.parts(parked[0].key)
            ours = len(parts) == len(parked[1].parts) and sum(part.size for part in parts.values()) == size
            if ours and multipart_etag([parts[number] for number in sorted(parts)]).strip('"') == etag:
                return _with_content(entry, self.reader.content(file, chunks=True))
        mtime = found.metadata.get(MTIME)
        if self._options.compare == COMPARE_MTIME and mtime is not None:
            return entry if mtime == encode_mtime(file.identity.modified) else None
        return None

    def _cheaper(self, file: LocalFile, plain: Action) -> Action | None:
        """Return a way that sends less: the content is there under another name, or in pieces."""
        size, state = plain.size, self._state
        if file.links > 1 and plain.kind == UPLOAD:
            place = (file.identity.device, file.identity.inode)
            first = self._first_names.setdefault(place, file.key)
            if first != file.key and size <= COPY_LIMIT:
                return msgspec.structs.replace(
                    plain,
                    kind=RENAME,
                    reason=f"the same file as {first} (hard link)",
                    sent=0,
                    source=first,
                    source_size=size,
                )
        if self._fresh or self._ended():
            return None
        if not self._store.profile.part_copies and self._store.profile.name != "local":
            return None
        if size >= _SMALLEST_COPY and state.with_size(size, self._root_now):
            content = self.reader.content(file, chunks=True)
            for entry in state.with_content(content.blake3, self._root_now):
                if entry.key == self._root_now + file.key or entry.size != size:
                    continue
                if size <= COPY_LIMIT and plain.kind == UPLOAD:
                    here = self._tree.look(entry.key[len(self._root_now) :]) is not None
                    name = entry.key[len(self._root_now) :]
                    return msgspec.structs.replace(
                        plain,
                        kind=RENAME,
                        reason=f"the same content as {name}" if here else f"it was {name}",
                        sent=0,
                        source=entry.key,
                        source_etag=entry.etag,
                        source_size=size,
                    )
                if self._store.profile.part_copies:
                    run = delta.Run(0, size, entry.key, entry.etag, 0)
                    return self._composed(plain, [run], f"the same content as {entry.key}")
        if size >= SMALLEST_WITH_CHUNKS and self._store.profile.part_copies and self._has_chunks():
            content = self.reader.content(file, chunks=True)
            return self._composed(plain, list(self._runs(content)), "changed inside")
        return None

    def _has_chunks(self) -> bool:
        if not self._signatures_loaded:
            self._records.load_signatures()
            self._signatures_loaded = True
        return self._state.has_chunks()

    def _composed(self, plain: Action, runs: list[delta.Run], words: str) -> Action | None:
        part_size = part_size_for(plain.size, self._store)
        parts = delta.compose(runs, plain.size, self._store.profile.limits, part_size)
        if parts is None:
            return None
        sent = delta.to_send(parts)
        reason = f"{plain.reason}; {words}" if words != "changed inside" else plain.reason
        return msgspec.structs.replace(plain, kind=DELTA, reason=reason, sent=sent, parts=parts)

    def _runs(self, content: Content) -> Iterator[delta.Run]:
        """Yield the file's chunks, each with an object that holds it; neighbours from the same one if possible."""
        signature = self._state.signature(content.blake3)
        assert signature is not None
        source, source_end = "", 0
        for offset, length, name in signature.chunks():
            places = [
                (entry, at)
                for digest, at in self._state.places_of_chunk(name, length)
                if (entry := self._object_of(digest)) is not None
            ]
            going_on = [(entry, at) for entry, at in places if entry.key == source and at == source_end]
            if not places:
                source = ""
                yield delta.Run(offset, length)
                continue
            entry, at = (going_on or places)[0]
            source, source_end = entry.key, at + length
            yield delta.Run(offset, length, entry.key, entry.etag, at)

    def _object_of(self, digest: str) -> Entry | None:
        """Return an object of this copy with that content."""
        if digest not in self._objects_of:
            self._objects_of[digest] = next(iter(self._state.with_content(digest, self._root_now)), None)
        return self._objects_of[digest]


# rclone's name for it, so that it shows the files' own times, too: seconds, a point, nine digits.
MTIME = "mtime"
# Counted, not written: what turned out to be as it was when it was looked into.
KEEP = "keep"


def encode_mtime(nanoseconds: int) -> str:
    """Return a file's time as the objects' metadata have it."""
    seconds, rest = divmod(nanoseconds, 10**9)
    return f"{seconds}.{rest:09d}"


def entry_of(file: LocalFile, key: str, etag: str, content: Content | None, xattrs: dict[str, str]) -> Entry:
    """Return what is to be known of a file that was sent."""
    return Entry(
        key=key,
        size=file.identity.size,
        modified=file.identity.modified,
        etag=etag,
        blake3=content.blake3 if content is not None else "",
        crc64nvme=content.crc64nvme if content is not None else None,
        mode=file.mode,
        uid=file.uid,
        gid=file.gid,
        xattrs=xattrs,
        sparse=_is_sparse(file),
        same_file=f"{file.identity.device}:{file.identity.inode}" if file.links > 1 else "",
    )


def _is_sparse(file: LocalFile) -> bool:
    return file.allocated + 4096 < file.identity.size


def _with_content(entry: Entry, content: Content) -> Entry:
    return msgspec.structs.replace(entry, blake3=content.blake3, crc64nvme=content.crc64nvme)


def _relative(entry: Entry, skip: int) -> Entry:
    return msgspec.structs.replace(entry, key=entry.key[skip:]) if skip else entry


def _skip(file: LocalFile, reason: str) -> Action:
    return Action(kind=SKIP, key=file.key, reason=reason, size=file.identity.size, problem=True, unsafe=True)
