"""Recipients and identities of age v1: text to values, and the file key into a stanza and out of it again.

X25519 keys and passphrases after C2SP ``age``; for SSH keys see ``age_ssh``. A recipient is
public; an identity is a secret, and neither its text nor its ``repr`` nor an error ever shows it.

Randomness is the caller's (``Random``), so that all of this can be tested with known numbers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.kdf.scrypt import Scrypt

from backhaul.errors import FormatError, IdentityError
from backhaul.formats import bech32
from backhaul.formats.age import FILE_KEY_SIZE, TAG_SIZE, Header, Stanza, decode64, derive_key, encode64

Random = Callable[[int], bytes]

IDENTITY_PREFIX = "AGE-SECRET-KEY-"
_RECIPIENT_PREFIX = "age"
_X25519 = "X25519"
_SCRYPT = "scrypt"
SSH_ED25519 = "ssh-ed25519"
SSH_RSA = "ssh-rsa"
LABEL = b"age-encryption.org/v1/"
# 2**22 takes 4 GiB of memory: the same limit as the age program's.
_MOST_WORK = 22
_SALT_SIZE = 16
_SHORT, _LONG = 24, 80
_UNKNOWN_KEYS = ("age1pq1", "age1tag1", "age1tagpq1", "AGE-SECRET-KEY-PQ-", "AGE-PLUGIN-")


class Recipient(Protocol):
    """Whoever may read what is encrypted. ``text`` is its public form, without a comment."""

    text: str

    def wrap(self, file_key: bytes, random: Random) -> Stanza:
        """Return the stanza that carries the file key to the recipient."""
        ...


class Identity(Protocol):
    """The secret that belongs to a recipient. ``recipient`` is that one's text; empty for a passphrase."""

    recipient: str

    def unwrap(self, stanzas: Sequence[Stanza]) -> bytes | None:
        """Return the file key if one of the stanzas carries it to this identity.

        Raises:
            FormatError: a stanza of the identity's type is malformed.
        """
        ...


def is_secret(text: str) -> bool:
    """Tell whether a text holds the secret half of a key, age's or SSH's, whatever is around it."""
    return any(mark in text.upper() for mark in (IDENTITY_PREFIX, "AGE-PLUGIN-", "PRIVATE KEY-----"))


def key_id(recipient: str) -> str:
    """Return the short name of a key: 16 hexadecimal digits of the SHA-256 of the recipient's text.

    It tells people which key a backup is for. It does not give the recipient away, without which nobody can make
    a backup that the identity opens.
    """
    return hashlib.sha256(recipient.encode()).hexdigest()[:16]


def unwrap(header: Header, identities: Iterable[Identity]) -> bytes:
    """Return the file key.

    Raises:
        IdentityError: none of the identities fits.
        FormatError: the header is malformed.
    """
    if len(header.stanzas) > 1 and any(stanza.type == _SCRYPT for stanza in header.stanzas):
        raise FormatError("This is no age header", "it mixes a passphrase with other recipients")
    for identity in identities:
        file_key = identity.unwrap(header.stanzas)
        if file_key is not None:
            return file_key
    raise IdentityError("No identity fits", "the age header has no stanza for it")


# -- X25519 ----------------------------------------------------------------------------------------------


class X25519Recipient:
    """An ``age1...`` recipient."""

    def __init__(self, public: bytes) -> None:
        self._public = public
        self.text = bech32.encode(_RECIPIENT_PREFIX, public)

    def wrap(self, file_key: bytes, random: Random) -> Stanza:
        """See ``Recipient.wrap``."""
        ephemeral = X25519PrivateKey.from_private_bytes(random(32))
        share = ephemeral.public_key().public_bytes_raw()
        secret = exchange(ephemeral, self._public)
        key = derive_key(secret, share + self._public, LABEL + _X25519.encode())
        return Stanza(_X25519, (encode64(share),), seal(key, file_key))


