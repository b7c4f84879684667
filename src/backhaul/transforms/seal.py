"""Sealing and opening a fan-out's chunks; the format is in ``formats.chunk``."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import msgspec
from blake3 import blake3
from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from backhaul.errors import FailedError, IntegrityError
from backhaul.formats import chunk
from backhaul.formats.chunk import HEADER_SIZE, SIGNATURE_SIZE, TAG_SIZE, Header
from backhaul.model.fan_out import Abort, SessionEnd, Start, StreamEnd

_KINDS = {Start: chunk.START, StreamEnd: chunk.STREAM_END, SessionEnd: chunk.SESSION_END, Abort: chunk.ABORT}
Body = TypeVar("Body", Start, StreamEnd, SessionEnd, Abort)


class SessionKeys(msgspec.Struct, frozen=True):
    """What a receiver is told over its authenticated connection: 16, 32 and 32 bytes.

    ``session`` names the session, ``key`` seals its chunks, ``signer`` is the sender's Ed25519 public key for it.
    """

    session: bytes
    key: bytes
    signer: bytes

    @property
    def link_key(self) -> bytes:
        """The key under which the ends of a link prove to each other that they are of the session."""
        return blake3(self.key, derive_key_context=chunk.LINK_CONTEXT).digest()


class Sealer:
    """Makes the chunks of a session, numbered in the order of the calls; for one thread at a time.

    Args:
        keys: the session's.
        signer: the private half of the key that signs its ends.
        buffer: gives a byte array of a size, with anything in it.
    """

    def __init__(
        self, keys: SessionKeys, signer: Ed25519PrivateKey, buffer: Callable[[int], bytearray] = bytearray
    ) -> None:
        self._buffer = buffer
        self._session = keys.session
        self._cipher = AESGCM(keys.key)
        self._signer = signer
        self.number = 0

    def data(self, stream: int, body: bytes | memoryview, raw: int) -> bytearray:
        """Return the DATA chunk of a piece that is ``raw`` bytes once it is decoded."""
        return self._seal(chunk.DATA, stream, body, raw)

    def signed(self, body: Start | StreamEnd | SessionEnd | Abort) -> bytearray:
        """Return the chunk that says it."""
        text = chunk.encode_body(body)
        stream = body.stream if isinstance(body, StreamEnd) else 0
        header = self._header(_KINDS[type(body)], stream, SIGNATURE_SIZE + len(text), SIGNATURE_SIZE + len(text))
        return self._seal(header.kind, stream, self._signer.sign(chunk.encode_header(header) + text) + text, header.raw)

    def _header(self, kind: int, stream: int, size: int, raw: int) -> Header:
        return Header(kind, stream, size + TAG_SIZE, raw, self.number, self._session)

    def _seal(self, kind: int, stream: int, body: bytes | memoryview, raw: int) -> bytearray:
        if len(body) + TAG_SIZE > chunk.LARGEST_BODY or raw > chunk.LARGEST_RAW:
            raise FailedError(
                "There is too much to say for one chunk",
                f"{len(body)} bytes, and {chunk.LARGEST_BODY} are the most",
                "Send fewer tables at once, or the output of a command.",
            )
        header = chunk.encode_header(self._header(kind, stream, len(body), raw))
        sealed = self._buffer(HEADER_SIZE + len(body) + TAG_SIZE)
        sealed[:HEADER_SIZE] = header
        self._cipher.encrypt_into(chunk.nonce(self.number), body, header, memoryview(sealed)[HEADER_SIZE:])
        self.number += 1
        return sealed


class Opener:
    """Opens the chunks of a session, in any order.

    Args:
        keys: the session's.
        buffer: gives a byte array of a size, with anything in it.
    """

    def __init__(self, keys: SessionKeys, buffer: Callable[[int], bytearray] = bytearray) -> None:
        self._buffer = buffer
        self._session = keys.session
        self._cipher = AESGCM(keys.key)
        self._signer = Ed25519PublicKey.from_public_bytes(keys.signer)

    def header(self, data: bytes | bytearray | memoryview) -> Header:
        """Return a chunk's header, which is not to be trusted before the chunk was opened.

        Raises:
            IntegrityError: it is none of this session's.
        """
        return chunk.decode_header(data, self._session)

    def open(self, header: Header, sealed: bytes | bytearray | memoryview) -> memoryview:
        """Return a whole chunk's body, opened; without the signature in front of it, which was right.

        Raises:
            IntegrityError: it is not as it was sealed, or not signed by the sender.
        """
        view = memoryview(sealed)
        body = self._buffer(header.length - TAG_SIZE)
        try:
            self._cipher.decrypt_into(
                chunk.nonce(header.number), view[HEADER_SIZE : header.size], view[:HEADER_SIZE], body
            )
            opened = memoryview(body)
            if header.kind in chunk.SIGNED:
                signed = bytes(view[:HEADER_SIZE]) + bytes(opened[SIGNATURE_SIZE:])
                self._signer.verify(bytes(opened[:SIGNATURE_SIZE]), signed)
                return opened[SIGNATURE_SIZE:]
            return opened
        except (InvalidTag, InvalidSignature, ValueError) as error:
            why = "the sender did not sign it" if isinstance(error, InvalidSignature) else "its tag is not right"
            raise IntegrityError(f"Chunk {header.number} is damaged", why, "It is asked for again.") from error
