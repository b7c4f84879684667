"""The keys of a fan-out: one for each host, all made in one place, or one that all hosts share.

Nothing is sent anywhere: what is returned says what belongs where, and a person copies it.

A directory of keys has ``ca.key``, which makes keys and stays where it is, and ``HOST.key`` for each host.
All files of a run are written under other names first, and get their own when every one is on the disk:
a disk that is full or a crash leaves the directory as it was, or with whole files.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import secrets
import shlex
import stat
from collections.abc import Mapping
from pathlib import Path

import msgspec

from backhaul.errors import ConfigurationError, FormatError, UsageError
from backhaul.network.authority import (
    ROLES,
    SHARED_KEY_SIZE,
    Authority,
    host_name,
    new_authority,
    new_shared_key,
    read_authority,
    read_bundle,
)
from backhaul.network.credentials import read_private_file
from backhaul.operations.atomic_file import write_atomically
from backhaul.targets.file import sync_directory

AUTHORITY_NAME = "ca.key"
_SUFFIX = ".key"
# Where ``credentials.default_key_path`` looks when root runs backhaul.
_REMOTE_PATH = "/etc/backhaul/fan-out.key"


class FanOutKey(msgspec.Struct, frozen=True, kw_only=True):
    """A key file that was made.

    Attributes:
        host: whose it is; None if all hosts share it.
        roles: what it allows: ``send``, ``receive``.
        path: the file.
        expires: until when it is good (aware); None for ever.
        renewed: whether it took the place of an older one.
        copy_with: the command that brings it to its host.
    """

    host: str | None
    roles: tuple[str, ...]
    path: str
    expires: dt.datetime | None
    renewed: bool
    copy_with: str


class FanOutKeys(msgspec.Struct, frozen=True, kw_only=True):
    """What ``backhaul keys`` made.

    Attributes:
        kind: ``certificate`` or ``shared``.
        authority: the file that makes keys, never to be copied to a host; None with a shared key.
        authority_is_new: whether it was made just now.
        authority_expires: until when it is good (aware); None with a shared key.
        keys: the key files, by host.
    """

    kind: str
    authority: str | None
    authority_is_new: bool
    authority_expires: dt.datetime | None
    keys: tuple[FanOutKey, ...]


def make_keys(directory: str, hosts: Mapping[str, frozenset[str]], *, renew: bool = False) -> FanOutKeys:
    """Make a key for each host, and the authority that signs them if the directory has none yet.

    Args:
        directory: where they go; made if it is not there (mode 0700).
        hosts: by their names or addresses, what each may do.
        renew: replace the keys of hosts that have one.

    Raises:
        UsageError: a name is none that a host can have, or there is no host.
        ConfigurationError: a host has a key already, or the directory can't be used. Nothing was made then.
    """
    wanted = _checked(hosts)
    folder = Path(directory)
    now = dt.datetime.now(dt.UTC)
    is_new_folder = _is_new(folder)
    authority, is_new = (None, True) if is_new_folder else _found_authority(folder, now)
    authority = authority or new_authority(now)
    paths = {name: folder / (name + _SUFFIX) for name in wanted}
    there = sorted(name for name, path in paths.items() if os.path.lexists(path))
    if there and not renew:
        rest = sorted(set(wanted) - set(there))
        raise ConfigurationError(
            f"{' and '.join(str(paths[name]) for name in there)} {'is' if len(there) == 1 else 'are'} not overwritten",
            "the host may be using it" if len(there) == 1 else "the hosts may be using them",
            f"Name those that are new only ({', '.join(rest)}), or add --renew." if rest else "Add --renew.",
        )
    bundles = {name: authority.issue(name, roles, now) for name, roles in sorted(wanted.items())}
    files = [(folder / AUTHORITY_NAME, authority.pem(), False)] if is_new else []
    files += [(paths[name], content, name in there) for name, content in bundles.items()]
    _write_all(folder, files, is_new_folder=is_new_folder)
    return FanOutKeys(
        kind="certificate",
        authority=str(folder / AUTHORITY_NAME),
        authority_is_new=is_new,
        authority_expires=authority.expires,
        keys=tuple(
            FanOutKey(
                host=name,
                roles=tuple(sorted(wanted[name], reverse=True)),
                path=str(paths[name]),
                expires=read_bundle(content).expires,
                renewed=name in there,
                copy_with=_copy_command(paths[name], name),
            )
            for name, content in bundles.items()
        ),
    )


def make_shared_key(path: str) -> FanOutKeys:
    """Make a key that all hosts share, in a file of its own (mode 0600).

    Raises:
        ConfigurationError: the file exists, or can't be written; then there is none.
    """
    file = Path(path)
    if os.path.lexists(file):
        why = "it is a directory" if file.is_dir() else "it exists, and hosts may be using the key in it"
        raise ConfigurationError(f"{path} is not overwritten", why, "Choose another name.")
    content = new_shared_key(secrets.token_bytes(SHARED_KEY_SIZE))
    _write_all(file.parent, [(file, content, False)], is_new_folder=False)
    key = FanOutKey(
        host=None,
        roles=tuple(sorted(ROLES, reverse=True)),
        path=path,
        expires=None,
        renewed=False,
        copy_with=_copy_command(file, "HOST"),
    )
    return FanOutKeys(kind="shared", authority=None, authority_is_new=False, authority_expires=None, keys=(key,))


def _checked(hosts: Mapping[str, frozenset[str]]) -> dict[str, frozenset[str]]:
    """Return the hosts by the one spelling of their names."""
    wanted: dict[str, frozenset[str]] = {}
    for text, roles in hosts.items():
        name = host_name(text)
        if name + _SUFFIX == AUTHORITY_NAME:
            raise UsageError(
                f"A host can't be called {name!r} here",
                f"its file would be {AUTHORITY_NAME}, which is what makes the keys",
                "Use its full name, such as ca.example.net, or its address.",
            )
        wanted[name] = wanted.get(name, frozenset()) | roles
    if not wanted:
        raise UsageError("No host is named", "each gets a key of its own", "Add --sender HOST and --receiver HOST.")
    return wanted


def _is_new(folder: Path) -> bool:
    """Tell whether a directory is yet to be made; refuse one that is not safe to keep keys in."""
    try:
        status = os.stat(folder)
    except FileNotFoundError:
        return True
    except OSError as error:
        raise _unwritable(folder, error) from error
    if not stat.S_ISDIR(status.st_mode):
        raise ConfigurationError(f"{folder} is no directory", "keys are to go into it", "Name a directory.")
    if status.st_mode & 0o022:
        raise ConfigurationError(
            f"{folder} is no place for keys",
            "others than its owner can put files there, and take them away",
            f"chmod 700 {shlex.quote(str(folder))}, or name a directory that is not there yet.",
        )
    return False


def _found_authority(folder: Path, now: dt.datetime) -> tuple[Authority | None, bool]:
    """Return the authority of a directory that is there, and whether one is to be made."""
    path = folder / AUTHORITY_NAME
    if not os.path.lexists(path):
        try:
            orphans = sorted(name for name in os.listdir(folder) if name.endswith(_SUFFIX))
        except OSError as error:
            raise _unwritable(folder, error) from error
        if AUTHORITY_NAME in orphans:
            return _found_authority(folder, now)  # another run has made it in between
        if orphans:
            # A new one would make keys that the hosts of the old one refuse.
            raise ConfigurationError(
                f"{folder} has no {AUTHORITY_NAME}",
                f"there are keys ({', '.join(orphans[:3])}{', ...' if len(orphans) > 3 else ''}), "
                "and what made them is gone",
                f"Bring {AUTHORITY_NAME} back, or begin anew in another directory, with keys for all hosts.",
            )
        return None, True
    try:
        authority = read_authority(read_private_file(path))
    except FormatError as error:
        raise ConfigurationError(
            f"{path} can't be used",
            f"{error.what[0].lower()}{error.what[1:]}: {error.why}",
            "Restore it from a copy, or begin anew in another directory, with keys for all hosts.",
        ) from error
    if now >= authority.expires:
        raise ConfigurationError(
            f"{path} has expired",
            f"it was good until {authority.expires:%Y-%m-%d}",
            "Begin anew in another directory, with keys for all hosts.",
        )
    return authority, False


def _write_all(folder: Path, files: list[tuple[Path, bytes, bool]], *, is_new_folder: bool) -> None:
    """Write files and flush them; then give them their names: those with True replace what is there."""
    # (Not by the host's name: with more added to it, a long one would be too long for a file.)
    temporaries = [folder / f".new-{secrets.token_hex(8)}" for _ in files]
    made_folder = done = False
    try:
        if is_new_folder:
            folder.mkdir(mode=0o700, parents=True)
            made_folder = True
            sync_directory(folder.parent)
        for temporary, (_, content, _) in zip(temporaries, files, strict=True):
            write_atomically(temporary, content)
        for temporary, (path, _, replaces) in zip(temporaries, files, strict=True):
            if replaces:
                os.rename(temporary, path)
            else:
                os.link(temporary, path)  # (Unlike a rename it fails if another run was here first.)
            # In this order on the disk, too: no host's key without what made it.
            sync_directory(folder)
        done = True
    except FileExistsError as error:
        path = error.filename2 or error.filename
        raise ConfigurationError(
            f"{path} is not overwritten", "it has just been made by another run", "Run the command again."
        ) from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink()
        with contextlib.suppress(OSError):
            if made_folder and not done:
                folder.rmdir()  # (Refused if anything is in it.)


def _copy_command(path: Path, host: str) -> str:
    source = str(path)
    # scp takes what is before a colon for a host, and a dash for an option, but not behind a slash.
    if not source.startswith("/"):
        first = source.split("/", 1)[0]
        source = f"./{source}" if ":" in first or first.startswith("-") else source
    target = f"[{host}]" if ":" in host else host
    return shlex.join(["scp", source, f"{target}:{_REMOTE_PATH}"])


def _unwritable(folder: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{folder} can't take the keys", error.strerror or str(error), "Name a directory of yours, with room."
    )
