"""What this host knows of a mirror, in SQLite: a copy of its catalog, hashes of local files, uploads under way.

All of it can be lost: the catalog is read again from the mirror, files are read again, uploads begin anew. What a run
has done is noted here at once, and in the mirror's own catalog a little later; what was noted and not published yet
survives a crash of the program here.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
from blake3 import blake3

from backhaul.errors import ConfigurationError, LockBusyError
from backhaul.formats import signature as signature_format
from backhaul.formats.signature import Signature
from backhaul.model.mirror import Entry, FileIdentity, PartPlan
from backhaul.model.objects import Upload, UploadedPart
from backhaul.operations.journal import STATE_VARIABLE, state_directory
from backhaul.planning.mirror_diff import sort_key

_VERSION = 1
_TABLES = """
CREATE TABLE meta(name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE entries(
    place BLOB PRIMARY KEY, key TEXT, kind TEXT, size INTEGER, modified INTEGER, etag TEXT, blake3 BLOB, crc INTEGER,
    mode INTEGER, uid INTEGER, gid INTEGER, gone TEXT, rest BLOB, changed INTEGER
) WITHOUT ROWID;
CREATE INDEX entries_by_size ON entries(size);
CREATE INDEX entries_by_content ON entries(blake3);
CREATE INDEX entries_gone ON entries(place) WHERE gone != '';
CREATE INDEX entries_changed ON entries(changed) WHERE changed > 0;
CREATE TABLE segments(key TEXT PRIMARY KEY, etag TEXT) WITHOUT ROWID;
CREATE TABLE files(
    device INTEGER, inode INTEGER, size INTEGER, modified INTEGER, changed INTEGER, blake3 BLOB, crc INTEGER, md5 BLOB,
    seen INTEGER, PRIMARY KEY(device, inode, size, modified)
) WITHOUT ROWID;
CREATE TABLE signatures(id INTEGER PRIMARY KEY, blake3 BLOB UNIQUE, published INTEGER, data BLOB);
CREATE TABLE chunks(name BLOB, content INTEGER, at INTEGER, length INTEGER);
CREATE INDEX chunks_by_name ON chunks(name);
CREATE TABLE begun(key TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE uploads(key TEXT PRIMARY KEY, token TEXT, plan BLOB) WITHOUT ROWID;
CREATE TABLE parts(
    key TEXT, number INTEGER, size INTEGER, etag TEXT, crc INTEGER, PRIMARY KEY(key, number)
) WITHOUT ROWID;
"""


class Content(msgspec.Struct, frozen=True):
    """What a file's bytes are: BLAKE3 in hex, CRC64NVME, and the MD5 in hex where it was asked for."""

    blake3: str
    crc64nvme: int
    md5: str = ""


class ParkedUpload(msgspec.Struct, frozen=True):
    """An upload that was begun: of which file, how it is cut, and what it replaces."""

    identity: FileIdentity
    parts: tuple[PartPlan, ...]
    blake3: str = ""


class _Rest(msgspec.Struct, frozen=True, omit_defaults=True):
    target: str = ""
    xattrs: dict[str, str] = {}
    sparse: bool = False
    same_file: str = ""
    dropped: bool = False


_COLUMNS = "key, kind, size, modified, etag, blake3, crc, mode, uid, gid, gone, rest"


class MirrorState:
    """See the module. Thread-safe. ``remark`` says if what was there could not be used.

    Args:
        place: the mirror and the directory, in a form that all their spellings share; None for a state that is
            forgotten at its end.
        text: the mirror as people write it, for messages.

    Raises:
        LockBusyError: another run works on this mirror.
        ConfigurationError: the state directory can't be written.
    """

    def __init__(self, place: str | None, text: str) -> None:
        self.remark: str | None = None
        self._lock = threading.RLock()
        self._descriptor = -1
        self._path: Path | None = None
        if place is not None:
            name = blake3(place.encode(errors="surrogateescape")).hexdigest()[:32]
            self._path = state_directory() / "mirrors" / f"{name}.sqlite"
        try:
            if self._path is not None:
                self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._descriptor = self._take_lock(self._path.with_suffix(".lock"), text)
            self._connection = self._open()
            (self._change,) = self._connection.execute("SELECT COALESCE(MAX(changed), 0) FROM entries").fetchone()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise ConfigurationError(
                f"The state of the mirror {text} can't be kept: {self._path}",
                getattr(error, "strerror", None) or str(error),
                f"Make its directory writable, make room there, or name another with {STATE_VARIABLE}.",
            ) from error

    @staticmethod
    def _take_lock(path: Path, text: str) -> int:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(descriptor)
            raise LockBusyError(
                f"{text} is being worked on already", f"another run holds {path}", "Wait for it to end, or end it."
            ) from error
        return descriptor

    def _open(self) -> sqlite3.Connection:
        if self._path is None:
            return self._prepared(sqlite3.connect("", isolation_level=None, check_same_thread=False))
        try:
            if self._marker.exists():
                raise sqlite3.DatabaseError("found when it was last used")
            return self._prepared(sqlite3.connect(self._path, isolation_level=None, check_same_thread=False))
        except sqlite3.DatabaseError as error:
            if isinstance(error, sqlite3.OperationalError):
                raise  # the disk's fault, not the file's
            self._marker.unlink(missing_ok=True)
            aside = self._path.with_suffix(f".damaged-{int(time.time())}")
            with contextlib.suppress(FileNotFoundError):
                os.rename(self._path, aside)
            for ending in ("-wal", "-shm"):
                self._path.with_name(self._path.name + ending).unlink(missing_ok=True)
            self.remark = f"what this host knew of the mirror was damaged ({error}): it is read again from the mirror"
            return self._prepared(sqlite3.connect(self._path, isolation_level=None, check_same_thread=False))

    @staticmethod
    def _prepared(connection: sqlite3.Connection) -> sqlite3.Connection:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute("PRAGMA temp_store = FILE")
        connection.execute("PRAGMA cache_size = -16384")
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version != _VERSION:
            names = connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
            for (name,) in names:
                connection.execute(f"DROP TABLE {name}")
            connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {_VERSION}; COMMIT;")
        return connection

    def close(self) -> None:
        """Let go of the file and its lock."""
        with self._lock:
            if hasattr(self, "_connection"):
                self._connection.close()
            if self._descriptor >= 0:
                os.close(self._descriptor)
                self._descriptor = -1

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Make what is written within the block durable as one. A block in a block is part of the outer one."""
        with self._lock:
            if self._connection.in_transaction:
                yield
                return
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def _run(self, statement: str, values: Iterable[object] = ()) -> sqlite3.Cursor:
        try:
            with self._lock:
                return self._connection.execute(statement, tuple(values))
        except sqlite3.DatabaseError as error:
            raise self._unusable(error) from error

    @property
    def _marker(self) -> Path:
        assert self._path is not None
        return self._path.with_suffix(".unusable")

    def _unusable(self, error: sqlite3.DatabaseError) -> ConfigurationError:
        """Return what to tell of a state that fails in use; a damaged one is set aside the next time."""
        if self._path is not None and not isinstance(error, sqlite3.OperationalError):
            with contextlib.suppress(OSError):
                self._marker.touch()
        return ConfigurationError(
            f"The state of the mirror can't be used: {self._path}",
            str(error),
            f"Make room on its disk and run again; or name another directory with {STATE_VARIABLE}.",
        )

    # -- words -------------------------------------------------------------------------------------------

    def get(self, name: str) -> str:
        """Return a noted word; empty if there is none."""
        row = self._run("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0]) if row else ""

    def set(self, name: str, value: str) -> None:
        """Note a word."""
        self._run("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    # -- the catalog -------------------------------------------------------------------------------------

    def entry(self, key: str, kind: str, order: str) -> Entry | None:
        """Return what is known of a name."""
        row = self._run(f"SELECT {_COLUMNS} FROM entries WHERE place = ?", (sort_key(key, kind, order),)).fetchone()
        return _entry(row) if row else None

    def entries(self, root: str, order: str) -> Iterator[tuple[bytes, Entry]]:
        """Yield what is known under a prefix, in order; places without that of the prefix."""
        low = sort_key(root, "", order) if root else b""
        high = low[:-1] + bytes([low[-1] + 1]) if low else b"\xff" * 8
        skip = len(low)
        last, first = low, True
        while True:  # by pages, so that what is written meanwhile does not matter
            rows = self._run(
                f"SELECT place, {_COLUMNS} FROM entries WHERE place {'>=' if first else '>'} ? AND place < ?"
                " ORDER BY place LIMIT 5000",
                (last, high),
            ).fetchall()
            for row in rows:
                entry = _entry(row[1:])
                if not entry.dropped:
                    yield row[0][skip:], entry
            if len(rows) < 5000:
                return
            last, first = rows[-1][0], False

    def tombstones(self) -> list[Entry]:
        """Return all files that are gone, of every copy, in order."""
        rows = self._run(f"SELECT {_COLUMNS} FROM entries WHERE gone != '' AND kind = 'file' ORDER BY place").fetchall()
        return [entry for entry in map(_entry, rows) if not entry.dropped]

    def holds_plain_files(self, records: str) -> bool:
        """Tell whether any file is known outside of the directory of records."""
        statement = "SELECT rest FROM entries WHERE kind = 'file' AND substr(key, 1, ?) != ?"
        return any(not _is_dropped(rest) for (rest,) in self._run(statement, (len(records), records)))

    def put(self, entry: Entry, order: str, *, published: bool = False) -> None:
        """Note what is known of a name; it is published later, unless it came from there."""
        rest = _Rest(entry.target, entry.xattrs, entry.sparse, entry.same_file, entry.dropped)
        with self._lock:
            self._change += 1
            self._connection.execute(
                "INSERT OR REPLACE INTO entries VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (
                    sort_key(entry.key, entry.kind, order),
                    entry.key,
                    entry.kind,
                    entry.size,
                    entry.modified,
                    entry.etag,
                    bytes.fromhex(entry.blake3) or None,
                    _signed(entry.crc64nvme),
                    entry.mode,
                    entry.uid,
                    entry.gid,
                    entry.gone,
                    msgspec.json.encode(rest),
                    0 if published else self._change,
                ),
            )

    def take(self, entries: Iterable[Entry], order: str) -> None:
        """Take in what the mirror's catalog says. What is noted here and not published yet stays."""
        for entry in entries:
            place = sort_key(entry.key, entry.kind, order)
            row = self._run("SELECT changed FROM entries WHERE place = ?", (place,)).fetchone()
            if row is not None and row[0] > 0:
                continue
            if entry.dropped:
                self._run("DELETE FROM entries WHERE place = ?", (place,))
            else:
                self.put(entry, order, published=True)

    def unpublished(self) -> int:
        """Return how many notes the mirror's catalog does not have yet."""
        return int(self._run("SELECT COUNT(*) FROM entries WHERE changed > 0").fetchone()[0])

    def to_publish(self, limit: int) -> tuple[int, list[Entry]]:
        """Return what is not published yet, in order, and a mark for ``was_published``."""
        rows = self._run(
            f"SELECT changed, {_COLUMNS} FROM entries WHERE changed > 0 ORDER BY changed LIMIT ?", (limit,)
        ).fetchall()
        return max((row[0] for row in rows), default=0), [_entry(row[1:]) for row in rows]

    def was_published(self, mark: int) -> None:
        """Note that all up to the mark is in the mirror's catalog."""
        with self.together():
            for place, rest in self._run(
                "SELECT place, rest FROM entries WHERE changed > 0 AND changed <= ?", (mark,)
            ).fetchall():
                if _is_dropped(rest):
                    self._run("DELETE FROM entries WHERE place = ?", (place,))
            self._run("UPDATE entries SET changed = 0 WHERE changed > 0 AND changed <= ?", (mark,))

    def forget_catalog(self) -> None:
        """Forget what was taken in from the mirror's catalog."""
        with self.together():
            self._run("DELETE FROM entries WHERE changed = 0")
            self._run("DELETE FROM segments")

    def count(self) -> int:
        """Return how many names are known."""
        return int(self._run("SELECT COUNT(*) FROM entries").fetchone()[0])

    def segments(self) -> dict[str, str]:
        """Return the catalog's segments that were taken in, with their ETags."""
        return dict(self._run("SELECT key, etag FROM segments").fetchall())

    def took_segment(self, key: str, etag: str) -> None:
        """Note that a segment was taken in, or written from here."""
        self._run("INSERT OR REPLACE INTO segments VALUES (?, ?)", (key, etag))

    def drop_segment(self, key: str) -> None:
        """Note that a segment is gone."""
        self._run("DELETE FROM segments WHERE key = ?", (key,))

    def some_key(self, order: str, root: str, share: float) -> str | None:
        """Return a key about that far into what is known under a prefix, to cut a listing there."""
        if root:
            return None
        (count,) = self._run("SELECT COUNT(*) FROM entries").fetchone()
        row = self._run(
            "SELECT key FROM entries WHERE kind = 'file' ORDER BY place LIMIT 1 OFFSET ?", (int(count * share),)
        ).fetchone()
        return str(row[0]) if row else None

    def with_size(self, size: int, root: str) -> bool:
        """Tell whether a file of that size is in a copy; quickly."""
        statement = "SELECT key FROM entries WHERE size = ? AND kind = 'file' AND blake3 IS NOT NULL LIMIT 50"
        return any(key.startswith(root) for (key,) in self._run(statement, (size,)))

    def with_content(self, digest: str, root: str) -> list[Entry]:
        """Return the files of a copy that have this content (BLAKE3, hex)."""
        rows = self._run(
            f"SELECT {_COLUMNS} FROM entries WHERE blake3 = ? AND kind = 'file' LIMIT 20", (bytes.fromhex(digest),)
        ).fetchall()
        found = [_entry(row) for row in rows]
        return [entry for entry in found if entry.key.startswith(root) and not entry.dropped and entry.etag]

    # -- hashes of local files ---------------------------------------------------------------------------

    def content(self, identity: FileIdentity) -> Content | None:
        """Return a file's hashes if it was read in this very state (its change time counts, too)."""
        row = self._run(
            "SELECT changed, blake3, crc, md5 FROM files WHERE device = ? AND inode = ? AND size = ? AND modified = ?",
            (_signed(identity.device), _signed(identity.inode), identity.size, identity.modified),
        ).fetchone()
        if row is None or row[0] != identity.changed:
            return None
        return Content(row[1].hex(), _unsigned(row[2]) or 0, row[3].hex() if row[3] else "")

    def note_content(self, identity: FileIdentity, content: Content) -> None:
        """Note a file's hashes."""
        self._run(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                _signed(identity.device),
                _signed(identity.inode),
                identity.size,
                identity.modified,
                identity.changed,
                bytes.fromhex(content.blake3),
                _signed(content.crc64nvme),
                bytes.fromhex(content.md5) or None,
                int(time.time()),
            ),
        )

    # -- signatures --------------------------------------------------------------------------------------

    def signature(self, digest: str) -> Signature | None:
        """Return the signature of a content, if it is known here."""
        row = self._run("SELECT data FROM signatures WHERE blake3 = ?", (bytes.fromhex(digest),)).fetchone()
        return signature_format.decode(row[0]) if row else None

    def note_signature(self, digest: str, signature: Signature, *, published: bool) -> None:
        """Note the signature of a content, and where its chunks are."""
        with self.together():
            row = self._run("SELECT id FROM signatures WHERE blake3 = ?", (bytes.fromhex(digest),)).fetchone()
            if row is not None:
                if published:
                    self._run("UPDATE signatures SET published = 1 WHERE id = ?", row)
                return
            number = self._run(
                "INSERT INTO signatures(blake3, published, data) VALUES (?, ?, ?)",
                (bytes.fromhex(digest), int(published), signature_format.encode(signature)),
            ).lastrowid
            self._connection.executemany(
                "INSERT INTO chunks VALUES (?, ?, ?, ?)",
                ((chunk, number, offset, length) for offset, length, chunk in signature.chunks()),
            )

    def signatures(self) -> dict[str, bool]:
        """Return the contents whose signatures are known here, and whether the mirror has them."""
        return {row[0].hex(): bool(row[1]) for row in self._run("SELECT blake3, published FROM signatures")}

    def drop_signature(self, digest: str) -> None:
        """Forget the signature of a content."""
        with self.together():
            row = self._run("SELECT id FROM signatures WHERE blake3 = ?", (bytes.fromhex(digest),)).fetchone()
            if row is not None:
                self._run("DELETE FROM chunks WHERE content = ?", row)
                self._run("DELETE FROM signatures WHERE id = ?", row)

    def has_chunks(self) -> bool:
        """Tell whether any chunk is known."""
        return self._run("SELECT 1 FROM chunks LIMIT 1").fetchone() is not None

    def places_of_chunk(self, chunk: bytes, length: int) -> list[tuple[str, int]]:
        """Return (BLAKE3 of the content, offset) of places where a chunk is; at most some."""
        rows = self._run(
            "SELECT s.blake3, c.at FROM chunks c JOIN signatures s ON s.id = c.content"
            " WHERE c.name = ? AND c.length = ? LIMIT 16",
            (chunk, length),
        ).fetchall()
        return [(row[0].hex(), row[1]) for row in rows]

    # -- uploads under way -------------------------------------------------------------------------------

    def parked(self, key: str) -> tuple[Upload, ParkedUpload] | None:
        """Return the upload that was begun for a key."""
        row = self._run("SELECT token, plan FROM uploads WHERE key = ?", (key,)).fetchone()
        if row is None:
            return None
        return Upload(key=key, token=row[0]), msgspec.json.decode(row[1], type=ParkedUpload)

    def all_parked(self) -> list[tuple[Upload, ParkedUpload]]:
        """Return all uploads that were begun and not ended."""
        rows = self._run("SELECT key, token, plan FROM uploads").fetchall()
        return [(Upload(key=row[0], token=row[1]), msgspec.json.decode(row[2], type=ParkedUpload)) for row in rows]

    def begin(self, key: str) -> None:
        """Note that an upload is about to be begun.

        A death before ``park``, or a reply that was lost, leaves an upload that only this tells of.
        """
        self._run("INSERT OR REPLACE INTO begun VALUES (?)", (key,))

    def begun(self) -> frozenset[str]:
        """Return the keys for which uploads were begun since the last clean end of a run."""
        return frozenset(str(key) for (key,) in self._run("SELECT key FROM begun"))

    def forget_begun(self) -> None:
        """Forget those: they were looked for and given up."""
        self._run("DELETE FROM begun")

    def prune(self, age: float) -> None:
        """Forget hashes of files that were read longer ago than that: they are read again if they are still there."""
        self._run("DELETE FROM files WHERE seen < ?", (int(time.time() - age),))

    def park(self, upload: Upload, plan: ParkedUpload) -> None:
        """Note an upload, before its first part is sent."""
        with self.together():
            self._run("DELETE FROM parts WHERE key = ?", (upload.key,))
            self._run(
                "INSERT OR REPLACE INTO uploads VALUES (?, ?, ?)", (upload.key, upload.token, msgspec.json.encode(plan))
            )

    def parts(self, key: str) -> dict[int, UploadedPart]:
        """Return the acknowledged parts of an upload, by number."""
        rows = self._run("SELECT number, size, etag, crc FROM parts WHERE key = ?", (key,)).fetchall()
        return {
            row[0]: UploadedPart(number=row[0], size=row[1], etag=row[2], crc64nvme=_unsigned(row[3]) or 0)
            for row in rows
        }

    def acknowledged(self, key: str, part: UploadedPart) -> None:
        """Note a part."""
        self._run(
            "INSERT OR REPLACE INTO parts VALUES (?, ?, ?, ?, ?)",
            (key, part.number, part.size, part.etag, _signed(part.crc64nvme)),
        )

    def unpark(self, key: str) -> None:
        """Forget an upload: it was completed, or given up."""
        with self.together():
            self._run("DELETE FROM parts WHERE key = ?", (key,))
            self._run("DELETE FROM uploads WHERE key = ?", (key,))


def _entry(row: tuple[object, ...]) -> Entry:
    key, kind, size, modified, etag, digest, crc, mode, uid, gid, gone, rest = row
    more = msgspec.json.decode(rest, type=_Rest) if rest != b"{}" else _NOTHING  # type: ignore[call-overload]
    return Entry(
        key=key,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        size=size,  # type: ignore[arg-type]
        modified=modified,  # type: ignore[arg-type]
        etag=etag,  # type: ignore[arg-type]
        blake3=digest.hex() if digest else "",  # type: ignore[attr-defined]
        crc64nvme=_unsigned(crc),  # type: ignore[arg-type]
        mode=mode,  # type: ignore[arg-type]
        uid=uid,  # type: ignore[arg-type]
        gid=gid,  # type: ignore[arg-type]
        gone=gone,  # type: ignore[arg-type]
        target=more.target,
        xattrs=more.xattrs,
        sparse=more.sparse,
        same_file=more.same_file,
        dropped=more.dropped,
    )


_NOTHING = _Rest()


def _is_dropped(rest: bytes) -> bool:
    return bool(msgspec.json.decode(rest, type=_Rest).dropped)


def _signed(value: int | None) -> int | None:
    """Return an unsigned number of 64 bits as SQLite can keep it."""
    return value if value is None or value < 1 << 63 else value - (1 << 64)


def _unsigned(value: int | None) -> int | None:
    return value if value is None or value >= 0 else value + (1 << 64)
