"""What a mirror is about: files here, objects there, what is known of them, and what is to be done."""

from __future__ import annotations

import msgspec

# What a name in a directory tree can be.
FILE, SYMLINK, DIRECTORY, SPECIAL, UNREADABLE = "file", "symlink", "directory", "special", "unreadable"

# What a plan can do with a name. ``record`` changes only what the mirror knows of it.
UPLOAD, REPLACE, RENAME, DELTA, RECORD = "upload", "replace", "rename", "delta", "record"
TOMBSTONE, RECYCLE, FORGET, SKIP = "tombstone", "recycle", "forget", "skip"
ACTIONS = (UPLOAD, REPLACE, RENAME, DELTA, RECORD, TOMBSTONE, RECYCLE, FORGET, SKIP)
SENDING = (UPLOAD, REPLACE, RENAME, DELTA)


class FileIdentity(msgspec.Struct, frozen=True, order=False):
    """Which file it is, and in which state; times in ns since the epoch. Any difference means: look again."""

    device: int
    inode: int
    size: int
    modified: int
    changed: int


class LocalFile(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A name in the tree, relative to it.

    Attributes:
        key: with ``/`` between segments; bytes that are not UTF-8 as lone surrogates.
        kind: one of the kinds above.
        identity: of what has that name.
        mode, uid, gid: its permissions and owner.
        links: how many names the file has.
        allocated: bytes that it takes on the disk; less than its size where it has holes.
        detail: a symlink's target, or why it can't be read.
    """

    key: str
    kind: str
    identity: FileIdentity
    mode: int = 0
    uid: int = 0
    gid: int = 0
    links: int = 1
    allocated: int = 0
    detail: str = ""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What the mirror knows of a name; a line of its catalog.

    Attributes:
        key: the object's key in the mirror (of a directory or a symlink the name, which no object has).
        kind: ``file``, ``symlink`` or ``directory``.
        size, modified: of the file when it was sent; ns since the epoch.
        etag: of the object that was made.
        blake3: of the content, hex; empty where it was not read.
        crc64nvme: of the content; None where it was not read.
        target: of a symlink.
        mode, uid, gid, xattrs: for the way back; values of extended attributes in base64.
        sparse: whether the file had holes.
        same_file: what all names of one file (hard links) have in common; empty for others.
        gone: since when the name is gone locally (ISO, UTC): the tombstone. Empty while it is there.
        dropped: the mirror knows nothing of the name any more.
    """

    key: str
    kind: str = FILE
    size: int = 0
    modified: int = 0
    etag: str = ""
    blake3: str = ""
    crc64nvme: int | None = None
    target: str = ""
    mode: int = 0o600
    uid: int = 0
    gid: int = 0
    xattrs: dict[str, str] = {}
    sparse: bool = False
    same_file: str = ""
    gone: str = ""
    dropped: bool = False


class PartPlan(msgspec.Struct, frozen=True, omit_defaults=True, gc=False):
    """A part of a composed upload: sent, or copied from ``source`` (an object's key) at ``source_offset``."""

    offset: int
    size: int
    source: str = ""
    source_etag: str = ""
    source_offset: int = 0


class Action(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One thing to do, and why.

    Attributes:
        kind: one of the actions above.
        key: the name, relative to the tree and to the copy.
        reason: for people.
        size: of the file or object.
        sent: bytes that will go over the line for it.
        identity: the local file as it was seen; None where there is none.
        etag: the object as it was seen; empty where there is none.
        source, source_etag, source_size: what is copied to it, by ``rename``. (Of what is recycled, ``/`` says that
            the key is one of an older copy, with its prefix.)
        parts: by ``delta``.
        gone: since when it is gone, of what is recycled.
        problem: whether a skip leaves the mirror incomplete.
        unsafe: whether nothing may be deleted for good by a run that has it.
        entry: what is to be recorded, by ``record``.
    """

    kind: str
    key: str
    reason: str
    size: int = 0
    sent: int = 0
    identity: FileIdentity | None = None
    etag: str = ""
    source: str = ""
    source_etag: str = ""
    source_size: int = 0
    parts: tuple[PartPlan, ...] = ()
    gone: str = ""
    problem: bool = False
    unsafe: bool = False
    entry: Entry | None = None


class SourceRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Where a mirror comes from. ``file_system`` tells an unmounted disk from a mounted one."""

    host: str
    path: str
    file_system: str


class Building(msgspec.Struct, frozen=True, kw_only=True):
    """A second copy in the making: where, and since when (ISO, UTC)."""

    root: str
    since: str


class MirrorRecord(msgspec.Struct, frozen=True, kw_only=True):
    """The mirror's own page, ``.backhaul/mirror.json``.

    Attributes:
        id: random, made with the mirror.
        created: ISO, UTC.
        root: the prefix under which the copy lies that counts; empty but after a start over.
        source: where it comes from.
        building: a second copy in the making.
        finished: when a run last left nothing to be done (ISO, UTC); empty if none did.
        revision: counts the runs that changed anything.
        mounts: file systems below the directory, by path.
        exclude: the patterns of names that the last run left alone.
    """

    id: str
    created: str
    root: str = ""
    source: SourceRecord
    building: Building | None = None
    finished: str = ""
    revision: int = 0
    mounts: dict[str, str] = {}
    exclude: tuple[str, ...] = ()


class Count(msgspec.Struct):
    """How many files, and how many bytes."""

    files: int = 0
    bytes: int = 0

    def add(self, size: int) -> None:
        """Count one more."""
        self.files += 1
        self.bytes += size


class Totals(msgspec.Struct, kw_only=True):
    """What a plan found, in numbers.

    Attributes:
        local: files in the tree.
        live: files that the mirror holds and that were not gone before.
        kept: files that are there as they are.
        waiting: files in the recycler that stay there.
        foreign: objects that are not the mirror's; left alone.
        excluded: files in the tree that are left alone.
        unknown: objects that the mirror did not write and that would be replaced.
        unreadable: files under directories that could not be read; left as they are.
        retired: files of older copies that are due to be deleted.
        actions: by kind; bytes are the files' sizes.
        to_send: bytes that will go over the line.
        problems: skips that leave the mirror incomplete.
    """

    local: Count = msgspec.field(default_factory=Count)
    live: Count = msgspec.field(default_factory=Count)
    kept: Count = msgspec.field(default_factory=Count)
    waiting: Count = msgspec.field(default_factory=Count)
    foreign: Count = msgspec.field(default_factory=Count)
    excluded: Count = msgspec.field(default_factory=Count)
    unknown: Count = msgspec.field(default_factory=Count)
    unreadable: Count = msgspec.field(default_factory=Count)
    retired: Count = msgspec.field(default_factory=Count)
    actions: dict[str, Count] = msgspec.field(default_factory=dict)
    to_send: int = 0
    problems: int = 0

    def of(self, kind: str) -> Count:
        """Return the count of an action."""
        return self.actions.setdefault(kind, Count())


class Refusal(msgspec.Struct, frozen=True):
    """Why the guard does not let a plan pass: what, why, what next; and what it would have deleted, at most some."""

    what: str
    why: str
    todo: str
    deletes: tuple[str, ...] = ()


class PlanSummary(msgspec.Struct, frozen=True, kw_only=True):
    """A plan in numbers. ``path`` is its file; ``bytes_read`` what had to be read of the directory for it."""

    id: str
    directory: str
    mirror: str
    root: str
    totals: Totals
    refusals: tuple[Refusal, ...] = ()
    bytes_read: int = 0
    path: str = ""
    remarks: tuple[str, ...] = ()
