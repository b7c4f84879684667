"""SSH keys as recipients and identities, as the ``age`` program uses them (its package ``agessh``).

Apart from ``age_keys``, which loads it when such a key turns up: what reads SSH's files takes its time to import.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import importlib.util
from collections.abc import Sequence

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import padding
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hashes import SHA256

from backhaul.errors import FormatError
from backhaul.formats.age import FILE_KEY_SIZE, Stanza, derive_key, encode64
from backhaul.formats.age_keys import (
    LABEL,
    SSH_ED25519,
    SSH_RSA,
    Identity,
    Random,
    Recipient,
    arguments_of,
    exchange,
    not_a_recipient,
    open_body,
    seal,
)

_LEAST_RSA = 2048
_OPENSSH = b"BEGIN OPENSSH PRIVATE KEY"
_PRIME = 2**255 - 19


class SshEd25519Recipient:
    """An ``ssh-ed25519`` public key: encrypted to as the Curve25519 point that it is as well."""

    def __init__(self, blob: bytes, key: Ed25519PublicKey) -> None:
        self.text = f"{SSH_ED25519} {base64.b64encode(blob).decode()}"
        self._blob = blob
        self._public = _montgomery(key.public_bytes_raw())

    def wrap(self, file_key: bytes, random: Random) -> Stanza:
        """See ``Recipient.wrap``."""
        ephemeral = X25519PrivateKey.from_private_bytes(random(32))
        share = ephemeral.public_key().public_bytes_raw()
        secret = _tweaked(self._blob, exchange(ephemeral, self._public))
        key = derive_key(secret, share + self._public, LABEL + SSH_ED25519.encode())
        return Stanza(SSH_ED25519, (_fingerprint(self._blob), encode64(share)), seal(key, file_key))


class SshEd25519Identity:
    """An OpenSSH Ed25519 private key."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._blob = _blob_of(key.public_key())
        self.recipient = SshEd25519Recipient(self._blob, key.public_key()).text
        self._public = _montgomery(key.public_key().public_bytes_raw())
        self._private = X25519PrivateKey.from_private_bytes(hashlib.sha512(key.private_bytes_raw()).digest()[:32])

    def __repr__(self) -> str:
        return f"<identity of {self.recipient}>"

    def unwrap(self, stanzas: Sequence[Stanza]) -> bytes | None:
        """See ``Identity.unwrap``."""
        for stanza in stanzas:
            if stanza.type != SSH_ED25519:
                continue
            tag, share = arguments_of(stanza, 4, 32)
            if encode64(tag) != _fingerprint(self._blob):
                continue
            secret = _tweaked(self._blob, exchange(self._private, share))
            file_key = open_body(derive_key(secret, share + self._public, LABEL + SSH_ED25519.encode()), stanza)
            if file_key is not None:
                return file_key
        return None


class SshRsaRecipient:
    """An ``ssh-rsa`` public key."""

    def __init__(self, blob: bytes, key: RSAPublicKey) -> None:
        if key.key_size < _LEAST_RSA:
            raise FormatError(
                "This RSA key is too short", f"it has {key.key_size} bits", f"Use one of {_LEAST_RSA} or more."
            )
        self.text = f"{SSH_RSA} {base64.b64encode(blob).decode()}"
        self._blob = blob
        self._key = key

    def wrap(self, file_key: bytes, random: Random) -> Stanza:
        """See ``Recipient.wrap``. (OAEP draws its own randomness.)"""
        return Stanza(SSH_RSA, (_fingerprint(self._blob),), self._key.encrypt(file_key, _oaep()))


class SshRsaIdentity:
    """An RSA private key."""

    def __init__(self, key: RSAPrivateKey) -> None:
        self._key = key
        self._blob = _blob_of(key.public_key())
        self.recipient = SshRsaRecipient(self._blob, key.public_key()).text

    def __repr__(self) -> str:
        return f"<identity of {self.recipient}>"

    def unwrap(self, stanzas: Sequence[Stanza]) -> bytes | None:
        """See ``Identity.unwrap``."""
        for stanza in stanzas:
            if stanza.type != SSH_RSA:
                continue
            (tag,) = arguments_of(stanza, 4)
            if encode64(tag) != _fingerprint(self._blob):
                continue
            try:
                file_key = self._key.decrypt(stanza.body, _oaep())
            except ValueError:
                continue
            if len(file_key) == FILE_KEY_SIZE:
                return file_key
        return None


