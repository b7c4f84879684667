"""A directory as a target: filled out of sight, and put into place when everything is there.

It is filled beside its place (``.NAME.restoring-...``) and renamed: nobody ever sees half of it. Where the place is a
mount point, or its parent can't be written, it is filled inside and its entries are moved up, the one last without
which no server starts.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import pwd
import secrets
import shutil
import stat
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from backhaul.databases.prerequisites import Prerequisites, Program, find_program
from backhaul.errors import TargetError
from backhaul.formats.names import MANIFEST, is_backup_id
from backhaul.formats.quantities import format_size
from backhaul.model.manifest import SourceRecord, StreamRecord
from backhaul.processes.run import run_program
from backhaul.targets.base import Target
from backhaul.targets.command import CommandTarget
from backhaul.targets.file import FileTarget, sync_directory
from backhaul.targets.sections import Phase, Step

_TOLERATED = ("lost+found",)
# Directories that are looked into for backups, before they are replaced.
_MOST_LOOKED_AT = 20_000
_PREFIX = ".backhaul-restoring-"
_XATTRS = ("--acls", "--xattrs", "--xattrs-include=*")


class StagedDirectory:
    """See the module.

    Args:
        path: the place; absent, or empty, or with ``replace`` anything.
        replace: whether what is there may go.
        decisive: names that are moved last.
    """

    def __init__(self, path: str, *, replace: bool, decisive: Sequence[str] = ()) -> None:
        self.path = Path.cwd() / path
        self.staging = self.path
        self._replace = replace
        self._decisive = decisive
        self._inside = False
        self._begun = False

    def check(self, missing: Prerequisites, size: int) -> None:
        """Note what is in the way."""
        parent = self.path.parent
        if self.path.is_symlink() and not self.path.exists():
            missing.add("a directory", f"{self.path} is a link to nothing", "Name another place in --into.")
            return
        if self.path.exists() and not self.path.is_dir():
            missing.add(f"{self.path} to be a directory", "it is a file", "Name another place in --into.")
            return
        if not self.path.exists() and not parent.is_dir():
            missing.add(f"the directory {parent}", "it does not exist", f"mkdir -p {parent}")
            return
        found = self._found()
        if found and not self._replace:
            missing.add(
                f"{self.path} to be empty, or not to exist",
                f"it holds {', '.join(found[:3])}{' and more' * (len(found) > 3)}",
                "Name another directory in --into, or say --replace.",
            )
        backups = _backups_at(self.path)
        if backups:
            missing.add(
                f"a place without backups, and not {self.path}",
                backups,
                "Name another directory; --replace is not asked.",
            )
        server = _server_in(self.path)
        if server:
            missing.add(f"the server in {self.path} to be stopped", server, "Stop it, and restore again.")
        free = shutil.disk_usage(self.path if self.path.exists() else parent).free
        if free < size:
            missing.add(
                f"{format_size(size)} of room there",
                f"{format_size(free)} are free",
                "Make room, or name another place.",
            )

    def _found(self) -> list[str]:
        if not self.path.is_dir():
            return []
        return sorted(name for name in os.listdir(self.path) if name not in _TOLERATED)

    def begin(self) -> None:
        """Make the directory to fill.

        Raises:
            TargetError: it can't be made.
        """
        mark = secrets.token_hex(4)
        beside = self.path.parent / f".{self.path.name}.restoring-{mark}"
        try:
            self._inside = self.path.is_dir() and (
                self.path.is_mount() or self.path.is_symlink() or not os.access(self.path.parent, os.W_OK)
            )
            self.staging = self.path / f"{_PREFIX}{mark}" if self._inside else beside
            self.staging.mkdir(mode=0o700)
        except OSError as error:
            raise _failure(self.staging, error) from error
        self._begun = True

    def commit(self) -> None:
        """Put it into place.

        Raises:
            TargetError: it can't be.
        """
        try:
            _sync_tree(self.staging)
            if self._inside:
                self._move_up()
            else:
                self._rename()
        except OSError as error:
            raise _failure(self.path, error) from error
        self._begun = False

    def _rename(self) -> None:
        aside: Path | None = None
        if self.path.is_dir():
            status = self.path.stat()
            self.staging.chmod(stat.S_IMODE(status.st_mode))
            if os.geteuid() == 0:
                os.chown(self.staging, status.st_uid, status.st_gid)
            if self._found() and not self._replace:
                raise TargetError(
                    f"{self.path} is not empty any more",
                    "somebody filled it during the restore",
                    "Nothing of it was touched; say --replace to replace it.",
                )
            aside = self.staging.with_name(self.staging.name.replace("restoring", "replaced"))
            os.rename(self.path, aside)
        try:
            os.rename(self.staging, self.path)
        except BaseException:
            if aside is not None:
                os.rename(aside, self.path)
            raise
        self._begun = False
        sync_directory(self.path.parent)
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)

    def _move_up(self) -> None:
        if self._found() != [self.staging.name] and not self._replace:
            raise TargetError(
                f"{self.path} is not empty any more",
                "somebody filled it during the restore",
                "Nothing of it was touched; say --replace to replace it.",
            )
        aside = self.staging.with_name(self.staging.name.replace("restoring", "replaced"))
        aside.mkdir(mode=0o700)
        old = [name for name in self._found() if not name.startswith(".backhaul-")]
        old.sort(key=lambda name: name not in self._decisive)  # no server starts from here on
        new = sorted(os.listdir(self.staging), key=lambda name: (name in self._decisive, name))
        moves = [(self.path / name, aside / name) for name in old]
        moves += [(self.staging / name, self.path / name) for name in new]
        done: list[tuple[Path, Path]] = []
        try:
            for source, target in moves:
                if target.name in self._decisive:
                    sync_directory(self.path)
                done.append((source, target))
                os.rename(source, target)
            sync_directory(self.path)
        except BaseException:
            for source, target in reversed(done):
                if target.exists() and not source.exists():
                    os.rename(target, source)
            with contextlib.suppress(OSError):
                aside.rmdir()
            raise
        self._begun = False
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(self.staging, ignore_errors=True)

    def abort(self) -> None:
        """Remove what was begun. Harmless after ``commit``."""
        if self._begun:
            shutil.rmtree(self.staging, ignore_errors=True)
            self._begun = False

    def owner(self, account: str) -> tuple[int, int] | None:
        """Return whom the files are to belong to when root restores: the place's owner, else the account."""
        if os.geteuid() != 0:
            return None
        if self.path.is_dir() and self.path.stat().st_uid != 0:
            status = self.path.stat()
            return status.st_uid, status.st_gid
        try:
            entry = pwd.getpwnam(account)
        except KeyError:
            return None
        return entry.pw_uid, entry.pw_gid