class X25519Identity:
    """An ``AGE-SECRET-KEY-1...`` identity."""

    def __init__(self, secret: bytes) -> None:
        self._private = X25519PrivateKey.from_private_bytes(secret)
        self._public = self._private.public_key().public_bytes_raw()
        self.recipient = X25519Recipient(self._public).text

    def __repr__(self) -> str:
        return f"<identity of {self.recipient}>"

    def text(self) -> str:
        """Return the secret as it is written into an identity file."""
        return bech32.encode(IDENTITY_PREFIX.lower(), self._private.private_bytes_raw()).upper()

    def unwrap(self, stanzas: Sequence[Stanza]) -> bytes | None:
        """See ``Identity.unwrap``."""
        for stanza in stanzas:
            if stanza.type != _X25519:
                continue
            (share,) = arguments_of(stanza, 32)
            key = derive_key(exchange(self._private, share), share + self._public, LABEL + _X25519.encode())
            file_key = open_body(key, stanza)
            if file_key is not None:
                return file_key
        return None


def new_identity(random: Random) -> X25519Identity:
    """Return a fresh identity."""
    return X25519Identity(random(32))


# -- passphrases -----------------------------------------------------------------------------------------


class PassphraseIdentity:
    """A passphrase, by scrypt: what ``age -p`` encrypts identity files with."""

    def __init__(self, passphrase: str) -> None:
        self._passphrase = passphrase.encode()
        self.recipient = ""

    def __repr__(self) -> str:
        return "<a passphrase>"

    def unwrap(self, stanzas: Sequence[Stanza]) -> bytes | None:
        """See ``Identity.unwrap``."""
        for stanza in stanzas:
            if stanza.type != _SCRYPT:
                continue
            work = stanza.arguments[1] if len(stanza.arguments) == 2 else ""
            if not (work.isascii() and work.isdigit()) or work[0] == "0" or len(work) > 2 or int(work) > _MOST_WORK:
                raise _malformed(stanza, f"its work factor is not a number up to {_MOST_WORK}")
            salt = decode64(stanza.arguments[0])
            if len(salt) != _SALT_SIZE:
                raise _malformed(stanza, "its salt has another length")
            _check_body(stanza)
            scrypt = Scrypt(salt=LABEL + _SCRYPT.encode() + salt, length=32, n=1 << int(work), r=8, p=1)
            return open_body(scrypt.derive(self._passphrase), stanza)
        return None


# -- text ------------------------------------------------------------------------------------------------


def parse_recipient(text: str) -> Recipient:
    """Read ``age1...``, or an SSH public key as it stands in an ``authorized_keys`` or ``.pub`` file.

    Raises:
        FormatError: it is no recipient. A secret key is never quoted.
    """
    words = text.split()
    if is_secret(text):
        raise FormatError(
            "That is an identity, the secret half of a key",
            "backups are encrypted to the public half",
            "Give its recipient: the age1... in the key file's comment, or the .pub of an SSH key. A secret that was "
            "in a command line is known to others.",
        )
    if len(words) > 1 and words[0].startswith(("ssh-", "ecdsa-", "sk-")):
        from backhaul.formats import age_ssh

        return age_ssh.parse_recipient(words)
    if text.startswith(_UNKNOWN_KEYS):
        raise FormatError(
            f"The recipient {text[:24]}... is of a kind that Backhaul does not know",
            "it knows age's X25519 keys (age1...) and SSH's ssh-ed25519 and ssh-rsa",
            "Encrypt to one of these instead; backhaul keygen -o FILE makes one.",
        )
    try:
        prefix, public = bech32.decode(text)
    except FormatError as error:
        several = len(words) > 1 or "," in text
        why = (
            "there is more than one word: each recipient takes an option, or a line, of its own"
            if several
            else error.why
        )
        raise not_a_recipient(text, why) from error
    if prefix != _RECIPIENT_PREFIX or len(public) != 32:
        raise not_a_recipient(text, f"an age recipient begins with age1, and this with {prefix}1")
    return X25519Recipient(public)


def parse_recipients(text: str) -> list[Recipient]:
    """Read a file of recipients, one a line; empty lines and those that begin with ``#`` are passed over.

    Raises:
        FormatError: a line is none, or there is none.
    """
    found = []
    for number, line in _lines(text):
        try:
            found.append(parse_recipient(line))
        except FormatError as error:
            # (Not quoted: the file may be any file.)
            raise FormatError(f"Line {number} is no recipient", error.why, error.todo) from error
    if not found:
        raise FormatError("There is no recipient", "no line holds one", "Write one age1... on each line.")
    return found