def check_passphrases_work(pem: bytes) -> None:
    """Make sure that a key with a passphrase could be read, before anybody is asked for it.

    Raises:
        FormatError: OpenSSH derives its keys with bcrypt, which is an extra.
    """
    if _OPENSSH in pem and importlib.util.find_spec("bcrypt") is None:
        raise FormatError(
            "This SSH key has a passphrase",
            "to read such a one takes the Python package bcrypt",
            "Run pip install bcrypt where Backhaul is, or take the passphrase off a copy: ssh-keygen -p -f COPY",
        )


def parse_identity(pem: bytes, passphrase: str | None = None) -> Identity | None:
    """Read an SSH private key; None if it takes a passphrase and there is none.

    Raises:
        FormatError: it is no key that can be used, or the passphrase is wrong.
    """
    secret = passphrase.encode() if passphrase is not None else None
    try:
        if _OPENSSH in pem:
            key = serialization.load_ssh_private_key(pem, secret)
        else:
            key = serialization.load_pem_private_key(pem, secret)  # type: ignore[assignment]
    except TypeError:
        # It is encrypted, and no passphrase was given; or the other way round.
        return None if secret is None else parse_identity(pem)
    except UnsupportedAlgorithm as error:
        raise FormatError("This SSH key can't be read", str(error), "Use a key of: backhaul keygen -o FILE") from error
    except ValueError as error:
        why = "the passphrase is wrong, or the file is damaged"
        raise FormatError("This SSH key can't be read", why, "Try again, or use a copy of the file.") from error
    if isinstance(key, Ed25519PrivateKey):
        return SshEd25519Identity(key)
    if isinstance(key, RSAPrivateKey):
        return SshRsaIdentity(key)
    raise FormatError("This SSH key can't be used", "age knows Ed25519 and RSA keys only", "Use another one.")


def parse_recipient(words: list[str]) -> Recipient:
    """Read the words of a public key as it stands in an ``authorized_keys`` file.

    Raises:
        FormatError: it is none, or of a kind that age does not know.
    """
    # (The third word is a comment, often somebody's name and host: it is not kept.)
    try:
        blob = base64.b64decode(words[1], validate=True)
        key = serialization.load_ssh_public_key(" ".join(words[:2]).encode())
        if isinstance(key, Ed25519PublicKey):
            return SshEd25519Recipient(blob, key)
    except (binascii.Error, ValueError, UnsupportedAlgorithm) as error:
        raise not_a_recipient(" ".join(words[:2]), "the key is damaged, or of a kind that age does not know") from error
    if isinstance(key, RSAPublicKey):
        return SshRsaRecipient(blob, key)
    raise not_a_recipient(words[0], "age knows Ed25519 and RSA keys only")


def _oaep() -> padding.OAEP:
    return padding.OAEP(mgf=padding.MGF1(SHA256()), algorithm=SHA256(), label=LABEL + SSH_RSA.encode())


def _fingerprint(blob: bytes) -> str:
    return encode64(hashlib.sha256(blob).digest()[:4])


def _blob_of(key: Ed25519PublicKey | RSAPublicKey) -> bytes:
    line = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return base64.b64decode(line.split()[1])


def _tweaked(blob: bytes, secret: bytes) -> bytes:
    tweak = derive_key(b"", blob, LABEL + SSH_ED25519.encode())
    return exchange(X25519PrivateKey.from_private_bytes(tweak), secret)


def _montgomery(public: bytes) -> bytes:
    """Return the X25519 key of an Ed25519 one: u = (1 + y) / (1 - y), by the map of RFC 7748, 4.1."""
    y = int.from_bytes(public, "little") & (1 << 255) - 1
    return ((1 + y) * pow(1 - y, -1, _PRIME) % _PRIME).to_bytes(32, "little")
