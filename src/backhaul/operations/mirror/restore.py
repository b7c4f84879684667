"""The way back: all of a mirror, or what is in its recycler, into a directory.

A file gets its name when it is whole and its hash was compared; until then it is ``.NAME.<hash>.partial``, from which
an interrupted pull goes on. Nothing that is there already is replaced.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase

from blake3 import blake3

from backhaul.errors import BackupNotFoundError, TargetError, UsageError
from backhaul.formats import catalog
from backhaul.formats.file_names import shown
from backhaul.model.mirror import DIRECTORY, FILE, SYMLINK, Entry, MirrorRecord
from backhaul.model.objects import StoredObject
from backhaul.model.results import MirrorPullResult, RecycledFile, RecyclerResult, Skipped
from backhaul.operations import memory
from backhaul.operations.mirror.fetch import fetch
from backhaul.operations.mirror.records import Records
from backhaul.operations.mirror.state import MirrorState
from backhaul.operations.places import series_at
from backhaul.operations.progress import MirrorProgress
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy
from backhaul.transforms.digest import StreamDigest

_HOLE = 64 << 10
_NO_BYTES = bytes(_HOLE)


class MirrorReader:
    """A mirror, opened to be read; what it knows is in a state that is forgotten at its end."""

    def __init__(self, stack: contextlib.ExitStack, mirror: str, patience: float = DEFAULT_PATIENCE) -> None:
        location = series_at(mirror)
        self.text = mirror
        self.group = Supervisor("mirror", grace=2.0)
        self.store: Store = open_store(location, policy=RetryPolicy(patience, sleep=self.group.sleep))
        stack.callback(self.store.close)
        self.state = MirrorState(None, mirror)
        stack.callback(self.state.close)
        self.records = Records(self.store, self.state)
        self.record = self.records.load()
        self.root = self.record.root if self.record is not None else ""

    def must_be_mirror(self) -> MirrorRecord:
        """Return the mirror's page.

        Raises:
            BackupNotFoundError: there is no mirror.
        """
        if self.record is None:
            raise BackupNotFoundError(
                f"There is no mirror at {self.text}",
                f"{catalog.RECORD} is not there",
                "Correct the path, or sync first.",
            )
        return self.record

    def unfinished(self) -> list[Skipped]:
        """Return what there is to say of a mirror that was never complete."""
        if self.record is None or self.record.finished:
            return []
        return [Skipped(self.text, "it was never complete: its first sync has not come to its end")]

    def entries(self) -> Iterator[Entry]:
        """Yield what the copy that counts has, keys without its prefix; of a plain listing if it has no records."""
        if self.record is None:
            for thing in self.store.list():
                yield _entry_of(thing)
            return
        for _, entry in self.state.entries(self.root, self.records.order):
            if self.root or not entry.key.startswith(catalog.DIRECTORY):
                yield entry

    def name(self, entry: Entry) -> str:
        """Return a file's name, relative to the directory; also of a file of an older copy."""
        return _copy_of(entry.key)[1]

    def tombstones(self) -> list[Entry]:
        """Return what is gone and still there, of this copy and of older ones; of each name the last to go."""
        listed = {thing.key: thing.etag for thing in self.store.list()}
        last: dict[str, Entry] = {}
        for entry in sorted(self.state.tombstones(), key=lambda entry: entry.gone):
            if listed.get(entry.key) == entry.etag:
                last[self.name(entry)] = entry
        if self.record is not None:
            for _, entry in self.state.entries(self.root, self.records.order):
                if not entry.gone and _copy_of(entry.key)[0] == self.root:
                    last.pop(self.name(entry), None)  # it is there
        return [last[name] for name in sorted(last)]


def pull_mirror(
    mirror: str,
    directory: str,
    *,
    workers: int | None = None,
    patience: float = DEFAULT_PATIENCE,
    progress: MirrorProgress | None = None,
) -> MirrorPullResult:
    """Bring all files of a mirror into a directory, as they were; what is there already stays.

    Raises:
        BackupNotFoundError: there is nothing at that path.
        TargetError: the directory can't be written, or there is no room.
        StoreError: the store can't be read.
    """
    with contextlib.ExitStack() as stack:
        reader = MirrorReader(stack, mirror, patience)

        def live() -> Iterator[Entry]:
            return (entry for entry in reader.entries() if not entry.gone)

        return _brought_back(reader, directory, live, workers, progress)