def parse_identities(text: str) -> list[Identity]:
    """Read a file of ``AGE-SECRET-KEY-1...`` identities, one a line, as ``parse_recipients`` does.

    Raises:
        FormatError: a line is none, or there is none. Lines are not quoted.
    """
    found: list[Identity] = []
    for number, line in _lines(text):
        if line.lower().startswith(f"{_RECIPIENT_PREFIX}1"):
            raise FormatError(f"Line {number} is a recipient", "that is the public half of a key", _IDENTITY_TODO)
        if line.startswith(_UNKNOWN_KEYS):
            raise FormatError(
                f"Line {number} is an identity of a kind that Backhaul does not know",
                "it knows AGE-SECRET-KEY-1... and SSH private keys",
                "Decrypt the stream's object with the age program and that identity.",
            )
        try:
            prefix, secret = bech32.decode(line)
        except FormatError as error:
            raise FormatError(f"Line {number} is no identity", error.why, _IDENTITY_TODO) from error
        if prefix != IDENTITY_PREFIX.lower() or len(secret) != 32:
            raise FormatError(f"Line {number} is no identity", "it is another kind of key", _IDENTITY_TODO)
        found.append(X25519Identity(secret))
    if not found:
        raise FormatError("There is no identity", "no line holds one", _IDENTITY_TODO)
    return found


_IDENTITY_TODO = "An identity is a line AGE-SECRET-KEY-1..., as backhaul keygen and age-keygen make it."


def _lines(text: str) -> list[tuple[int, str]]:
    lines = ((number, line.strip()) for number, line in enumerate(text.splitlines(), 1))
    return [(number, line) for number, line in lines if line and not line.startswith("#")]


def not_a_recipient(text: str, why: str) -> FormatError:
    """Return the error for a text that should be a recipient."""
    # What looks like no recipient at all may be a secret that lost its beginning: only as much as names it is said.
    known = text.startswith((f"{_RECIPIENT_PREFIX}1", "ssh-")) or len(text) <= _SHORT
    shown = text if known and len(text) <= _LONG else f"{text[: _LONG // 2 if known else _SHORT // 2]}..."
    return FormatError(
        f"{shown!r} is no recipient",
        why,
        "Give an age1... recipient (backhaul keygen makes one) or an SSH public key; a file of them goes with "
        "--encrypt-to-file.",
    )


# -- the cryptography that they share --------------------------------------------------------------------


def exchange(private: X25519PrivateKey, public: bytes) -> bytes:
    """Return the shared secret (RFC 7748).

    Raises:
        FormatError: the point is of low order.
    """
    try:
        return private.exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError as error:  # the shared secret would be zero: a point of low order
        raise FormatError("This age key can't be used", "it is a point of low order") from error


def seal(key: bytes, file_key: bytes) -> bytes:
    """Return the body of a stanza: the file key under a wrap key, which is used only once."""
    return ChaCha20Poly1305(key).encrypt(bytes(12), file_key, None)


def _check_body(stanza: Stanza) -> None:
    # Before anything is decrypted: a longer body could be made to open under many keys.
    if len(stanza.body) != FILE_KEY_SIZE + TAG_SIZE:
        raise _malformed(stanza, "its body has another length")


def open_body(key: bytes, stanza: Stanza) -> bytes | None:
    """Return the file key of a stanza, or None if it is for somebody else.

    Raises:
        FormatError: the body can't be one.
    """
    _check_body(stanza)
    try:
        return ChaCha20Poly1305(key).decrypt(bytes(12), stanza.body, None)
    except InvalidTag:
        return None


def arguments_of(stanza: Stanza, *sizes: int) -> list[bytes]:
    """Return a stanza's base64 arguments.

    Raises:
        FormatError: they are not as many, or not of these sizes.
    """
    if len(stanza.arguments) != len(sizes):
        raise _malformed(stanza, f"it has {len(stanza.arguments)} arguments")
    values = [decode64(argument) for argument in stanza.arguments]
    if tuple(len(value) for value in values) != sizes:
        raise _malformed(stanza, "an argument has another length")
    return values


def _malformed(stanza: Stanza, why: str) -> FormatError:
    return FormatError("This is no age header", f"its {stanza.type} stanza is malformed: {why}")
