"""What must be in place before work starts: gathered, and said in one list."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from backhaul.errors import ConfigurationError

# The Debian packages that hold the programs; other systems have names like these.
PACKAGES = {
    "pg_dump": "postgresql-client",
    "pg_dumpall": "postgresql-client",
    "pg_restore": "postgresql-client",
    "psql": "postgresql-client",
    "pg_basebackup": "postgresql-client",
    "pg_amcheck": "postgresql",
    "pg_verifybackup": "postgresql",
    "initdb": "postgresql",
    "postgres": "postgresql",
    "mariadb-dump": "mariadb-client",
    "mariadb": "mariadb-client",
    "mariadb-backup": "mariadb-backup",
    "mbstream": "mariadb-backup",
    "mariadbd": "mariadb-server-core",
    "mariadb-install-db": "mariadb-server-core",
    "redis-server": "redis-server",
    "redis-check-rdb": "redis-tools",
    "tar": "tar",
    "setpriv": "util-linux",
}
_VERSION = re.compile(r"\b(?:Distrib |Ver )?(\d+(?:\.\d+)+)")
_TIMEOUT = 20.0


class Program(msgspec.Struct, frozen=True):
    """A program on this host, and its version as it says itself."""

    path: str
    version: str

    @property
    def major(self) -> int:
        """The first number of the version."""
        return int(self.version.partition(".")[0] or 0)


class Missing(msgspec.Struct, frozen=True):
    """One thing that is not in place: what, why it is needed or refused, and the command that mends it."""

    what: str
    why: str
    todo: str


class Prerequisites:
    """Gathers what is missing, and says all of it at once."""

    def __init__(self, purpose: str) -> None:
        self._purpose = purpose
        self.missing: list[Missing] = []

    def add(self, what: str, why: str, todo: str) -> None:
        """Note something that is not in place."""
        self.missing.append(Missing(what, why, todo))

    def program(self, name: str, directories: Sequence[str] = (), why: str = "") -> Program | None:
        """Return a program, or note that it is missing."""
        found = find_program(name, directories)
        if found is None:
            package = PACKAGES.get(name, name)
            self.add(
                f"the program {name}",
                why or "it is neither on the PATH nor where packages put it",
                f"apt-get install {package}",
            )
        return found

    def require(self) -> None:
        """Raise one error that names everything that is missing.

        Raises:
            ConfigurationError: something is.
        """
        if not self.missing:
            return
        if len(self.missing) == 1:
            only = self.missing[0]
            raise ConfigurationError(f"{self._purpose} needs {only.what}", only.why, only.todo)
        raise ConfigurationError(
            f"{self._purpose} needs {len(self.missing)} things that are not in place",
            "\n".join(f"{each.what}: {each.why}" for each in self.missing),
            "\n".join(dict.fromkeys(each.todo for each in self.missing)),
        )


def find_program(name: str, directories: Sequence[str] = ()) -> Program | None:
    """Return the first of that name in the directories, or on the PATH and where servers lie; None if there is none."""
    for directory in directories:
        path = Path(directory) / name
        if path.is_file() and os.access(path, os.X_OK):
            return Program(str(path), version_of(str(path)))
    path_of_all = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/local/sbin", "/usr/sbin", "/sbin"])
    found = shutil.which(name, path=path_of_all)
    return Program(found, version_of(found)) if found else None


def version_of(path: str) -> str:
    """Return the version that a program says with ``--version``, or ``0``."""
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, timeout=_TIMEOUT, check=False, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired):
        return "0"
    text = (done.stdout or done.stderr).decode(errors="replace")
    # (``mariadb-dump  Ver 10.19 Distrib 10.11.19-MariaDB``: what follows Distrib is the release.)
    _, distribution, release = text.partition("Distrib ")
    match = _VERSION.search(release if distribution else text)
    return match[1] if match else "0"


def shortened(name: str, size: int) -> str:
    """Return a name of at most that many bytes; two that are cut differ where the whole ones do."""
    encoded = name.encode()
    if len(encoded) <= size:
        return name
    mark = hashlib.blake2s(encoded, digest_size=4).hexdigest()
    return encoded[: size - len(mark) - 1].decode(errors="ignore") + f"_{mark}"


def read_password(path: str) -> str:
    """Return the first line of a password file.

    Raises:
        ConfigurationError: it can't be read, is empty, or others may read it.
    """
    try:
        with open(path, encoding="utf-8") as file:
            mode = os.fstat(file.fileno()).st_mode
            password = file.readline().rstrip("\r\n")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ConfigurationError(
            f"Could not read the password file {path}", why, "Check its path and owner."
        ) from error
    if mode & 0o077:
        raise ConfigurationError(
            f"The password file {path} is open to others", f"its mode is {mode & 0o777:o}", f"chmod 600 {path}"
        )
    if not password:
        raise ConfigurationError(f"The password file {path} is empty", "its first line is", "Write the password there.")
    return password
