"""A directory as a store.

An object becomes visible by a hard link (which refuses to replace) or a rename (which replaces) of a
temporary file beside it, after its bytes and before its directory were flushed to the disk; so a crash, of
the program or of the machine, leaves the object absent or whole. Temporary names are
``.<name>.<random>.partial``: hidden, and known to ``clean``.
"""

from __future__ import annotations

import datetime as dt
import errno
import os
import re
import secrets
import shutil
import stat
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

from backhaul.errors import (
    IntegrityError,
    ObjectNotFoundError,
    PreconditionError,
    StoreError,
    StoreFullError,
    StoreRefusedError,
)
from backhaul.formats.part_sizes import plan_layout
from backhaul.formats.profiles import PROFILES
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.stores.base import Kind, PartRules
from backhaul.stores.body import Body, PartBody

_PARTIAL = ".partial"
# Names of files in the making, as a pattern of whole keys.
OWN_NAMES = r"(?:^|/)\.[^/]+\.[0-9a-f]{12}\.partial$"
_REFUSALS = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


class LocalStore:
    """Objects as files under a directory, which is made on first write."""

    def __init__(self, root: str) -> None:
        self.url = root
        self.profile = PROFILES["local"]
        self._root = Path(root).absolute()
        self._lock = threading.Lock()
        self._descriptors: dict[str, int] = {}
        self._made: list[Path] = []

    def parts(self, at_most: int | None = None) -> PartRules:
        """See ``Store.parts``."""
        return PartRules(buffered=False, parallel=1, layout=plan_layout(self.profile.limits, at_most=at_most))

    def put(
        self,
        key: str,
        body: Body,
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
        kind: Kind = "record",
        metadata: Metadata = NO_METADATA,
    ) -> StoredObject:
        """See ``Store.put``."""
        upload = self.begin(key)
        try:
            self.put_part(upload, 1, 0, body, crc64nvme)
            return self._publish(upload, if_absent=if_absent, replaces=replaces)
        except BaseException:
            self.abort(upload)
            raise

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``."""
        path = self._path(key)
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(6)}{_PARTIAL}")
        try:
            descriptor = self._create(temporary)
        except OSError as error:
            raise self._translated(error, f"Could not write {path}") from error
        with self._lock:
            self._descriptors[str(temporary)] = descriptor
        return Upload(key=key, token=str(temporary))

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        with self._lock:
            descriptor = self._descriptors[upload.token]
        size = 0
        try:
            for piece in _pieces(body):
                view = memoryview(piece)
                while view:
                    count = os.pwrite(descriptor, view, offset + size)
                    size += count
                    view = view[count:]
        except OSError as error:
            raise self._translated(error, f"Could not write {self._path(upload.key)}") from error
        return UploadedPart(number=number, size=size, etag="", crc64nvme=crc64nvme)

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``. (The profile has none: a local file is written in order.)"""
        raise NotImplementedError

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``. The kernel copies, and where the file system can, only notes it."""
        path = self._path(source.key)
        upload = self.begin(key)
        try:
            with open(path, "rb") as file:
                if source.etag is not None and _etag(os.fstat(file.fileno())) != source.etag:
                    raise PreconditionError(f"{path} was replaced", "it is another file now", "Plan again.")
                _copy_all(file.fileno(), self._descriptors[upload.token], source.size, path)
            return self._publish(upload, if_absent=True, replaces=None)
        except FileNotFoundError as error:
            self.abort(upload)
            raise ObjectNotFoundError(f"{path} does not exist", str(error), "Plan again.") from error
        except OSError as error:
            self.abort(upload)
            raise self._translated(error, f"Could not copy {path}") from error
        except BaseException:
            self.abort(upload)
            raise

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``. A file in the making has no parts that could be told apart."""
        raise ObjectNotFoundError(
            f"{self._path(upload.key)} can't be continued", "a local file is written anew", "Push again."
        )

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        """See ``Store.complete``."""
        with self._lock:
            descriptor = self._descriptors[upload.token]
        size = os.fstat(descriptor).st_size
        expected = sum(part.size for part in parts)
        if size != expected:
            raise IntegrityError(
                f"{self._path(upload.key)} is not what was written",
                f"the file has {size} bytes and should have {expected}",
                "Somebody else writes to this directory, or the file system lost data.",
            )
        return self._publish(upload, if_absent=if_absent, replaces=replaces)

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        self._close(upload)
        try:
            os.unlink(upload.token)
        except FileNotFoundError:
            pass
        except OSError as error:
            raise self._translated(error, f"Could not remove {upload.token}") from error
        self._remove_empty(Path(upload.token).parent)

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        for path, status in self._walk():
            if re.search(OWN_NAMES, path.name):
                name = path.name[1 : -len(_PARTIAL)].rpartition(".")[0]
                yield UnfinishedUpload(
                    upload=Upload(key=self._key(path.with_name(name)), token=str(path)),
                    size=status.st_size,
                    last_activity=_time(status.st_mtime_ns),
                )

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``."""
        path = self._path(key)
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise ObjectNotFoundError(f"{path} does not exist", str(error), "Run: backhaul verify") from error
        except OSError as error:
            raise self._translated(error, f"Could not read {path}") from error
        try:
            if etag is not None and _etag(os.fstat(descriptor)) != etag:
                raise PreconditionError(f"{path} was replaced", "it is another file than at the start", "Try again.")
            done = 0
            while done < len(out):
                count = os.preadv(descriptor, [out[done:]], offset + done)
                if count == 0:
                    raise IntegrityError(
                        f"{path} is too short",
                        f"it ends at byte {offset + done}, and {len(out) - done} more are due",
                        "Run: backhaul verify --deep",
                    )
                done += count
        except OSError as error:
            raise self._translated(error, f"Could not read {path}") from error
        finally:
            os.close(descriptor)

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        path = self._path(key)
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise self._translated(error, f"Could not look at {path}") from error
        return self._object(path, status) if stat.S_ISREG(status.st_mode) else None

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        for path, status in self._walk():
            if not re.search(OWN_NAMES, path.name):
                key = self._key(path)
                if key.startswith(prefix) and key > after and (until is None or key <= until):
                    yield self._object(path, status)

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        path = self._path(key)
        if etag is not None:
            self._refuse_another(key, etag)
        try:
            path.unlink(missing_ok=True)
        except NotADirectoryError:
            return
        except OSError as error:
            raise self._translated(error, f"Could not delete {path}") from error
        self._remove_empty(path.parent)

    def close(self) -> None:
        """See ``Store.close``."""
        with self._lock:
            descriptors = list(self._descriptors.values())
            self._descriptors.clear()
        for descriptor in descriptors:
            os.close(descriptor)

    # -- inside ----------------------------------------------------------------------------------------

    def _path(self, key: str) -> Path:
        return self._root / key

    def _key(self, path: Path) -> str:
        return path.relative_to(self._root).as_posix()

    def _object(self, path: Path, status: os.stat_result) -> StoredObject:
        return StoredObject(
            key=self._key(path),
            size=status.st_size,
            modified=_time(status.st_mtime_ns),
            etag=_etag(status),
            modified_ns=status.st_mtime_ns,
        )

    def _walk(self) -> Iterator[tuple[Path, os.stat_result]]:
        """Yield every regular file under the root, in the order of their keys."""

        def fail(error: OSError) -> None:
            if isinstance(error, FileNotFoundError):
                return  # the directory of a run that ended meanwhile
            raise self._translated(error, f"Could not list {error.filename}") from error

        files: list[tuple[Path, os.stat_result]] = []
        for directory, _, names in os.walk(self._root, onerror=fail):
            for name in names:
                path = Path(directory, name)
                try:
                    status = path.lstat()
                except FileNotFoundError:
                    continue  # a run that ended meanwhile
                except OSError as error:
                    raise self._translated(error, f"Could not look at {path}") from error
                if stat.S_ISREG(status.st_mode):
                    files.append((path, status))
        files.sort(key=lambda pair: self._key(pair[0]))
        yield from files

    def _create(self, temporary: Path) -> int:
        for last_try in (False, False, True):
            self._make_directories(temporary.parent)
            try:
                return os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            except FileNotFoundError:
                # Another run removed the directory, empty by then, after it was made here.
                if last_try:
                    raise
        raise AssertionError

    def _make_directories(self, directory: Path) -> None:
        """Make a directory and its parents, each flushed into its own parent."""
        if directory.is_dir():
            return
        self._make_directories(directory.parent)
        try:
            directory.mkdir(0o700)  # a dump is private until somebody says otherwise
        except FileExistsError:
            return
        with self._lock:
            self._made.append(directory)
        flush_directory(directory.parent)

    def _refuse_another(self, key: str, etag: str) -> None:
        found = self.stat(key)
        if found is not None and found.etag != etag:
            raise PreconditionError(f"{self._path(key)} was replaced", "it is another file now", "Plan again.")

    def _publish(self, upload: Upload, *, if_absent: bool, replaces: str | None) -> StoredObject:
        path = self._path(upload.key)
        if replaces is not None:
            self._refuse_another(upload.key, replaces)
            if_absent = False
        with self._lock:
            descriptor = self._descriptors[upload.token]
        try:
            os.fsync(descriptor)
            if if_absent:
                try:
                    os.link(upload.token, path)
                except FileExistsError as error:
                    raise PreconditionError(
                        f"{path} exists already",
                        str(error),
                        "Another run made it; choose another name or time.",
                    ) from error
                except OSError as error:
                    # A file system without hard links (FAT, some network mounts): the next best is to look
                    # first. Two runs in the same instant are told apart by the claim before them.
                    if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK):
                        raise
                    if path.exists():
                        raise PreconditionError(f"{path} exists already", "", "Another run made it.") from error
                    os.rename(upload.token, path)
                else:
                    os.unlink(upload.token)
            else:
                os.rename(upload.token, path)
            flush_directory(path.parent)
            status = path.stat()
        except OSError as error:
            raise self._translated(error, f"Could not write {path}") from error
        self._close(upload)
        return self._object(path, status)

    def _close(self, upload: Upload) -> None:
        with self._lock:
            descriptor = self._descriptors.pop(upload.token, None)
        if descriptor is not None:
            os.close(descriptor)

    def _remove_empty(self, directory: Path) -> None:
        """Remove a backup's directory when nothing is left in it, and then those above that this run made."""
        with self._lock:
            made = self._made[::-1]
        if directory == self._root or self._root not in directory.parents:
            return
        for path in [directory, *(path for path in made if path != directory)]:
            try:
                path.rmdir()
            except OSError:
                break  # not empty, or gone: both are right

    def _translated(self, error: OSError, what: str) -> StoreError:
        why = os.strerror(error.errno) if error.errno else str(error)
        if error.errno in _REFUSALS:
            return StoreRefusedError(what, why, f"Check the owner, the permissions and the mount of {self.url}.")
        if error.errno in _FULL:
            free = _free_space(self._root)
            return StoreFullError(what, f"{why} ({free})", f"Make room, or push to another place than {self.url}.")
        return StoreError(what, why, f"Check the disk that holds {self.url}.")


