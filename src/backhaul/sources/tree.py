"""A directory tree as a source of files: names in a store's order, what each is, and its bytes.

Nothing is followed: a symlink is a symlink. Memory is that of the largest directory's names.
"""

from __future__ import annotations

import base64
import contextlib
import os
import stat
from collections.abc import Iterator, Sequence

import msgspec

from backhaul.errors import SourceError, UsageError
from backhaul.formats.file_names import is_text
from backhaul.model.mirror import DIRECTORY, FILE, SPECIAL, SYMLINK, UNREADABLE, FileIdentity, LocalFile, SourceRecord
from backhaul.planning.mirror_diff import sort_key

_SPECIAL = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFBLK: "a block device",
    stat.S_IFCHR: "a character device",
}
_BY_UUID = "/dev/disk/by-uuid"
# Longer names can't be keys; and the walk goes as deep as it is nested.
_DEEPEST = 1024
_KINDS = {stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK, stat.S_IFREG: FILE}
# Extended attributes that say something of the file, and not of the machine that it is on.
_XATTRS = ("user.", "security.capability", "system.posix_acl_access", "system.posix_acl_default", "trusted.")


def identity_of(status: os.stat_result) -> FileIdentity:
    """Return which file it is, and in which state."""
    return FileIdentity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_system_of(path: str) -> str:
    """Return what tells the file system at a path from others: its type and its id, which survive a reboot.

    Raises:
        OSError: there is no such path.
    """
    identity = os.statvfs(path).f_fsid
    kind, source = _mount_of(path)
    # (XFS gives the device's number for an id, which may be another one after a reboot.)
    with contextlib.suppress(OSError):
        device = os.path.realpath(source)
        for name in os.listdir(_BY_UUID):
            if os.path.realpath(os.path.join(_BY_UUID, name)) == device:
                return f"{kind} {name}"
    # Some file systems of the network have no id: what is mounted tells them apart then.
    return f"{kind} {identity:x}" if identity else f"{kind} {source}"


def _mount_of(path: str) -> tuple[str, str]:
    """Return type and source of the mount that a path is on (proc(5), mountinfo)."""
    device = os.stat(path).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with contextlib.suppress(OSError), open("/proc/self/mountinfo", errors="surrogateescape") as mounts:
        for line in mounts:
            before, _, after = line.partition(" - ")
            if before.split()[2] == number:
                kind, source = after.split()[:2]
                return kind, source
    return "unknown", ""


