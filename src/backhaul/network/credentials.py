"""What a host shows to others, and how it checks them: its key file, read once, used for every connection."""

from __future__ import annotations

import datetime as dt
import os
import shlex
import socket
import ssl
import stat
from pathlib import Path

from backhaul.errors import ConfigurationError, FormatError, UsageError
from backhaul.network.authority import (
    ROLES,
    Bundle,
    is_shared_key,
    read_bundle,
    read_shared_key,
    shared_authority,
)
from backhaul.network.handshake import Handshake, Kind, Own, Peer, renewal

__all__ = ["Credentials", "Kind", "Peer", "credentials_from", "default_key_path", "load_credentials", "plain"]

_KEY_NAME = "fan-out.key"
_LARGEST_KEY_FILE = 1 << 20


class Credentials:
    """What this host shows to others, and how it checks them. One may serve any number of threads at once.

    Attributes:
        name: this host's name as others will see it: the certificate's, where there is one.
        roles: what this host may do.
        kind: ``certificate``, ``shared``, or ``plain`` for no key at all.
        path: the key file; None for ``plain``.
        expires: until when it is good (aware); None for ever.
    """

    def __init__(
        self,
        *,
        name: str,
        roles: frozenset[str],
        kind: Kind,
        path: Path | None = None,
        expires: dt.datetime | None = None,
        contexts: tuple[ssl.SSLContext, ssl.SSLContext] | None = None,
    ) -> None:
        self.name = name
        self.roles = roles
        self.kind = kind
        self.path = path
        self.expires = expires
        self._contexts = contexts

    def secure(
        self, sock: socket.socket, *, server_side: bool, expect_role: str, timeout: float
    ) -> tuple[socket.socket, Peer]:
        """Have both sides of a new connection show who they are.

        Args:
            sock: the connected socket. From here on it is this call's: use what is returned in its place. It
                keeps its time-out. When this raises, the connection is closed.
            server_side: whether the other side connected to this one.
            expect_role: the role that the other side must have, ``send`` or ``receive``.
            timeout: seconds for all of it. (A refusal may take ``LINGER`` seconds more.)

        Returns:
            the socket to go on with, and who is there. Behind TLS two threads must not use it at the same
            time, not even one reading and one writing: Python's ssl does not keep them apart. An end of file
            is as easily forged as with a plain socket: what is sent needs an end mark of its own.

        Raises:
            PeerError: it is not who it must be, or did not say in time. ``details["reason"]`` is ``key`` (it
                is not of the same authority, or shows no certificate), ``plain`` (one of the two has no
                key), ``kind`` (a shared key against a certificate), ``clock``, ``role``, ``timeout``,
                ``closed``, ``stranger`` (no Backhaul, or another version) or ``protocol``.
        """
        context = self._contexts[0 if server_side else 1] if self._contexts else None
        own = Own(self.name, self.roles, self.kind, self.expires)
        return Handshake(sock, own, server_side=server_side, timeout=timeout).run(context, expect_role)


def plain(name: str) -> Credentials:
    """Return what a host has that shows nothing and checks nobody: for networks where all hosts are trusted.

    Args:
        name: this host's name.
    """
    return Credentials(name=name, roles=ROLES, kind="plain")


def default_key_path() -> Path:
    """Return where this host's key file lies, or would: root's in ``/etc/backhaul``, a user's with their config."""
    if os.geteuid() == 0:
        return Path("/etc/backhaul") / _KEY_NAME
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "backhaul" / _KEY_NAME


def load_credentials(path: str | os.PathLike[str], *, name: str) -> Credentials:
    """Read this host's key file: a bundle with a certificate, or a shared key.

    Args:
        path: the file. Nobody but its owner may be able to read or write it.
        name: this host's name. It counts with a shared key only; a certificate has its own.

    Raises:
        ConfigurationError: the file is missing, damaged, open to others, or expired.
    """
    file = Path(path)
    content = read_private_file(file)
    try:
        if is_shared_key(content):
            return _from_shared_key(read_shared_key(content), file, name)
        return credentials_from(read_bundle(content), file, now=_now())
    except FormatError as error:
        raise ConfigurationError(
            f"The key file {file} can't be used", f"{error.what[0].lower()}{error.what[1:]}: {error.why}", error.todo
        ) from error