def recycler(mirror: str) -> RecyclerResult:
    """List the files of a mirror that are gone in its directory and still there."""
    with contextlib.ExitStack() as stack:
        reader = MirrorReader(stack, mirror)
        reader.must_be_mirror()
        files = [
            RecycledFile(name=reader.name(entry), size=entry.size, gone=entry.gone) for entry in reader.tombstones()
        ]
        return RecyclerResult(mirror=mirror, files=tuple(sorted(files, key=lambda file: (file.gone, file.name))))


def undelete(
    mirror: str, names: tuple[str, ...], directory: str, *, progress: MirrorProgress | None = None
) -> MirrorPullResult:
    """Bring files back from a mirror's recycler.

    Args:
        mirror: MIRROR.
        names: of files or directories, or patterns as the shell's.
        directory: where to; the mirror's own directory, for the next sync to take the tombstones off.

    Raises:
        BackupNotFoundError: a name fits nothing in the recycler.
    """
    with contextlib.ExitStack() as stack:
        reader = MirrorReader(stack, mirror)
        reader.must_be_mirror()
        used = set[str]()

        def is_chosen(entry: Entry) -> bool:
            name = reader.name(entry)
            fits = [
                given
                for given in names
                if name == given or name.startswith(f"{given.rstrip('/')}/") or fnmatchcase(name, given)
            ]
            used.update(fits)
            return bool(fits)

        found = [entry for entry in reader.tombstones() if is_chosen(entry)]
        result = _brought_back(reader, directory, lambda: iter(found), None, progress) if found else None
        unknown = [name for name in names if name not in used]
        if unknown:
            raise BackupNotFoundError(
                f"{', '.join(unknown)}: nothing of that name is in the recycler of {mirror}",
                f"{result.files} other files were brought back" if result is not None else "nothing was brought back",
                f"List it: backhaul undelete {mirror}",
            )
        assert result is not None
        return result


def _brought_back(
    reader: MirrorReader,
    directory: str,
    entries: Callable[[], Iterator[Entry]],
    workers: int | None,
    progress: MirrorProgress | None,
) -> MirrorPullResult:
    began = time.monotonic()
    counters = progress or MirrorProgress()
    memory.settle_allocator()
    target = _Directory(directory, reader)
    problems: list[Skipped] = []
    with reader.group:
        target.begin()
        needed, found = 0, reader.record is not None
        for entry in entries():
            found = True
            if entry.kind == FILE:
                needed += 0 if target.wants_quietly(entry) is None else entry.size
                counters.files += 1
                counters.total += entry.size
        if not found:
            raise BackupNotFoundError(
                f"There is nothing at {reader.text}", "no backup, no mirror, no object", "Correct the path."
            )
        free = shutil.disk_usage(target.path).free
        if needed > free:
            raise TargetError(
                f"Could not write to {directory}", f"{needed} bytes are needed, and {free} are free", "Make room."
            )
        later: list[Entry] = []

        def wanted() -> Iterator[Entry]:
            for entry in entries():
                if entry.kind != FILE or target.is_another_name(entry):
                    later.append(entry)
                else:
                    yield entry

        failed = fetch(reader.store, wanted(), target, reader.group, counters, workers=workers)
        problems += [Skipped(shown(_copy_of(problem.name)[1]), problem.reason) for problem in failed]
        # Further names of files whose first name could not be had come as files of their own.
        own = [entry for entry in later if entry.kind == FILE and not target.has_first_name(entry)]
        failed = fetch(reader.store, own, target, reader.group, counters, workers=workers)
        problems += [Skipped(shown(_copy_of(problem.name)[1]), problem.reason) for problem in failed]
        alone = {entry.key for entry in own}
        # Symlinks last: nothing that is made may be led elsewhere by one.
        later.sort(key=lambda entry: (DIRECTORY, FILE, SYMLINK).index(entry.kind))
        for entry in later:
            if entry.key not in alone:
                target.link_or_make(entry)
        target.set_modes()
        os.sync()
    problems += [*target.problems, *reader.unfinished()]
    return MirrorPullResult(
        mirror=reader.text,
        directory=directory,
        files=target.files,
        bytes=target.bytes,
        kept=target.kept,
        problems=tuple(problems),
        verified=target.unverified == 0 and not problems,
        seconds=time.monotonic() - began,
        peak_memory=memory.peak_memory(),
    )