class Tree:
    """A directory tree. ``mounts`` are the file systems below it, by path, once it was scanned.

    Raises:
        SourceError: it is no directory, or can't be read.
    """

    def __init__(self, directory: str) -> None:
        if not directory:
            raise UsageError("DIR is empty", "no directory was named", "Name it; in a script, look at its variable.")
        self.name = directory
        self.path = os.path.realpath(directory)
        self.mounts: dict[str, str] = {}
        try:
            if not is_text(self.path):
                raise SourceError(
                    f"{directory!a} can't be mirrored", "its path is not UTF-8", "Rename it, or mirror by another path."
                )
            if not stat.S_ISDIR(os.stat(self.path).st_mode):
                raise SourceError(f"{directory} is no directory", "a mirror is of a directory", "Correct the path.")
            with os.scandir(self.path):
                pass
            self.file_system = file_system_of(self.path)
        except OSError as error:
            raise SourceError(
                f"Could not read {directory}",
                error.strerror or str(error),
                "Mount the disk, or correct the path or its permissions.",
            ) from error

    def record(self, host: str) -> SourceRecord:
        """Return where the tree is."""
        return SourceRecord(host=host, path=self.path, file_system=self.file_system)

    def scan(self, order: str) -> Iterator[tuple[bytes, LocalFile]]:
        """Yield every name with its place, in that order. What can't be read is yielded as such.

        Raises:
            SourceError: the directory itself can't be read any more.
        """
        self.mounts = {}
        root = os.stat(self.path)
        yield from self._walk("", root.st_dev, order)

    def _walk(self, prefix: str, device: int, order: str) -> Iterator[tuple[bytes, LocalFile]]:
        found: list[tuple[bytes, LocalFile]] = []
        try:
            with os.scandir(os.path.join(self.path, prefix)) as entries:
                for entry in entries:
                    for file in self._look(entry, prefix + entry.name):
                        found.append((sort_key(file.key, file.kind, order), file))  # noqa: PERF401 - it may raise
        except OSError as error:
            if not prefix:
                raise SourceError(
                    f"Could not read {self.name}", error.strerror or str(error), "Mount the disk, or check it."
                ) from error
            key = prefix[:-1]
            why = error.strerror or str(error)
            nothing = FileIdentity(0, 0, 0, 0, 0)
            yield (
                sort_key(key, UNREADABLE, order),
                LocalFile(key=key, kind=UNREADABLE, identity=nothing, detail=f"directory: {why}"),
            )
            return
        found.sort(key=lambda pair: pair[0])
        for place, file in found:
            if file.kind != DIRECTORY:
                yield place, file
                continue
            if file.identity.device != device:
                with contextlib.suppress(OSError):
                    self.mounts[file.key] = file_system_of(os.path.join(self.path, file.key))
            if len(file.key) > _DEEPEST:
                yield (
                    sort_key(file.key, UNREADABLE, order),
                    msgspec.structs.replace(
                        file, kind=UNREADABLE, detail="directory: its path is too long for names below it"
                    ),
                )
                continue
            inside = self._walk(f"{file.key}/", file.identity.device, order)
            first = next(inside, None)
            if first is not None and first[1].kind == UNREADABLE and first[1].key == file.key:
                yield first
                continue
            yield place, file
            if first is not None:
                yield first
            yield from inside

    def _look(self, entry: os.DirEntry[str], key: str) -> Sequence[LocalFile]:
        try:
            status = entry.stat(follow_symlinks=False)
        except FileNotFoundError:
            return ()  # removed since the directory was read
        except OSError as error:
            # Whether it is a file or a directory is not known: neither it nor what is below it is gone.
            nothing, why = FileIdentity(0, 0, 0, 0, 0), error.strerror or str(error)
            return [
                LocalFile(key=key, kind=SPECIAL, identity=nothing, detail=f"unreadable ({why})"),
                LocalFile(key=key, kind=UNREADABLE, identity=nothing, detail=why),
            ]
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), SPECIAL)
        detail = ""
        if kind == SPECIAL:
            detail = _SPECIAL.get(stat.S_IFMT(status.st_mode), "a special file")
        elif kind == SYMLINK:
            with contextlib.suppress(OSError):
                detail = os.readlink(entry.path)  # noqa: PTH115 - names may be any bytes
        return (_file(key, kind, status, detail),)

    def look(self, key: str) -> LocalFile | None:
        """Return what has that name now, or None."""
        try:
            status = os.lstat(os.path.join(self.path, key))
        except OSError:
            return None
        kind = _KINDS.get(stat.S_IFMT(status.st_mode), SPECIAL)
        return _file(key, kind, status, "")

    def open(self, key: str) -> OpenFile:
        """Open a file for reading.

        Raises:
            OSError: it can't be, or is a symlink.
        """
        return OpenFile(os.path.join(self.path, key))


def _file(key: str, kind: str, status: os.stat_result, detail: str) -> LocalFile:
    return LocalFile(
        key=key,
        kind=kind,
        identity=identity_of(status),
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        links=status.st_nlink,
        allocated=status.st_blocks * 512,
        detail=detail,
    )


class OpenFile:
    """A file of a tree, opened; ``identity`` is what it was then."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        status = os.fstat(self._descriptor)
        self.identity = identity_of(status)
        self.regular = stat.S_ISREG(status.st_mode)

    def read_into(self, offset: int, out: memoryview) -> int:
        """Fill ``out`` from ``offset`` on; return how many bytes there were."""
        done = 0
        while done < len(out):
            count = os.preadv(self._descriptor, [out[done:]], offset + done)
            if count == 0:
                break
            done += count
        return done

    def unchanged(self) -> bool:
        """Tell whether it is as it was when it was opened, and still has its name."""
        try:
            there = identity_of(os.stat(self._path, follow_symlinks=False))
        except OSError:
            return False
        return there == self.identity == identity_of(os.fstat(self._descriptor))

    def xattrs(self) -> dict[str, str]:
        """Return its extended attributes, values in base64; nothing where the file system has none."""
        found: dict[str, str] = {}
        with contextlib.suppress(OSError):
            for name in os.listxattr(self._descriptor):
                if name.startswith(_XATTRS) and is_text(name):
                    with contextlib.suppress(OSError):
                        found[name] = base64.b64encode(os.getxattr(self._descriptor, name)).decode()
        return found

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._descriptor)
