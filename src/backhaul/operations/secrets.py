"""Secrets are fetched when they are needed, each time: one that was changed counts at once, and none is kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from backhaul.errors import ConfigurationError
from backhaul.formats.secret import describe_secret
from backhaul.model.secret import COMMAND, CREDENTIAL, ENV, FILE, Secret
from backhaul.processes.ask import ask_program

COMMAND_TIMEOUT = 30.0
_LONGEST = 1 << 16


def resolve(secret: Secret, what: str, *, command_timeout: float = COMMAND_TIMEOUT) -> str:
    """Return the secret itself, without the newline at its end.

    Args:
        secret: where it is.
        what: whose it is, for messages: "the password of [notify.ops]".
        command_timeout: seconds that a command may take.

    Raises:
        ConfigurationError: it is not there, can't be read, is empty or no text, or its command failed or took
            longer than ``command_timeout``. The message never holds any of it.
    """
    place = describe_secret(secret)
    if secret.source == ENV:
        name = secret.reference[0]
        text = os.environ.get(name)
        if text is None:
            raise _missing(what, f"{place} is not set", f"Set {name} for the account and the unit that run Backhaul.")
    else:
        if secret.source == COMMAND:
            content = _from_command(secret, what, command_timeout)
        else:
            content = _from_file(_path(secret, what), what, place)
        if len(content) > _LONGEST:
            raise _missing(
                what, f"what {place} holds is longer than {_LONGEST} bytes", "That is no secret: look at it."
            )
        try:
            text = content.decode()
        except UnicodeDecodeError:
            raise _missing(what, f"what {place} holds is no text (UTF-8)", "Write it there as text.") from None
    text = text.rstrip("\r\n")
    if not text:
        raise _missing(what, f"{place} is empty", "Write the secret there.")
    return text


def exposure(secret: Secret) -> str:
    """Say who else can read the file of a secret; empty where only its owner and group can, or nobody knows."""
    if secret.source not in (FILE, CREDENTIAL):
        return ""
    try:
        path = _path(secret, "it")
        mode = path.stat().st_mode
    except (ConfigurationError, OSError):
        return ""
    if mode & stat.S_IROTH:
        return f"{path} can be read by every account of this host: chmod o-rwx {path}"
    return ""


def _path(secret: Secret, what: str) -> Path:
    name = secret.reference[0]
    if secret.source == FILE:
        try:
            return Path(name).expanduser()
        except RuntimeError:
            raise _missing(what, f"nobody knows the home directory for {name}", "Write the whole path.") from None
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if not directory:
        raise _missing(
            what,
            f"{describe_secret(secret)} comes from systemd, and this process was given none",
            f"Add LoadCredential={name}:/path to the unit, or name a file for runs by hand.",
        )
    return Path(directory) / name


def _from_file(path: Path, what: str, place: str) -> bytes:
    try:
        # A pipe would be waited for, for ever.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise _missing(what, f"{place} is no plain file", "Name a file that holds the secret.")
            return file.read(_LONGEST + 1)
    except OSError as error:
        todo = {
            FileNotFoundError: "Write the secret there, readable only by the account that runs Backhaul (chmod 600).",
            PermissionError: f"Let the account that runs Backhaul (uid {os.geteuid()}) read it.",
        }.get(type(error), "Make it readable, or name another place.")
        raise _missing(what, f"{place}: {error.strerror or error}", todo) from error


def _from_command(secret: Secret, what: str, seconds: float) -> bytes:
    place = describe_secret(secret)
    answer = ask_program(secret.reference, seconds=seconds, most=_LONGEST + 1)
    if answer.status is None:
        raise _missing(
            what,
            f"{place} took longer than {seconds:.0f} s and was ended",
            "It may wait for a passphrase: it must answer without anybody there.",
        )
    if not answer.status.ok:
        words = f"; its last words:\n{answer.words}" if answer.words else ""
        raise _missing(what, f"{place} failed: {answer.status}{words}", "Run it by hand, as the same account.")
    return answer.output


def _missing(what: str, why: str, todo: str) -> ConfigurationError:
    return ConfigurationError(f"{what[:1].upper()}{what[1:]} can't be had", why, todo)
