"""The age v1 file format (C2SP ``age``): the header as values, and where the chunks of the payload lie.

::

    age-encryption.org/v1
    -> X25519 <share>              one stanza a recipient: the file key, wrapped
    <wrapped file key>
    --- <HMAC of all above>
    <nonce, 16 bytes> <chunk 0> <chunk 1> ... <last chunk>

The payload is chunks of 64 KiB, each sealed with ChaCha20-Poly1305 under a nonce that says its number and whether it
is the last one. So chunks can be sealed and opened in parallel and alone, and none can be left out, moved or added.

This module must not know where keys come from (``formats.age_keys``) nor seal anything (``transforms.encrypt``).
"""

from __future__ import annotations

import base64
import binascii
import hmac

import msgspec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backhaul.errors import FormatError, IntegrityError

FORMAT = "age-encryption.org/v1"
VERSION_LINE = FORMAT.encode() + b"\n"
FILE_KEY_SIZE = 16
NONCE_SIZE = 16
TAG_SIZE = 16
CHUNK_SIZE = 64 << 10
SEALED_CHUNK_SIZE = CHUNK_SIZE + TAG_SIZE
# A stanza has some hundred bytes. What is longer is not the header of a backup, and is not read into memory.
MAX_HEADER_SIZE = 1 << 20
_COLUMNS = 64
_MAC_SIZE = 32


class Stanza(msgspec.Struct, frozen=True):
    """The file key for one recipient; ``body`` is the wrapped key."""

    type: str
    arguments: tuple[str, ...]
    body: bytes


class Header(msgspec.Struct, frozen=True):
    """A header as it was read: ``authenticated`` is what the MAC is of."""

    stanzas: tuple[Stanza, ...]
    authenticated: bytes
    mac: bytes


class Payload(msgspec.Struct, frozen=True):
    """Where a payload of ``size`` plain bytes lies in a file whose header and nonce take ``start`` bytes."""

    start: int
    size: int

    @property
    def chunks(self) -> int:
        """The number of chunks: an empty payload still has one."""
        return max(1, -(-self.size // CHUNK_SIZE))

    @property
    def end(self) -> int:
        """The size of the whole file."""
        return self.start + self.size + self.chunks * TAG_SIZE

    def covering(self, offset: int, length: int) -> ChunkRange:
        """Return the whole chunks that hold a range of plain bytes (at least one chunk, within the payload)."""
        first = min(offset // CHUNK_SIZE, self.chunks - 1)
        last = min(max(offset, offset + length - 1) // CHUNK_SIZE, self.chunks - 1)
        begin = self.start + first * SEALED_CHUNK_SIZE
        end = self.end if last == self.chunks - 1 else self.start + (last + 1) * SEALED_CHUNK_SIZE
        return ChunkRange(first, last - first + 1, begin, end - begin)

    def is_last(self, chunk: int) -> bool:
        """Tell whether that chunk is the last one."""
        return chunk == self.chunks - 1


class ChunkRange(msgspec.Struct, frozen=True):
    """``count`` chunks from number ``first``: ``length`` bytes of the file from ``offset``."""

    first: int
    count: int
    offset: int
    length: int


def encode_header(stanzas: tuple[Stanza, ...], file_key: bytes) -> bytes:
    """Return the header for that file key."""
    text = VERSION_LINE.decode()
    for stanza in stanzas:
        text += f"-> {' '.join((stanza.type, *stanza.arguments))}\n"
        body = encode64(stanza.body)
        # The last line is shorter than the others, and may be empty.
        text += "".join(f"{body[at : at + _COLUMNS]}\n" for at in range(0, len(body) + 1, _COLUMNS))
    authenticated = (text + "---").encode()
    return authenticated + f" {encode64(_mac(authenticated, file_key))}\n".encode()


def parse_header(data: bytes | memoryview) -> tuple[Header, int]:
    """Read the header that ``data`` begins with.

    Returns:
        The header and its size. (Its MAC is not checked yet: that takes the file key.)

    Raises:
        FormatError: it is no header of the format, or longer than ``data`` or ``MAX_HEADER_SIZE``.
    """
    content = bytes(data[:MAX_HEADER_SIZE])
    if not content.startswith(VERSION_LINE):
        if content.startswith(b"age-encryption.org/"):
            raise _malformed("it is of another version of the format")
        raise _malformed("it does not begin as an age file does")
    position = len(VERSION_LINE)
    stanzas: list[Stanza] = []
    while True:
        line, after = _line(content, position)
        if line.startswith("---"):
            break
        position = after
        if not line.startswith("-> "):
            raise _malformed("a stanza does not begin with '-> '")
        words = line[3:].split(" ")
        if not all(words) or not all("!" <= letter <= "~" for word in words for letter in word):
            raise _malformed("a stanza's arguments are not separated by single spaces")
        body = ""
        while True:
            line, position = _line(content, position)
            body += line
            if len(line) > _COLUMNS:
                raise _malformed("a line is too long")
            if len(line) < _COLUMNS:
                break
        stanzas.append(Stanza(words[0], tuple(words[1:]), decode64(body)))
    if not stanzas:
        raise _malformed("it has no stanza")
    mark, space, text = line.partition(" ")
    mac = decode64(text)
    if mark != "---" or not space or len(mac) != _MAC_SIZE:
        raise _malformed("its last line is not '---' and a MAC")
    return Header(tuple(stanzas), content[: position + len(mark)], mac), after


def check_mac(header: Header, file_key: bytes) -> None:
    """Compare the header's MAC.

    Raises:
        IntegrityError: the header was altered.
    """
    if not hmac.compare_digest(_mac(header.authenticated, file_key), header.mac):
        raise IntegrityError("The age header was altered", "its MAC does not fit")


def payload_key(file_key: bytes, nonce: bytes) -> bytes:
    """Return the key that the chunks are sealed with."""
    return derive_key(file_key, nonce, b"payload")


def chunk_nonce(number: int, *, last: bool) -> bytes:
    """Return the nonce of a chunk, counted from 0."""
    return number.to_bytes(11, "big") + (b"\1" if last else b"\0")


def derive_key(secret: bytes, salt: bytes, info: bytes) -> bytes:
    """Return 32 bytes by HKDF-SHA-256 (RFC 5869)."""
    return HKDF(algorithm=SHA256(), length=32, salt=salt, info=info).derive(secret)


def encode64(data: bytes) -> str:
    """Return base64 without padding."""
    return base64.b64encode(data).decode().rstrip("=")


def decode64(text: str) -> bytes:
    """Read base64 without padding, in its only canonical form.

    Raises:
        FormatError: it is not that.
    """
    try:
        data = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        data = b""
    if encode64(data) != text:
        raise _malformed("it has base64 that is not canonical")
    return data


def _mac(authenticated: bytes, file_key: bytes) -> bytes:
    return hmac.digest(derive_key(file_key, b"", b"header"), authenticated, "sha256")


def _line(content: bytes, position: int) -> tuple[str, int]:
    end = content.find(b"\n", position)
    if end < 0:
        raise _malformed("it ends within a line, or is too long")
    line = content[position:end].decode("latin-1")
    return line, end + 1


def _malformed(why: str) -> FormatError:
    return FormatError("This is no age header", why)