class _Kind(msgspec.Struct, frozen=True):
    """What a kind of physical backup needs: programs, the entry last moved, whose files they are."""

    programs: tuple[str, ...]
    decisive: tuple[str, ...]
    account: str


_KINDS = {
    "postgresql+physical": _Kind(("tar",), ("PG_VERSION", "global"), "postgres"),
    "mariadb+physical": _Kind(("mbstream", "mariadb-backup"), ("ibdata1", "mysql"), "mysql"),
    "redis": _Kind((), ("dump.rdb",), "redis"),
    "dir": _Kind(("tar",), (), ""),
}
_INFO_FILES = ("xtrabackup_info", "mariadb_backup_info")
_COMPLETED = b"completed OK!"


class DirectoryRestore:
    """A physical backup, a Redis dump or a tar into a directory. See the module, and ``RestoreTarget``.

    Args:
        path: where to.
        replace: whether what is there may go.
        on_error_line: told each line of the programs' stderr that is news.
        hints: whether to say what to do next with what was restored.
    """

    def __init__(
        self,
        path: str,
        *,
        replace: bool = False,
        on_error_line: Callable[[bytes], None] | None = None,
        hints: bool = True,
    ) -> None:
        self._hints = hints
        self.name = path
        self.remarks: list[str] = []
        self.shortfalls: list[str] = []
        self._replace = replace
        self._path = path
        self._on_error_line = on_error_line
        self._directory: StagedDirectory | None = None
        self._programs: dict[str, Program] = {}
        self._source: SourceRecord | None = None
        self._stream = ""
        self._last = b""

    @property
    def _kind(self) -> _Kind:
        assert self._source is not None
        return _KINDS[self._source.kind]

    def check(self, source: SourceRecord, streams: Sequence[StreamRecord]) -> None:
        """See ``RestoreTarget.check``."""
        self._source = source
        self._stream = streams[0].name
        missing = Prerequisites(f"A restore into {self.name}")
        for name in self._kind.programs:
            program = missing.program(name)
            if program is not None:
                self._programs[name] = program
        backup = self._programs.get("mariadb-backup")
        made_by = source.tools.get("mariadb-backup", "")
        if backup is not None and made_by and backup.version.split(".")[:2] != made_by.split(".")[:2]:
            missing.add(
                f"mariadb-backup of version {'.'.join(made_by.split('.')[:2])}",
                f"the backup was made by {made_by}, and {backup.path} is of {backup.version}",
                "apt-get install mariadb-backup  (from where that server comes from)",
            )
        self._directory = StagedDirectory(self._path, replace=self._replace, decisive=self._kind.decisive)
        self._directory.check(missing, sum(stream.raw.size for stream in streams))
        missing.require()

    def phases(self, jobs: int) -> Sequence[Phase]:
        """See ``RestoreTarget.phases``."""
        assert self._directory is not None
        self._directory.begin()
        return (Phase("files", (Step(self._stream, lambda: self._target(jobs)),)),)

    def _target(self, jobs: int) -> Target:
        assert self._directory is not None and self._source is not None
        staging = str(self._directory.staging)
        if self._source.kind == "redis":
            return FileTarget(os.path.join(staging, "dump.rdb"))
        if self._source.kind == "mariadb+physical":
            command = [self._programs["mbstream"].path, "--extract", f"--parallel={jobs}", f"--directory={staging}"]
        else:
            command = [self._programs["tar"].path, "--extract", "--file=-", f"--directory={staging}"]
            command += ["--preserve-permissions", "--numeric-owner"]
            command += [*_XATTRS] if self._source.kind == "dir" else []
        return CommandTarget(
            command,
            self._on_error_line,
            name=f"{os.path.basename(command[0])} into {self.name}",
            discard_output=True,
            environment={**os.environ, "LC_ALL": "C"},
        )

    def commit(self) -> None:
        """See ``RestoreTarget.commit``."""
        assert self._directory is not None and self._source is not None
        staging = self._directory.staging
        if self._source.kind == "postgresql+physical":
            self._finish_postgresql(staging)
        elif self._source.kind == "mariadb+physical":
            self._finish_mariadb(staging)
        elif self._source.kind == "redis" and self._hints:
            self.remarks.append("a server with appendonly yes reads its append-only files instead of dump.rdb")
        starts = {"postgresql+physical": f"pg_ctl -D {self._path} start", "mariadb+physical": "systemctl start mariadb"}
        if self._hints and self._source.kind in starts:
            self.remarks.append(f"start it, as the account that owns it: {starts[self._source.kind]}")
        owner = self._directory.owner(self._kind.account) if self._kind.account else None
        if owner is not None:
            _chown_tree(staging, *owner)
        self._directory.commit()

    def _finish_postgresql(self, staging: Path) -> None:
        absent = [
            name for name in ("backup_manifest", "PG_VERSION", "global/pg_control") if not (staging / name).exists()
        ]
        if absent:
            raise _not_whole(self.name, f"there is no {absent[0]}")
        major = (staging / "PG_VERSION").read_text().strip()
        verify = find_program("pg_verifybackup", (f"/usr/lib/postgresql/{major}/bin", f"/usr/pgsql-{major}/bin"))
        if verify is None:
            self.remarks.append("pg_verifybackup is not here: files were not compared with the backup's own manifest")
            return
        # (Its look at the WAL needs the very server version; recovery looks at it in any case.)
        run_program([verify.path, "--no-parse-wal", "--quiet", str(staging)], "pg_verifybackup")

    def _finish_mariadb(self, staging: Path) -> None:
        if not any((staging / name).exists() for name in _INFO_FILES):
            raise _not_whole(self.name, "there is no xtrabackup_info, which is written last")
        program = self._programs["mariadb-backup"]
        run_program(
            [program.path, "--prepare", f"--target-dir={staging}"],
            "mariadb-backup --prepare",
            on_error_line=self._on_error_line,
            is_chatter=self._follow_prepare,
        )
        if _COMPLETED not in self._last:
            raise _not_whole(self.name, f"the last line of --prepare is {self._last.decode(errors='replace')!r}")

    def _follow_prepare(self, line: bytes) -> bool:
        if line.strip():
            self._last = line
        return b"rror" not in line

    def abort(self) -> None:
        """See ``RestoreTarget.abort``."""
        if self._directory is not None:
            self._directory.abort()