def _from_shared_key(secret: bytes, path: Path, name: str) -> Credentials:
    try:
        content = shared_authority(secret).issue_for_ever(name)
    except UsageError as error:
        raise ConfigurationError(f"This host can't be called {name!r}", error.why, error.todo) from error
    bundle = read_bundle(content)
    return Credentials(name=bundle.name, roles=bundle.roles, kind="shared", path=path, contexts=_contexts(bundle, path))


def credentials_from(bundle: Bundle, path: Path, *, now: dt.datetime) -> Credentials:
    """Return the credentials that a host's bundle stands for.

    Args:
        bundle: what the file holds.
        path: the file, for messages.
        now: the time (aware).

    Raises:
        ConfigurationError: it is expired, or not valid yet.
    """
    clock = f"by the clock of this host: {now.astimezone(dt.UTC):%Y-%m-%d %H:%M} UTC"
    if now >= bundle.expires:
        raise ConfigurationError(
            f"The key file {path} has expired",
            f"it was good until {bundle.expires:%Y-%m-%d %H:%M} UTC, {clock}",
            f"Make a new one, where ca.key is: {renewal(bundle.name, bundle.roles)}",
        )
    if now < bundle.begins:
        raise ConfigurationError(
            f"The key file {path} is not valid yet",
            f"it is good from {bundle.begins:%Y-%m-%d %H:%M} UTC on, {clock}",
            "Set the clock of this host right.",
        )
    return Credentials(
        name=bundle.name,
        roles=bundle.roles,
        kind="certificate",
        path=path,
        expires=bundle.expires,
        contexts=_contexts(bundle, path),
    )


def read_private_file(path: Path) -> bytes:
    """Return the content of a file with a secret.

    Raises:
        ConfigurationError: it can't be read, is no file, is far too large, or is open to group or others.
    """
    try:
        # Not blocking: nobody may ever write to what turns out to be a pipe.
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"There is no key file {path}",
            "no such file or directory",
            "Make one with backhaul keys and copy it here, or name the one that there is.",
        ) from error
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigurationError(f"{path} is no key file", "it is no file at all", "Name the key file.")
        if status.st_mode & 0o077:
            raise ConfigurationError(
                f"The key file {path} is open to others",
                f"its permissions are {stat.S_IMODE(status.st_mode):04o}: others than its owner can read or change it",
                f"chmod 600 {shlex.quote(str(path))}, and think about who may have copied it.",
            )
        with open(descriptor, "rb", closefd=False) as file:
            content = file.read(_LARGEST_KEY_FILE + 1)
    except OSError as error:
        raise _unreadable(path, error) from error
    finally:
        os.close(descriptor)
    if len(content) > _LARGEST_KEY_FILE:
        raise ConfigurationError(f"{path} is no key file", "it is far too large", "Name the key file.")
    return content


def _unreadable(path: Path, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"The key file {path} can't be read", error.strerror or str(error), "Correct its name or its permissions."
    )


def _contexts(bundle: Bundle, path: Path) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """Return the TLS settings of a server and of a client."""
    contexts = (ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    try:
        for context in contexts:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_REQUIRED
            context.minimum_version = ssl.TLSVersion.TLSv1_3
            context.maximum_version = ssl.TLSVersion.TLSv1_3
            # This one authority, and none of the system's.
            context.load_verify_locations(cadata=bundle.trusted.decode())
            _load_chain(context, bundle.chain)
        # Nobody resumes a session. Tickets that nobody reads would lie before the end of a connection.
        contexts[0].num_tickets = 0
    except OSError as error:  # (ssl.SSLError is one.)
        raise ConfigurationError(
            f"The key file {path} can't be used", f"TLS: {error}", "Make a new one: backhaul keys DIR --renew ..."
        ) from error
    return contexts


def _load_chain(context: ssl.SSLContext, chain: bytes) -> None:
    # The ssl module takes a key from a path only. This one is memory: no disk ever has a copy.
    descriptor = os.memfd_create("backhaul-key", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "wb") as file:
        file.write(chain)
        file.flush()
        context.load_cert_chain(f"/proc/self/fd/{descriptor}")


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)
