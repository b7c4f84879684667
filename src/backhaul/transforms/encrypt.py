"""Encryption of a stream as an age file: chunks sealed and opened side by side, and the manifest's MAC.

One ``StreamKey`` a stream. It holds the file key, the only secret here, and shows it to nobody: sealing, opening and
authenticating are what it can be used for. Its ``header`` (with the nonce behind it) is what the stored object begins
with.
"""

from __future__ import annotations

import hmac
import itertools
import secrets
from collections.abc import Iterable, Iterator, Sequence

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from backhaul.errors import IntegrityError
from backhaul.formats import age
from backhaul.formats.age import CHUNK_SIZE, FILE_KEY_SIZE, NONCE_SIZE, SEALED_CHUNK_SIZE, Payload
from backhaul.formats.age_keys import Identity, Recipient, unwrap

# Sealed by one call of a worker: large enough that threads seldom meet, small enough to stay in the cache.
BATCH_CHUNKS = 16
BATCH_SIZE = BATCH_CHUNKS * CHUNK_SIZE
_MANIFEST_LABEL = b"backhaul manifest"


class StreamKey:
    """The key of one stream. Made by ``new_key`` or ``open_key``.

    Args:
        header: the age header and the nonce: what the file begins with.
        file_key: what the header wraps.
    """

    def __init__(self, header: bytes, file_key: bytes) -> None:
        self.header = header
        self._file_key = file_key
        self._payload_key = age.payload_key(file_key, header[-NONCE_SIZE:])

    def __repr__(self) -> str:
        return "<the key of a stream>"

    def export(self) -> bytes:
        """Return the key as bytes, the secret in clear: for memory, never for a disk, a log or a message."""
        return self._file_key + self.header

    @classmethod
    def imported(cls, exported: bytes) -> StreamKey:
        """Return the key that ``export`` gave."""
        return cls(exported[FILE_KEY_SIZE:], exported[:FILE_KEY_SIZE])

    def cipher(self) -> ChunkCipher:
        """Return a cipher for the payload; one for each thread."""
        return ChunkCipher(self._payload_key)

    def authenticate(self, message: bytes) -> str:
        """Return the MAC of a manifest, in lower-case hex: HMAC-SHA-256 under a key of its own (docs/FORMAT.md)."""
        return hmac.digest(age.derive_key(self._file_key, b"", _MANIFEST_LABEL), message, "sha256").hex()

    def is_authentic(self, message: bytes, mac: str) -> bool:
        """Tell whether the MAC is the message's."""
        return hmac.compare_digest(self.authenticate(message).encode(), mac.encode())


class ChunkCipher:
    """Seals and opens chunks of one payload, from any of them on."""

    def __init__(self, payload_key: bytes) -> None:
        self._aead = ChaCha20Poly1305(payload_key)

    def seal(self, first: int, plain: bytes | memoryview, *, last: bool) -> bytes:
        """Return the sealed chunks of plain bytes.

        Args:
            first: the number of the first chunk.
            plain: whole chunks; only the payload's last one may be shorter.
            last: whether the payload ends with them.
        """
        view = memoryview(plain)
        count = max(1, -(-len(view) // CHUNK_SIZE))
        return b"".join(
            self._aead.encrypt(
                age.chunk_nonce(first + place, last=last and place == count - 1),
                view[place * CHUNK_SIZE : (place + 1) * CHUNK_SIZE],
                None,
            )
            for place in range(count)
        )

    def open_into(self, payload: Payload, first: int, sealed: memoryview, out: memoryview) -> int:
        """Open whole chunks into ``out``; return the number of plain bytes.

        Nothing of a chunk that is not authentic is written.

        Raises:
            IntegrityError: a chunk was altered, moved, or is not the last one although the payload ends there.
        """
        written = 0
        for place, start in enumerate(range(0, len(sealed), SEALED_CHUNK_SIZE)):
            number = first + place
            try:
                plain = self._aead.decrypt(
                    age.chunk_nonce(number, last=payload.is_last(number)),
                    sealed[start : start + SEALED_CHUNK_SIZE],
                    None,
                )
            except InvalidTag as error:
                raise IntegrityError(
                    "A sealed chunk is not authentic", f"chunk {number} was altered, moved or cut"
                ) from error
            out[written : written + len(plain)] = plain
            written += len(plain)
        return written


def new_key(recipients: Sequence[Recipient]) -> StreamKey:
    """Return a fresh key for a new stream, which these recipients can open.

    Raises:
        FormatError: a recipient's key can't be used.
    """
    file_key = secrets.token_bytes(FILE_KEY_SIZE)
    stanzas = tuple(recipient.wrap(file_key, secrets.token_bytes) for recipient in recipients)
    return StreamKey(age.encode_header(stanzas, file_key) + secrets.token_bytes(NONCE_SIZE), file_key)


def open_key(start: bytes, identities: Iterable[Identity]) -> StreamKey:
    """Read the key of a stream from the beginning of its object.

    Args:
        start: at least the header and the nonce.
        identities: whose secrets are tried, in their order.

    Raises:
        FormatError: it is no age file.
        IdentityError: no identity fits.
        IntegrityError: the header was altered.
    """
    header, size = age.parse_header(start)
    file_key = unwrap(header, identities)
    age.check_mac(header, file_key)
    if len(start) < size + NONCE_SIZE:
        raise IntegrityError("An age file is cut", "it ends within its nonce")
    return StreamKey(bytes(start[: size + NONCE_SIZE]), file_key)


def batches(pieces: Iterable[bytes]) -> Iterator[tuple[int, bytes, bool]]:
    """Cut a stream of pieces into what ``ChunkCipher.seal`` takes: whole chunks, ``BATCH_CHUNKS`` at most.

    Yields:
        The number of the first chunk, the plain bytes, and whether they are the last ones. The last batch is never
        empty, unless the stream is.
    """
    held: list[memoryview] = []
    size = 0
    numbers = itertools.count(0, BATCH_CHUNKS)
    for piece in pieces:
        rest = memoryview(piece)
        # A full batch is only passed on when more follows: else it is the last one.
        while size + len(rest) > BATCH_SIZE:
            taken = BATCH_SIZE - size
            yield next(numbers), b"".join([*held, rest[:taken]]), False
            held, size, rest = [], 0, rest[taken:]
        if rest:
            held.append(rest)
            size += len(rest)
    yield next(numbers), b"".join(held), True


def opened_chunks(data: bytes, identities: Iterable[Identity]) -> Iterator[bytes]:
    """Yield the plain chunks of a whole age file, each once it is authentic.

    Raises:
        FormatError: it is no age file.
        IdentityError: no identity fits.
        IntegrityError: it was altered, cut or continued. What was yielded before is authentic, but not all.
    """
    key = open_key(data, identities)
    cipher = key.cipher()
    sealed = memoryview(data)[len(key.header) :]
    out = memoryview(bytearray(CHUNK_SIZE))
    count = max(1, -(-len(sealed) // SEALED_CHUNK_SIZE))
    for number in range(count):
        chunk = sealed[number * SEALED_CHUNK_SIZE : (number + 1) * SEALED_CHUNK_SIZE]
        last = number == count - 1
        if len(chunk) < age.TAG_SIZE or (last and number and len(chunk) == age.TAG_SIZE):
            raise IntegrityError("An age file is cut or continued", "its last chunk holds nothing")
        yield bytes(out[: cipher.open_into(Payload(0, count * CHUNK_SIZE), number, chunk, out)])