def _backups_at(path: Path) -> str:
    """Say which backups or mirrors a path holds, or lies in; or nothing."""
    for parent in (path, *path.parents):
        if is_backup_id(parent.name) and (parent / MANIFEST).exists():
            return f"it lies in the backup {parent}"
    with contextlib.suppress(OSError):
        beside = [entry.name for entry in path.parent.iterdir() if is_backup_id(entry.name)]
        if any((path.parent / name / MANIFEST).exists() for name in beside):
            return f"it lies in the series {path.parent}"
    for looked, (directory, names, _) in enumerate(os.walk(path)):
        held = [name for name in names if is_backup_id(name) and (Path(directory) / name / MANIFEST).exists()]
        if held:
            return f"it holds backups: {directory}/{held[0]}"
        if ".backhaul" in names:
            return f"it holds a mirror: {directory}"
        if looked > _MOST_LOOKED_AT:
            break
    return ""


def _server_in(path: Path) -> str:
    """Say which server runs on a data directory, or nothing."""
    with contextlib.suppress(OSError, ValueError):
        pid = int((path / "postmaster.pid").read_text().splitlines()[0])
        if Path(f"/proc/{pid}").exists():
            return f"its postmaster.pid names the process {pid}, which lives"
    for name in ("aria_log_control", "ibdata1"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path / name, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                return f"its file {name} is locked"
            finally:
                os.close(descriptor)
    return ""


def _not_whole(name: str, why: str) -> TargetError:
    return TargetError(
        f"The backup that was restored into {name} is not whole",
        why,
        "It was removed again. Restore an older one, and see how this one was made (backhaul show).",
    )


def _chown_tree(path: Path, uid: int, gid: int) -> None:
    os.chown(path, uid, gid)
    for directory, directories, files in os.walk(path):
        for name in (*directories, *files):
            os.chown(os.path.join(directory, name), uid, gid, follow_symlinks=False)


def _sync_tree(path: Path) -> None:
    """Have everything below on the disk before it gets its name."""
    if sys.platform == "linux":
        import ctypes

        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with contextlib.suppress(AttributeError):
                # One call for the file system, where an fsync for each file would be a wait for each.
                if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
                    number = ctypes.get_errno()
                    raise OSError(number, os.strerror(number))
                return
        finally:
            os.close(descriptor)
    os.sync()


def _failure(path: Path, error: OSError) -> TargetError:
    return TargetError(
        f"Could not write {path}", error.strerror or str(error), "Check the directory, its owner and its disk."
    )
