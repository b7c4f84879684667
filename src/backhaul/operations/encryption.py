"""Who may read a backup, and whether it is the one that was pushed: key files, the stream's key, the manifest's MAC.

A push needs recipients only, which are public. Reading needs an identity, and with it every reading verb first makes
sure of the manifest, before it believes anything that the manifest says.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping, Sequence

import msgspec

from backhaul.errors import (
    BackhaulError,
    ConfigurationError,
    FormatError,
    IdentityError,
    IntegrityError,
    ObjectNotFoundError,
    UsageError,
)
from backhaul.formats import age, age_armor, names
from backhaul.formats import manifest as manifest_format
from backhaul.formats.age_keys import (
    IDENTITY_PREFIX,
    Identity,
    PassphraseIdentity,
    Recipient,
    key_id,
    new_identity,
    parse_identities,
    parse_recipient,
    parse_recipients,
)
from backhaul.model.manifest import Manifest, StreamRecord
from backhaul.model.results import KeygenResult
from backhaul.operations.series import CommittedBackup
from backhaul.stores.base import Store
from backhaul.transforms.encrypt import StreamKey, new_key, open_key, opened_chunks

Ask = Callable[[str], str]
"""Asks a person for the passphrase of the file that is named, and returns it."""

_LARGEST_KEY_FILE = 16 << 20
_REREADS = 2


# -- key files -------------------------------------------------------------------------------------------


def keygen(path: str) -> KeygenResult:
    """Make a new identity and write it to a file of its own, readable by its owner alone.

    Raises:
        ConfigurationError: the file exists, or can't be written; then there is none.
    """
    if _is_secret(path):
        raise UsageError(
            "-o takes the name of a file", "it was given the secret half of a key", "Take that key for known to others."
        )
    identity = new_identity(secrets.token_bytes)
    text = f"# recipient: {identity.recipient}\n# key id: {key_id(identity.recipient)}\n{identity.text()}\n"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError as error:
        raise ConfigurationError(
            f"{path} is not overwritten",
            "it exists, and backups may depend on the key in it",
            "Choose another name.",
        ) from error
    except OSError as error:
        raise _unwritable(path, error) from error
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(descriptor)
        _flush_directory(os.path.dirname(path) or ".")
    except OSError as error:
        os.unlink(path)
        raise _unwritable(path, error) from error
    return KeygenResult(path=path, recipient=identity.recipient, key_id=key_id(identity.recipient))


def read_recipients(path: str) -> list[str]:
    """Return the recipients in a file, one a line, without their comments.

    Raises:
        ConfigurationError: it can't be read, or a line is no recipient.
    """
    if path == "-" or _is_secret(path):
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
    if _is_secret(path):
        raise UsageError(
            "--identity takes a file, and was given the secret itself",
            "a secret in a command line can be read by everybody on this host",
            "Write it into a file that only you can read, and name that. Take the key for known to others.",
        )
    try:
        return _identities_in(_read_file(path, "identity file"), path, ask)
    except FormatError as error:
        raise IdentityError(
            f"The identity file {path} can't be used", f"{error.what}: {error.why}", error.todo
        ) from error
    except ConfigurationError as error:
        raise IdentityError(error.what, error.why, error.todo) from error


def _is_secret(text: str) -> bool:
    return IDENTITY_PREFIX in text.upper()


def _identities_in(content: bytes, path: str, ask: Ask | None) -> list[Identity]:
    if age_armor.is_armored(content):
        content = age_armor.decode(content)
    if content.startswith(b"age-encryption.org/"):
        if not any(stanza.type == "scrypt" for stanza in age.parse_header(content)[0].stanzas):
            raise IdentityError(
                f"The identity file {path} can't be opened",
                "it is encrypted for another key, not with a passphrase",
                "Pipe it in: age -d -i KEYFILE ... | backhaul pull --identity - ...",
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
                "Try again, or pipe it in: age -d ... | backhaul pull --identity - ...",
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


def _flush_directory(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _unwritable(path: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"{path} can't be written", error.strerror or str(error), "Name a file in a directory of yours, with room."
    )


# -- push ------------------------------------------------------------------------------------------------


def recipients_of(texts: Sequence[str]) -> list[Recipient]:
    """Return the recipients of a push, each once.

    Raises:
        UsageError: one is none.
    """
    found: dict[str, Recipient] = {}
    for text in texts:
        try:
            recipient = parse_recipient(text.strip())
        except FormatError as error:
            raise UsageError(error.what, error.why, error.todo) from error
        found[recipient.text] = recipient
    return list(found.values())


def fresh_key(recipients: Sequence[Recipient]) -> StreamKey | None:
    """Return a new key for a stream that these can open; None where there are none.

    Raises:
        UsageError: one of them can't be used, or they are too many.
    """
    if not recipients:
        return None
    try:
        key = new_key(recipients)
    except FormatError as error:
        raise UsageError(error.what, error.why, error.todo or "Leave that recipient out.") from error
    if len(key.header) > age.MAX_HEADER_SIZE:
        raise UsageError(
            f"{len(recipients)} recipients are too many",
            f"their header has {len(key.header)} bytes, and {age.MAX_HEADER_SIZE} are the most that is read",
            "Encrypt to fewer.",
        )
    return key


def authenticated(manifest: Manifest, keys: Mapping[str, StreamKey]) -> Manifest:
    """Return the manifest with its MACs: each encrypted stream has one of the whole, under its own key.

    Args:
        manifest: with ``NO_MAC`` in their places.
        keys: the streams' keys by name.
    """
    text = manifest_format.encode(manifest)

    def signed(stream: StreamRecord) -> StreamRecord:
        if stream.encryption is None:
            return stream
        mac = keys[stream.name].authenticate(text)
        return msgspec.structs.replace(stream, encryption=msgspec.structs.replace(stream.encryption, mac=mac))

    return msgspec.structs.replace(manifest, streams=tuple(signed(stream) for stream in manifest.streams))


# -- reading ---------------------------------------------------------------------------------------------


def unlock(
    store: Store, backup: CommittedBackup, record: StreamRecord, identities: Sequence[Identity]
) -> StreamKey | None:
    """Return the key of a stream, once the manifest is known to be the one that was pushed with it.

    Returns:
        None for a stream that is not encrypted.

    Raises:
        IdentityError: it is encrypted, and no identity fits.
        IntegrityError: the header or the manifest was altered; or the stream is not encrypted although an identity
            was given: then there is nothing that tells a forgery.
    """
    where = f"{store.url}/{names.object_key(backup.manifest.id, record.object)}"
    encryption = record.encryption
    if encryption is None:
        if identities:
            raise not_encrypted(where)
        return None
    if encryption.format != age.FORMAT:
        raise IntegrityError(
            f"{where} can't be read", f"it is encrypted as {encryption.format!r}", "Install a newer Backhaul."
        )
    if not identities:
        raise IdentityError(
            f"{where} is encrypted, and no identity was given",
            f"it is for {_keys(encryption.recipients)}",
            "Give the key file with --identity FILE.",
        )
    if not 0 < encryption.header_size <= age.MAX_HEADER_SIZE:
        raise altered(where, f"the manifest gives its header {encryption.header_size} bytes")
    for last in (False,) * _REREADS + (True,):
        try:
            key = _read_key(store, backup, record, identities)
            break
        except BackhaulError as error:
            # What the line damaged is whole when it is read again.
            if isinstance(error, ObjectNotFoundError):
                raise altered(where, "it does not exist") from error
            if not last and isinstance(error, FormatError | IdentityError | IntegrityError):
                continue
            if isinstance(error, IdentityError):
                raise _no_match(where, encryption.recipients, identities) from error
            if isinstance(error, FormatError | IntegrityError):
                raise altered(where, f"{error.what[0].lower()}{error.what[1:]}: {error.why}") from error
            raise
    else:  # pragma: no cover - the last round breaks or raises
        raise AssertionError
    if len(key.header) != encryption.header_size:
        raise altered(where, "its header has another size than the manifest says")
    if not key.is_authentic(manifest_format.authenticated_bytes(backup.text, backup.manifest), encryption.mac):
        raise altered(
            f"{store.url}/{names.object_key(backup.manifest.id, names.MANIFEST)}",
            "its MAC does not fit: somebody changed it who does not hold the stream's key",
        )
    return key


def not_encrypted(where: str) -> IntegrityError:
    """Return the error for a plain stream where an identity asks for an encrypted one."""
    return IntegrityError(
        f"{where} is not encrypted",
        "an identity was given, and whoever can write to the store could have put this there",
        "A backup that was pushed with --encrypt-to never looks like this: then it is forged. Only if you know that "
        "this one was pushed without, read it without --identity.",
    )


def altered(where: str, why: str) -> IntegrityError:
    """Return the error that says what is not as it was pushed."""
    return IntegrityError(
        f"{where} is not what was pushed",
        why,
        "Nothing of it was used. Pull another backup, or this one from another of its destinations; and see who can "
        "write to this store.",
    )


def _read_key(store: Store, backup: CommittedBackup, record: StreamRecord, identities: Sequence[Identity]) -> StreamKey:
    assert record.encryption is not None
    left = memoryview(start := bytearray(record.encryption.header_size))
    for part in record.objects:  # the first one holds all of it, unless it is a dwarf
        count = min(len(left), part.size)
        found = store.stat(names.object_key(backup.manifest.id, part.object))
        if found is None or found.size != part.size:
            raise IntegrityError(
                "Its object is another one",
                "it does not exist" if found is None else f"it has {found.size} bytes and should have {part.size}",
            )
        store.read_into(names.object_key(backup.manifest.id, part.object), 0, left[:count], etag=found.etag)
        left = left[count:]
        if not left:
            break
    return open_key(bytes(start), identities)


def _no_match(where: str, recipients: Sequence[str], identities: Sequence[Identity]) -> BackhaulError:
    ours = [key_id(identity.recipient) for identity in identities if identity.recipient]
    if set(ours) & set(recipients):
        return altered(where, "its header was altered: the manifest says that it is for this identity, and it is not")
    return IdentityError(
        f"No identity opens {where}",
        f"it is for {_keys(recipients)}, and what was given is {_keys(ours)}",
        "Give the key file that belongs to it with --identity FILE.",
    )


def _keys(ids: Sequence[str]) -> str:
    return f"the key {ids[0]}" if len(ids) == 1 else f"the keys {', '.join(ids)}" if ids else "an unknown key"