def _copy_all(source: int, target: int, size: int, path: Path) -> None:
    done = 0
    while done < size:
        try:
            count = os.copy_file_range(source, target, size - done, done, done)
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            count = os.pwrite(target, os.pread(source, min(1 << 20, size - done), done), done)
        if count == 0:
            raise IntegrityError(f"{path} is too short", f"it ends at byte {done}", "Plan again.")
        done += count


def _pieces(body: Body) -> Iterator[bytes | bytearray | memoryview]:
    if not isinstance(body, PartBody):
        yield body
        return
    reader = body.open()
    while piece := reader.read():
        yield piece


def _time(nanoseconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(nanoseconds / 1e9, tz=dt.UTC)


def _etag(status: os.stat_result) -> str:
    """Identify the file as far as its metadata can: another inode, time or size is another object."""
    return f"{status.st_ino:x}-{status.st_mtime_ns:x}-{status.st_size:x}"


def _free_space(path: Path) -> str:
    while not path.exists() and path != path.parent:
        path = path.parent
    try:
        return f"{shutil.disk_usage(path).free} bytes free"
    except OSError:
        return "free space unknown"


def flush_directory(directory: Path) -> None:
    """Have the disk keep the names that a directory has now, before anything that is done afterwards."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't flush a directory; they commit names on their own.
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