class _Directory:
    """A directory as the receiver of files (``fetch.Receiver``)."""

    def __init__(self, directory: str, reader: MirrorReader) -> None:
        self.name = directory
        self.path = os.path.realpath(directory)
        self.problems: list[Skipped] = []
        self.files = self.bytes = self.kept = self.unverified = 0
        self._reader = reader
        self._safe: set[str] = set()
        self._descriptor = -1
        self._partial = ""
        self._position = 0
        self._sparse = False
        self._first_names: dict[str, str] = {}
        self._good: set[str] = set()
        self._made: list[Entry] = []

    def begin(self, *arguments: object) -> None:
        """Make the directory; or, as a receiver, begin a file."""
        if arguments:
            self._begin_file(*arguments)  # type: ignore[arg-type]
            return
        try:
            os.makedirs(self.path, exist_ok=True)
        except OSError as error:
            raise TargetError(
                f"Could not write to {self.name}", error.strerror or str(error), "Name another."
            ) from error

    def is_another_name(self, entry: Entry) -> bool:
        """Tell whether a file is a further name of one that came before (a hard link)."""
        if not entry.same_file:
            return False
        return self._first_names.setdefault(_file_of(entry), entry.key) != entry.key

    def has_first_name(self, entry: Entry) -> bool:
        """Tell whether the first name of a file that has several is there, with the right content."""
        return self._first_names.get(_file_of(entry)) in self._good

    def wants_quietly(self, entry: Entry) -> int | None:
        """Return as ``wants``, and note nothing."""
        try:
            status = os.lstat(self._path(entry))
        except (OSError, UsageError):
            return 0
        same = stat.S_ISREG(status.st_mode) and status.st_size == entry.size
        return None if same and status.st_mtime_ns == entry.modified else 0

    def wants(self, entry: Entry) -> int | None:
        """See ``Receiver.wants``."""
        try:
            path = self._path(entry)
        except UsageError as error:
            self._problem(entry, error.why)
            return None
        try:
            status = os.lstat(path)
        except OSError:
            with contextlib.suppress(OSError):
                size = os.stat(self._partial_of(path, entry)).st_size
                return min(size, entry.size) if size < entry.size else 0
            return 0
        if stat.S_ISREG(status.st_mode) and (status.st_size, status.st_mtime_ns) == (entry.size, entry.modified):
            self.kept += 1
            self._good.add(entry.key)
        else:
            self._problem(entry, "another file of that name is there: it was left alone")
        return None

    def _begin_file(self, entry: Entry, start: int, digest: StreamDigest) -> None:
        path = self._path(entry)
        self._partial = self._partial_of(path, entry)
        try:
            self._make_parents(entry)
            self._descriptor = os.open(self._partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            os.ftruncate(self._descriptor, start)
            position = 0
            while position < start:
                piece = os.pread(self._descriptor, min(1 << 20, start - position), position)
                digest.feed(piece)
                position += len(piece)
        except OSError as error:
            raise self._failure(path, error) from error
        self._position, self._sparse = start, entry.sparse

    def write(self, data: memoryview) -> None:
        """See ``Receiver.write``. Runs of zeros become holes where there were some."""
        try:
            if self._sparse:
                for offset in range(0, len(data), _HOLE):
                    piece = data[offset : offset + _HOLE]
                    if piece != _NO_BYTES[: len(piece)]:
                        self._write_at(piece, self._position + offset)
                os.ftruncate(self._descriptor, self._position + len(data))
            else:
                self._write_at(data, self._position)
        except OSError as error:
            raise self._failure(self._partial, error) from error
        self._position += len(data)

    def _write_at(self, data: memoryview, position: int) -> None:
        while data:
            count = os.pwrite(self._descriptor, data, position)
            data, position = data[count:], position + count

    def finish(self, entry: Entry) -> None:
        """See ``Receiver.finish``."""
        path = self._path(entry)
        try:
            self._set_attributes(entry)
            if entry.size > 1 << 20:
                os.fdatasync(self._descriptor)
            _name_it(self._partial, path)
        except FileExistsError:
            self._problem(entry, "another file of that name came meanwhile: it was left alone")
            os.unlink(self._partial)
        except OSError as error:
            raise self._failure(path, error) from error
        else:
            self._good.add(entry.key)
            self.files += 1
            self.bytes += entry.size
            self.unverified += not entry.blake3 and entry.crc64nvme is None
        finally:
            self._close()

    def fail(self, entry: Entry) -> None:
        """See ``Receiver.fail``."""
        if self._descriptor >= 0:
            self._close()
            with contextlib.suppress(OSError):
                os.unlink(self._partial)

    def link_or_make(self, entry: Entry) -> None:
        """Make a directory, a symlink, or a further name of a file."""
        try:
            path = self._path(entry)
            self._make_parents(entry)
            if entry.kind == DIRECTORY:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(path, 0o700)
                if not stat.S_ISDIR(os.lstat(path).st_mode):
                    raise FileExistsError
                self._made.append(entry)
                return
            if entry.kind == SYMLINK:
                if os.path.islink(path) and os.readlink(path) == entry.target:
                    self.kept += 1
                    return
                os.symlink(entry.target, path)
            else:
                source = os.path.join(self.path, _copy_of(self._first_names[_file_of(entry)])[1])
                if os.path.exists(path) and os.path.samefile(source, path):
                    self.kept += 1
                    return
                os.link(source, path)
            self.files += 1
        except FileExistsError:
            self._problem(entry, "another file of that name is there: it was left alone")
        except UsageError as error:
            self._problem(entry, error.why)
        except OSError as error:
            self._problem(entry, error.strerror or str(error))

    def set_modes(self) -> None:
        """Give directories their permissions and owners, when all that is in them is there; those below first."""
        for entry in sorted(self._made, key=lambda entry: entry.key, reverse=True):
            try:
                descriptor = os.open(self._path(entry), os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except OSError as error:
                self._problem(entry, error.strerror or str(error))
                continue
            try:
                if os.geteuid() == 0:
                    os.fchown(descriptor, entry.uid, entry.gid)
                os.fchmod(descriptor, entry.mode)
            except OSError as error:
                self._problem(entry, error.strerror or str(error))
            finally:
                os.close(descriptor)

    def _set_attributes(self, entry: Entry) -> None:
        descriptor = self._descriptor
        os.ftruncate(descriptor, entry.size)
        if os.geteuid() == 0 and self._reader.record is not None:
            os.fchown(descriptor, entry.uid, entry.gid)
        for name, value in entry.xattrs.items():
            try:
                os.setxattr(descriptor, name, base64.b64decode(value))
            except OSError as error:
                self._problem(entry, f"its extended attribute {name} could not be set: {error.strerror}")
        os.fchmod(descriptor, entry.mode)
        os.utime(descriptor, ns=(entry.modified, entry.modified))

    def _path(self, entry: Entry) -> str:
        name = self._reader.name(entry)
        if not name or any(segment in ("", ".", "..") for segment in name.split("/")):
            raise UsageError(f"{name!r} can't be a file's name", "its name is no path below a directory", "")
        return os.path.join(self.path, name)

    def _make_parents(self, entry: Entry) -> None:
        """Make the directories above a file; none of them may be a symlink, which could lead elsewhere."""
        path = self.path
        for segment in self._reader.name(entry).split("/")[:-1]:
            path = os.path.join(path, segment)
            if path in self._safe:
                continue
            with contextlib.suppress(FileExistsError):
                os.mkdir(path, 0o700)
            if not stat.S_ISDIR(os.lstat(path).st_mode):
                raise NotADirectoryError(20, "a directory above it is something else", path)
            self._safe.add(path)

    def _partial_of(self, path: str, entry: Entry) -> str:
        head, tail = os.path.split(path)
        state = blake3(f"{entry.key}\0{entry.etag}\0{entry.size}".encode()).hexdigest()[:12]
        return os.path.join(head, f".{tail[:150]}.{state}.partial")

    def _close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def _problem(self, entry: Entry, reason: str) -> None:
        self.problems.append(Skipped(shown(self._reader.name(entry)), reason))

    def _failure(self, path: str, error: OSError) -> TargetError:
        self._close()
        return TargetError(
            f"Could not write {path}", error.strerror or str(error), "Make room or mend it, and pull again: it goes on."
        )


def _copy_of(key: str) -> tuple[str, str]:
    """Return the copy that a key lies in, and the name in it."""
    if not key.startswith(catalog.COPIES):
        return "", key
    copy, _, name = key[len(catalog.COPIES) :].partition("/")
    return f"{catalog.COPIES}{copy}/", name


def _file_of(entry: Entry) -> str:
    """Return what the names of one file have in common."""
    return f"{entry.same_file} {entry.blake3} {entry.size}"


def _name_it(partial: str, path: str) -> None:
    """Give a file its name, which replaces nothing; without hard links it is looked first."""
    try:
        os.link(partial, path)
    except FileExistsError:
        raise
    except OSError:
        if os.path.lexists(path):
            raise FileExistsError(path) from None
        os.rename(partial, path)
    else:
        os.unlink(partial)


def _entry_of(thing: StoredObject) -> Entry:
    return Entry(
        key=thing.key, size=thing.size, modified=int(thing.modified.timestamp()) * 10**9, etag=thing.etag or ""
    )
