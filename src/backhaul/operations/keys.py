"""Key files: a new identity, and those that there are, read as the ``age`` program reads them."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from pathlib import Path

from backhaul.errors import ConfigurationError, FormatError, IdentityError, IntegrityError, UsageError
from backhaul.formats import age, age_armor
from backhaul.formats.age_keys import (
    Identity,
    PassphraseIdentity,
    is_secret,
    key_id,
    new_identity,
    parse_identities,
    parse_recipients,
)
from backhaul.model.results import KeygenResult
from backhaul.targets.file import sync_directory
from backhaul.transforms.encrypt import opened_chunks

Ask = Callable[[str], str]
"""Asks a person for the passphrase of the file that is named, and returns it."""

_LARGEST_KEY_FILE = 16 << 20


def keygen(path: str) -> KeygenResult:
    """Make a new identity and write it to a file of its own, readable by its owner alone.

    Raises:
        UsageError: the path is a secret itself.
        ConfigurationError: the file exists, or can't be written; then there is none.
    """
    if is_secret(path):
        raise UsageError(
            "-o takes the name of a file", "it was given the secret half of a key", "Take that key for known to others."
        )
    identity = new_identity(secrets.token_bytes)
    text = f"# recipient: {identity.recipient}\n# key id: {key_id(identity.recipient)}\n{identity.text()}\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        why = "it is a directory" if Path(path).is_dir() else "it exists, and backups may depend on the key in it"
        raise ConfigurationError(f"{path} is not overwritten", why, "Choose another name.") from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
        sync_directory(Path(path).parent)
    except OSError as error:
        os.unlink(path)
        raise _unwritable(path, error) from error
    return KeygenResult(path=path, recipient=identity.recipient, key_id=key_id(identity.recipient))


def read_recipients(path: str) -> list[str]:
    """Return the recipients in a file, one a line, without their comments.

    Raises:
        UsageError: it is stdin, or a secret itself.
        ConfigurationError: it can't be read, or a line is no recipient.
    """
    if path == "-" or is_secret(path):
        raise UsageError(
            "--encrypt-to-file takes the name of a file",
            "stdin is the stream's" if path == "-" else "it was given the secret half of a key itself",
            "Write the recipients into a file, one a line.",
        )
    content = _read_file(path, "file of recipients")
    try:
        return [recipient.text for recipient in parse_recipients(content.decode())]
    except FormatError as error:
        raise ConfigurationError(f"{path}: {error.what}", error.why, error.todo) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is no file of recipients", "it is no text", "Name another file.") from error


def read_identities(path: str, ask: Ask | None = None) -> list[Identity]:
    """Return the identities in a file: age's own, those that ``age -p`` encrypted, or an SSH private key.

    Args:
        path: the file, or ``-`` for stdin.
        ask: asked for the passphrase where one is needed.

    Raises:
        UsageError: the path is an identity itself.
        IdentityError: the file can't be read or used. Nothing of its content is ever quoted.
    """
    if path.startswith("age1") and not Path(path).exists():
        raise UsageError(
            "--identity takes the file of a key's secret half", f"{path} is the public half", "Name the key file."
        )
    if is_secret(path):
        raise UsageError(
            "--identity takes a file, and was given the secret itself",
            "a secret in a command line can be read by everybody on this host",
            "Write it into a file that only you can read, and name that. Take the key for known to others.",
        )
    try:
        return _identities_in(_read_file(path, "identity file"), path, ask)
    except FormatError as error:
        why, todo = f"{error.what}: {error.why}", error.todo or "Name another file, or use a copy of this one."
        raise IdentityError(f"The identity file {path} can't be used", why, todo) from error
    except ConfigurationError as error:
        raise IdentityError(error.what, error.why, error.todo) from error


def _identities_in(content: bytes, path: str, ask: Ask | None) -> list[Identity]:
    if age_armor.is_armored(content):
        content = age_armor.decode(content)
    if content.startswith(b"age-encryption.org/"):
        if not any(stanza.type == "scrypt" for stanza in age.parse_header(content)[0].stanzas):
            raise IdentityError(
                f"The identity file {path} can't be opened",
                "it is encrypted for another key, not with a passphrase",
                "Pipe the identity in: age -d -i KEYFILE ... | backhaul pull --identity - ...",
            )
        try:
            passphrase = PassphraseIdentity(_passphrase(path, ask))
            content = b"".join(opened_chunks(content, [passphrase]))
        except IdentityError as error:
            if error.todo:
                raise
            raise IdentityError(
                f"The identity file {path} can't be opened",
                "the passphrase is wrong",
                "Try again, or pipe the identity in: age -d ... | backhaul pull --identity - ...",
            ) from error
        except IntegrityError as error:
            raise IdentityError(f"The identity file {path} is damaged", error.why, "Use a copy of it.") from error
        except MemoryError as error:
            raise IdentityError(
                f"The identity file {path} can't be opened here",
                "its passphrase takes more memory than there is",
                "Open it elsewhere: age -d ... | ssh HOST backhaul pull --identity - ...",
            ) from error
    if b"-----BEGIN" in content:
        from backhaul.formats import age_ssh

        identity = age_ssh.parse_identity(content)
        if identity is None:
            age_ssh.check_passphrases_work(content)
            identity = age_ssh.parse_identity(content, _passphrase(path, ask))
        assert identity is not None  # with a passphrase it is there, or an error says why not
        return [identity]
    try:
        return parse_identities(content.decode())
    except UnicodeDecodeError:
        raise FormatError("It is no identity file", "it is no text", "Name another file.") from None


def _passphrase(path: str, ask: Ask | None) -> str:
    if ask is None:
        raise IdentityError(
            f"The identity file {path} takes a passphrase",
            "there is nobody to ask for it",
            "Run this on a terminal, or pipe the identity in: age -d ... | backhaul pull --identity - ...",
        )
    return ask(path)


def _read_file(path: str, kind: str) -> bytes:
    try:
        with open(0 if path == "-" else path, "rb", closefd=path != "-") as file:
            content = file.read(_LARGEST_KEY_FILE + 1)
    except OSError as error:
        raise ConfigurationError(
            f"The {kind} {path} can't be read", error.strerror or str(error), "Correct its name or its permissions."
        ) from error
    if len(content) > _LARGEST_KEY_FILE:
        raise ConfigurationError(f"{path} is no {kind}", "it is far too large", "Name another file.")
    return content


def _unwritable(path: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{path} can't be written", error.strerror or str(error), "Name a file in a directory of yours, with room."
    )
