"""Encryption of a stream as an age file: chunks sealed and opened side by side, and the manifest's MAC.

One ``StreamKey`` a stream. It holds the file key, the only secret here, and shows it to nobody: sealing, opening and
authenticating are what it can be used for. Its ``header`` (with the nonce behind it) is what the stored object begins
with.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Iterable, Iterator, Sequence

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

from backhaul.errors import FormatError, IntegrityError
from backhaul.formats import age
from backhaul.formats.age import CHUNK_SIZE, FILE_KEY_SIZE, NONCE_SIZE, SEALED_CHUNK_SIZE, Payload
from backhaul.formats.age_keys import Identity, Recipient, unwrap

# Sealed by one call of a worker: large enough that threads seldom meet, small enough for memory that is used again
# (operations.memory.settle_allocator).
BATCH_CHUNKS = 8
BATCH_SIZE = BATCH_CHUNKS * CHUNK_SIZE
# What the file key is turned into other keys with (docs/FORMAT.md); its use as an age key has labels of its own.
MANIFEST_LABEL = b"backhaul manifest"
RAW_HASH_LABEL = b"backhaul raw hash"


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
        return hmac.digest(age.derive_key(self._file_key, b"", MANIFEST_LABEL), message, "sha256").hex()

    def conceal(self, digest: str) -> str:
        """Return what stands for a digest of the plaintext in a manifest that anybody may read.

        HMAC-SHA-256 of it: who holds the key can compare, and nobody else can confirm a guess of the content, or see
        that two backups hold the same.
        """
        secret = age.derive_key(self._file_key, b"", RAW_HASH_LABEL)
        return hmac.digest(secret, bytes.fromhex(digest), "sha256").hex()

    def is_authentic(self, message: bytes, mac: str) -> bool:
        """Tell whether the MAC is the message's."""
        return hmac.compare_digest(self.authenticate(message).encode(), mac.encode())


class Batch(msgspec.Struct, frozen=True):
    """Chunks to be sealed, from number ``first``; ``last`` if the payload ends with them. Only its end may be short."""

    first: int
    chunks: list[bytes | memoryview]
    last: bool


class ChunkCipher:
    """Seals and opens chunks of one payload, from any of them on."""

    def __init__(self, payload_key: bytes) -> None:
        self._aead = ChaCha20Poly1305(payload_key)

    def seal(self, batch: Batch) -> bytes:
        """Return the sealed chunks, one behind the other."""
        end = len(batch.chunks) - 1
        return b"".join(
            [
                self._aead.encrypt(age.chunk_nonce(batch.first + place, last=batch.last and place == end), chunk, None)
                for place, chunk in enumerate(batch.chunks)
            ]
        )

    def open(self, number: int, sealed: memoryview, *, last: bool) -> bytes | None:
        """Return a chunk's plain bytes, or None if it is not that chunk of this payload."""
        try:
            return self._aead.decrypt(age.chunk_nonce(number, last=last), sealed, None)
        except InvalidTag:
            return None

    def open_into(self, payload: Payload, first: int, sealed: memoryview, out: memoryview) -> int:
        """Open whole chunks into ``out``; return the number of plain bytes.

        Nothing of a chunk that is not authentic is written.

        Raises:
            IntegrityError: a chunk was altered, moved, or is not the last one although the payload ends there.
        """
        written = 0
        for place, start in enumerate(range(0, len(sealed), SEALED_CHUNK_SIZE)):
            number = first + place
            plain = self.open(number, sealed[start : start + SEALED_CHUNK_SIZE], last=payload.is_last(number))
            if plain is None:
                raise IntegrityError("A sealed chunk is not authentic", f"chunk {number} was altered, moved or cut")
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
        raise FormatError("This is no age header", "the file ends within its nonce")
    return StreamKey(bytes(start[: size + NONCE_SIZE]), file_key)


def batches(pieces: Iterable[bytes]) -> Iterator[Batch]:
    """Cut a stream of pieces into chunks, ``BATCH_CHUNKS`` at a time; only those across two pieces are copied.

    Yields:
        At least one batch. Its last chunk is never empty, unless the stream is.
    """
    chunks: list[bytes | memoryview] = []
    first = 0
    for chunk in _chunks(pieces):
        # A full batch is only passed on when more follows: else it is the last one.
        if len(chunks) == BATCH_CHUNKS:
            yield Batch(first, chunks, last=False)
            first, chunks = first + BATCH_CHUNKS, []
        chunks.append(chunk)
    yield Batch(first, chunks or [b""], last=True)


def _chunks(pieces: Iterable[bytes]) -> Iterator[bytes | memoryview]:
    held: list[memoryview] = []
    size = 0
    for piece in pieces:
        rest = memoryview(piece)
        while size + len(rest) >= CHUNK_SIZE:
            taken = rest[: CHUNK_SIZE - size]
            yield b"".join([*held, taken]) if held else taken
            rest = rest[len(taken) :]
            held, size = [], 0
        if rest:
            held.append(rest)
            size += len(rest)
    if held:
        yield b"".join(held)


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
    number = 0
    while True:
        chunk, sealed = sealed[:SEALED_CHUNK_SIZE], sealed[SEALED_CHUNK_SIZE:]
        plain = cipher.open(number, chunk, last=False) if len(chunk) == SEALED_CHUNK_SIZE else None
        if plain is not None:
            yield plain
            number += 1
            continue
        plain = cipher.open(number, chunk, last=True)
        if plain is None or (number and not plain):
            raise IntegrityError("An age file was altered or cut", f"chunk {number} is not authentic")
        yield plain
        if sealed:
            raise IntegrityError("An age file was continued", "something follows its last chunk")
        return
