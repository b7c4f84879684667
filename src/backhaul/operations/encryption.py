"""The key of a stream, and the MAC of its manifest: made by a push, and checked by all that reads.

A push needs recipients only, which are public. Reading needs an identity, and with it every reading verb first makes
sure of the manifest, before it believes anything that the manifest says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence

import msgspec

from backhaul.errors import (
    BackhaulError,
    FormatError,
    IdentityError,
    IntegrityError,
    ObjectNotFoundError,
    UsageError,
)
from backhaul.formats import age, names
from backhaul.formats import manifest as manifest_format
from backhaul.formats.age_keys import Identity, Recipient, key_id, parse_recipient
from backhaul.model.manifest import Manifest, StreamRecord
from backhaul.operations.series import CommittedBackup
from backhaul.stores.base import Store
from backhaul.transforms.encrypt import StreamKey, new_key, open_key

_REREADS = 2


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
    try:
        key = _read_key_patiently(store, backup, record, identities)
    except ObjectNotFoundError as error:
        raise altered(where, "it does not exist") from error
    except IdentityError as error:
        raise _no_match(where, encryption.recipients, identities) from error
    except (FormatError, IntegrityError) as error:
        raise altered(where, f"{error.what[0].lower()}{error.what[1:]}: {error.why}") from error
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


def _read_key_patiently(
    store: Store, backup: CommittedBackup, record: StreamRecord, identities: Sequence[Identity]
) -> StreamKey:
    """Read the key, again if it arrives damaged: what the line damaged is whole then."""
    for _ in range(_REREADS):
        with contextlib.suppress(FormatError, IdentityError, IntegrityError):
            return _read_key(store, backup, record, identities)
    return _read_key(store, backup, record, identities)


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
        f"by its manifest, which can't be checked without, it is for {_keys(recipients)}; given was {_keys(ours)}",
        "Give the key file that belongs to it with --identity FILE. If what you gave opens other backups of this "
        "series, somebody has put this one in their place.",
    )


def _keys(ids: Sequence[str]) -> str:
    return f"the key {ids[0]}" if len(ids) == 1 else f"the keys {', '.join(ids)}" if ids else "an unknown key"
