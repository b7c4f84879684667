"""The published test vectors of the age v1 format: what must open, what must not, and why not.

They are those of the age test kit (C2SP CCTV, folder ``age``; the vectors are 0BSD, CC0 or Unlicense), without the
post-quantum ones. The vectors are files made by short recipes from a fixed "random" stream, so they are made again
here: a name, what a reader must come to, and the recipe. The builder knows nothing of Backhaul; that it makes the
published bytes is what the first tests show, by lines of published files.

What a reader must come to, in the words of the kit, and what that is here:

- ``success``: the plaintext comes out;
- ``no match``: ``IdentityError``;
- ``HMAC failure``: ``IntegrityError``;
- ``header failure``: ``FormatError``;
- ``payload failure``: ``IntegrityError``, and nothing but the good chunks in front came out;
- ``armor failure``: ``FormatError`` already from the armor.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from typing import NamedTuple, Self

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from backhaul.errors import FormatError, IdentityError, IntegrityError
from backhaul.formats import age_armor
from backhaul.formats.age_keys import PassphraseIdentity, parse_identities
from backhaul.transforms.encrypt import opened_chunks

pytestmark = pytest.mark.unit

CHUNK = 64 * 1024
FILE_KEY = b"YELLOW SUBMARINE"
LONG_FILE_KEY = b"A LONGER YELLOW SUBMARINE"
IDENTITY = bytes.fromhex("ca1626252c53cf1a4dc46695e7fcc46594cb4ccadedb6712dfda0753f3ae355e")
RANDOM = bytes.fromhex("ac5d3f3706e55071d3a604204697b9091b35c6e687dd00da3ac379ac9f742c21")
# Ends with a zero byte, so that one byte too few looks like a number written short.
SHARE_ENDING_IN_ZERO = bytes.fromhex("97ba38a135fd5f9137fca3836bfec24340ab03d7ca316b26f482636334a52600")
# A point of order 8: whatever the secret, what is shared is zero.
LOW_ORDER_SHARE = bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f11d7")
BASE64 = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


# --- the builder

Edit = Callable[[str], str]


def encode64(data: bytes) -> str:
    return base64.b64encode(data).decode().rstrip("=")


def bump(text: str) -> str:
    """Raise the last character by one: the spare bits are then not zero, which only a strict decoder minds."""
    return text[:-1] + BASE64[BASE64.index(text[-1]) + 1]


def flip(text: str) -> str:
    """Invert the last byte of what the line encodes."""
    data = base64.b64decode(text + "=" * (-len(text) % 4))
    return encode64(data[:-1] + bytes([data[-1] ^ 0xFF]))


def derive(secret: bytes, salt: bytes | None, info: str) -> bytes:
    return HKDF(SHA256(), 32, salt, info.encode()).derive(secret)


def public_of(secret: bytes) -> bytes:
    return X25519PrivateKey.from_private_bytes(secret).public_key().public_bytes_raw()


def exchange(secret: bytes, public: bytes) -> bytes:
    try:
        return X25519PrivateKey.from_private_bytes(secret).exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # of low order; the recipes need the zero that no reader may accept
        return bytes(32)


# As the kit has them in bech32. The third is the first thing that the "random" stream gives.
IDENTITY_TEXTS = {
    IDENTITY: "AGE-SECRET-KEY-1EGTZVFFV20835NWYV6270LXYVK2VKNX2MMDKWYKLMGR48UAWX40Q2P2LM0",
    public_of(IDENTITY): "AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6",
    RANDOM: "AGE-SECRET-KEY-143WN7DCXU4G8R5AXQSSYD9AEPYDNT3HXSLWSPK36CDU6E8M59SSSAGZ3KG",
}


class Draft:
    """An age file in the making; each step adds to it and returns it."""

    def __init__(self) -> None:
        self.lines = ["age-encryption.org/v1"]
        self.eol = "\n"
        self.tail = bytearray()
        self.file_key = FILE_KEY
        self.identities: list[str] = []
        self.passphrases: list[str] = []
        self.plaintext = bytearray()
        self._random = Cipher(algorithms.ChaCha20(b"TEST RANDOMNESS TEST RANDOMNESS!", bytes(16)), None).encryptor()
        self._stream_key = b""
        self._counter = 0

    def header(self) -> bytes:
        return "".join(line + self.eol for line in self.lines).encode()

    def random(self, size: int) -> bytes:
        return self._random.update(bytes(size))

    def having(self, *, file_key: bytes = FILE_KEY, eol: str = "\n") -> Self:
        self.file_key, self.eol = file_key, eol
        return self

    def line(self, *lines: str) -> Self:
        self.lines += lines
        return self

    def edit(self, index: int, change: Edit) -> Self:
        self.lines[index] = change(self.lines[index])
        return self

    def stanza(self, *words: str, body: bytes = b"") -> Self:
        # A full line asks for another behind it, if only an empty one.
        text = encode64(body)
        return self.line(" ".join(["->", *words]), *(text[i : i + 64] for i in range(0, len(text) + 1, 64)))

    def sealed(self, key: bytes, *words: str) -> Self:
        return self.stanza(*words, body=ChaCha20Poly1305(key).encrypt(bytes(12), self.file_key, None))

    def identity(self, secret: bytes = IDENTITY) -> Self:
        self.identities.append(IDENTITY_TEXTS[secret])
        return self

    def recipient(self, secret: bytes = IDENTITY, share: bytes | None = None) -> Self:
        share = public_of(self.random(32)) if share is None else share
        key = derive(exchange(secret, share), share + public_of(secret), "age-encryption.org/v1/X25519")
        return self.sealed(key, "X25519", encode64(share))

    def x25519(self, secret: bytes = IDENTITY, share: bytes | None = None) -> Self:
        return self.identity(secret).recipient(secret, share)

    def passphrase(self, passphrase: str = "password") -> Self:
        self.passphrases.append(passphrase)
        return self

    def scrypt(self, passphrase: str = "password", shown: str = "10", salt: bytes | None = None) -> Self:
        salt = self.random(16) if salt is None else salt
        key = hashlib.scrypt(
            passphrase.encode(), salt=b"age-encryption.org/v1/scrypt" + salt, n=1 << 10, r=8, p=1, dklen=32
        )
        return self.sealed(key, "scrypt", encode64(salt), shown)

    def mac(self) -> Self:
        key = derive(self.file_key, None, "header")
        return self.line("--- " + encode64(hmac.digest(key, self.header() + b"---", "sha256")))

    def nonce(self) -> Self:
        nonce = self.random(16)
        self._stream_key = derive(self.file_key, nonce, "payload")
        return self.raw(nonce)

    def chunk(self, content: bytes | int, *, last: bool = False) -> Self:
        """Add a chunk of these bytes, or of as many as make the ciphertext all zeros, as the long vectors have it."""
        nonce = self._counter.to_bytes(11, "big") + bytes([last])
        self._counter += 1
        if isinstance(content, int):
            stream = Cipher(algorithms.ChaCha20(self._stream_key, (1).to_bytes(4, "little") + nonce), None)
            content = stream.encryptor().update(bytes(content))
        self.plaintext += content
        return self.raw(ChaCha20Poly1305(self._stream_key).encrypt(nonce, content, None))

    def last(self, content: bytes | int) -> Self:
        return self.chunk(content, last=True)

    def full(self, count: int) -> Self:
        """Add a nonce and full chunks, none of them the last."""
        self.nonce()
        for _ in range(count):
            self.chunk(CHUNK)
        return self

    def payload(self, content: bytes | int = b"age") -> Self:
        return self.nonce().last(content)

    def raw(self, data: bytes) -> Self:
        self.tail += data
        return self

    def damaged(self, *, cut: int = 0) -> Self:
        """Drop so many bytes from the end, or else change the last one."""
        if cut:
            del self.tail[-cut:]
        else:
            self.tail[-1] ^= 0x20
        return self


def wrapped(text: str) -> str:
    return "".join(text[i : i + 64] + "\n" for i in range(0, len(text), 64))


def armor(data: bytes) -> str:
    body = wrapped(base64.b64encode(data).decode())
    return f"-----BEGIN AGE ENCRYPTED FILE-----\n{body}-----END AGE ENCRYPTED FILE-----\n"


def line_as(index: int, change: Edit) -> Edit:
    """Return a step that changes one line of an armored file."""

    def step(text: str) -> str:
        lines = text.splitlines()
        lines[index] = change(lines[index])
        return "".join(line + "\n" for line in lines)

    return step


def body_as(change: Edit) -> Edit:
    """Return a step that lays out anew what stands between the first and the last line of an armored file."""

    def step(text: str) -> str:
        begin, *body, end = text.splitlines(keepends=True)
        return begin + change("".join(body).replace("\n", "")) + end

    return step


# --- the recipes

Step = Callable[[Draft], object]

# The body for a work factor of 18, which takes a second to derive, and that for 23, which takes half a minute.
BODY_OF_18 = "1hqlaoCUpkgzYI+oTS0p1Nxm9u3Fjib8REjrwp40mRE"
BODY_OF_23 = "qW9eVsT0NVb/Vswtw8kPIxUnaYmm9Px1dYmq2+4+qZA"

# Up to the MAC line; a right MAC and the payload "age" follow. By what a reader must come to.
HEADERS: dict[str, dict[str, Step]] = {
    "success": {
        "scrypt": lambda d: d.passphrase().scrypt(),
        "stanza_empty_body": lambda d: d.x25519().stanza("empty"),
        "stanza_empty_last_line": lambda d: d.x25519().stanza("stanza", body=b"A" * 96),
        "stanza_valid_characters": lambda d: (
            d.stanza("!\"#$%&'", "()*+,-./", "01234567", "89:;<=>?", "@ABCDEFG", "HIJKLMNO")
            .stanza("PQRSTUVW", "XYZ[\\]^_", "`abcdefg", "hijklmno", "pqrstuvw", "xyz{|}~")
            .x25519()
        ),
        "x25519": lambda d: d.x25519(),
        # The kit's first "x25519": the test identity's public half served as the secret.
        "x25519_first_edition": lambda d: d.x25519(public_of(IDENTITY)),
        "x25519_grease": lambda d: d.stanza("grease").x25519().stanza("grease"),
        "x25519_multiple_recipients": lambda d: d.recipient(d.random(32)).x25519(),
    },
    "no match": {
        "scrypt_bad_tag": lambda d: d.passphrase().scrypt().edit(-1, flip),
        "scrypt_no_match": lambda d: d.passphrase("wrong").scrypt(),
        "scrypt_uppercase": lambda d: d.passphrase().scrypt().edit(-2, lambda s: s.replace("scrypt", "Scrypt")),
        "scrypt_work_factor_wrong": lambda d: d.passphrase().scrypt().edit(-1, lambda s: BODY_OF_18),
        "x25519_bad_tag": lambda d: d.x25519().edit(-1, flip),
        "x25519_lowercase": lambda d: d.x25519().edit(-2, lambda s: s.replace("X25519", "x25519")),
        "x25519_no_match": lambda d: d.identity(d.random(32)).recipient(public_of(IDENTITY)),
    },
    "header failure": {
        "header_crlf": lambda d: d.x25519().having(eol="\r\n"),
        "scrypt_and_x25519": lambda d: d.identity(d.random(32)).recipient().passphrase().scrypt(),
        "scrypt_double": lambda d: d.passphrase().scrypt().passphrase("hunter2").scrypt("hunter2"),
        "scrypt_extra_argument": lambda d: d.passphrase().scrypt(shown="10 10"),
        "scrypt_long_file_key": lambda d: d.having(file_key=LONG_FILE_KEY).passphrase().scrypt(),
        "scrypt_not_canonical_body": lambda d: d.passphrase().scrypt().edit(-1, bump),
        "scrypt_not_canonical_salt": lambda d: d.passphrase().scrypt().edit(-2, lambda s: bump(s[:-3]) + " 10"),
        "scrypt_salt_long": lambda d: d.passphrase().scrypt(salt=d.random(20)),
        "scrypt_salt_missing": lambda d: d.passphrase().scrypt(salt=b"").edit(-2, lambda s: s.replace("  ", " ")),
        "scrypt_salt_short": lambda d: d.passphrase().scrypt(salt=d.random(12)),
        "scrypt_work_factor_23": lambda d: d.passphrase().line("-> scrypt rF0/NwblUHHTpgQgRpe5CQ 23", BODY_OF_23),
        "scrypt_work_factor_hex": lambda d: d.passphrase().scrypt(shown="0xa"),
        "scrypt_work_factor_leading_garbage": lambda d: d.passphrase().scrypt(shown="aaaa10"),
        "scrypt_work_factor_leading_plus": lambda d: d.passphrase().scrypt(shown="+10"),
        "scrypt_work_factor_leading_zero_decimal": lambda d: d.passphrase().scrypt(shown="010"),
        "scrypt_work_factor_leading_zero_octal": lambda d: d.passphrase().scrypt(shown="012"),
        "scrypt_work_factor_missing": lambda d: (
            d.passphrase().scrypt().edit(-2, lambda s: s.removesuffix(" 10")).edit(-1, lambda s: BODY_OF_18)
        ),
        "scrypt_work_factor_negative": lambda d: d.passphrase().scrypt(shown="-10"),
        # A signed 64-bit integer would wrap to 10 below zero.
        "scrypt_work_factor_overflow": lambda d: d.passphrase().scrypt(shown="9223372036854775818"),
        # Published by name alone; the recipe is what the name says.
        "scrypt_work_factor_trailing_garbage": lambda d: d.passphrase().scrypt(shown="10aaaa"),
        "scrypt_work_factor_zero": lambda d: d.passphrase().scrypt(shown="0"),
        "stanza_bad_start": lambda d: d.x25519().line("-- stanza", ""),
        "stanza_base64_padding": lambda d: d.x25519().stanza("stanza", body=b"A" * 50).edit(-1, lambda s: s + "="),
        "stanza_empty_argument": lambda d: d.x25519().stanza("stanza", "", "argument"),
        "stanza_invalid_character": lambda d: d.x25519().stanza("stanza", "è"),
        "stanza_long_line": lambda d: d.x25519().line("-> stanza", "A" * 68, ""),
        "stanza_missing_body": lambda d: d.x25519().line("-> empty"),
        "stanza_missing_final_line": lambda d: d.x25519().line("-> stanza", "A" * 64),
        "stanza_multiple_short_lines": lambda d: d.x25519().line("-> stanza", "A" * 32, "A" * 32),
        "stanza_no_arguments": lambda d: d.x25519().stanza(),
        "stanza_not_canonical": lambda d: d.x25519().stanza("stanza", body=b"A" * 50).edit(-1, bump),
        "stanza_spurious_cr": lambda d: d.x25519().line("-> stanza", "A" * 32 + "\r" + "A" * 31),
        "version_unsupported": lambda d: d.edit(0, lambda s: s + "234").x25519(),
        "x25519_extra_argument": lambda d: d.x25519().edit(-2, lambda s: s + " 1234"),
        "x25519_identity": lambda d: d.x25519(share=bytes(32)),
        "x25519_long_file_key": lambda d: d.having(file_key=LONG_FILE_KEY).x25519(),
        "x25519_long_share": lambda d: d.x25519().edit(-2, lambda s: s + "A"),
        "x25519_low_order": lambda d: d.x25519(share=LOW_ORDER_SHARE),
        "x25519_not_canonical_body": lambda d: d.x25519().edit(-1, bump),
        "x25519_not_canonical_share": lambda d: d.x25519().edit(-2, bump),
        "x25519_short_share": lambda d: d.x25519(share=SHARE_ENDING_IN_ZERO).edit(-2, lambda s: s[:-1]),
    },
}

# What becomes of the MAC line of "x25519".
MACS: dict[str, tuple[str, Edit]] = {
    # The MAC under a file key of zeros.
    "hmac_bad": ("HMAC failure", lambda s: Draft().x25519().having(file_key=bytes(16)).mac().lines[-1]),
    "hmac_extra_space": ("header failure", lambda s: s.replace("--- ", "---  ")),
    "hmac_garbage": ("header failure", lambda s: s + "AAA"),
    "hmac_missing": ("header failure", lambda s: s[:4]),
    "hmac_no_space": ("header failure", lambda s: s.replace("--- ", "---")),
    "hmac_not_canonical": ("header failure", bump),
    "hmac_trailing_space": ("header failure", lambda s: s + " "),
    "hmac_truncated": ("header failure", lambda s: s[:8]),
}

# What follows the header of "x25519", and how many bytes may come out of it: None means all, and success.
STREAMS: dict[str, tuple[int | None, Step]] = {
    "stream_257_chunks": (None, lambda d: d.full(256).last(1)),
    "stream_257_chunks_full": (None, lambda d: d.full(256).last(CHUNK)),
    "stream_258_chunks": (None, lambda d: d.full(257).last(1)),
    "stream_bad_tag": (0, lambda d: d.payload().damaged()),
    "stream_bad_tag_second_chunk": (CHUNK, lambda d: d.full(1).last(b"age").damaged()),
    "stream_bad_tag_second_chunk_full": (CHUNK, lambda d: d.full(1).last(CHUNK).damaged()),
    "stream_empty_payload": (None, lambda d: d.payload(b"")),
    "stream_last_chunk_empty": (CHUNK, lambda d: d.full(1).last(0)),
    "stream_last_chunk_full": (None, lambda d: d.payload(CHUNK)),
    "stream_last_chunk_full_second": (None, lambda d: d.full(1).last(CHUNK)),
    "stream_missing_tag": (0, lambda d: d.payload().damaged(cut=16)),
    "stream_no_chunks": (0, lambda d: d.nonce()),
    "stream_no_final": (0, lambda d: d.nonce().chunk(1)),
    "stream_no_final_full": (CHUNK, lambda d: d.full(1)),
    "stream_no_final_two_chunks": (CHUNK, lambda d: d.full(1).chunk(b"age")),
    "stream_no_final_two_chunks_full": (2 * CHUNK, lambda d: d.full(2)),
    "stream_short_chunk": (0, lambda d: d.nonce().raw(d.random(12))),
    "stream_short_second_chunk": (CHUNK, lambda d: d.full(1).raw(d.random(12))),
    "stream_three_chunks": (None, lambda d: d.full(2).last(CHUNK)),
    "stream_trailing_garbage_long": (CHUNK, lambda d: d.payload(CHUNK).raw(d.random(20))),
    "stream_trailing_garbage_short": (CHUNK, lambda d: d.payload(CHUNK).raw(d.random(12))),
    "stream_two_final_chunks": (CHUNK, lambda d: d.payload(CHUNK).last(b"age")),
    "stream_two_final_chunks_full": (CHUNK, lambda d: d.payload(CHUNK).last(CHUNK)),
    "stream_two_final_chunks_second": (2 * CHUNK, lambda d: d.full(1).last(CHUNK).last(1)),
    "stream_two_final_chunks_short": (0, lambda d: d.payload(1).last(1)),
}

# The nonce counts as header: it is read before the payload is.
NONCES: dict[str, Step] = {
    "empty": lambda d: d.lines.clear(),
    "stream_no_nonce": lambda d: d,
    "stream_short_nonce": lambda d: d.raw(d.random(12)),
}

# Another vector in armor.
ARMORED = {
    "armor_empty": "empty",
    "armor_first_edition": "x25519_first_edition",
    "armor_garbage_encoded": "stream_trailing_garbage_long",
    "armor_header_crlf": "header_crlf",
    "armor_no_match": "x25519_no_match",
    "armor_scrypt": "scrypt",
    "armor_x25519": "x25519",
}

AGE = b"age"
AGES = b"age " * 10  # makes the file end with a full line of armor
AROUND = "\n\r   \t\n"

# "x25519" with this payload, in armor, and what becomes of the text.
ARMORS: dict[str, dict[str, tuple[bytes, Edit]]] = {
    "success": {
        "armor_crlf": (AGE, lambda s: s.replace("\n", "\r\n")),
        "armor_full_last_line": (AGES, lambda s: s),
        "armor_no_eol": (AGE, lambda s: s[:-1]),
        "armor_whitespace_outside": (AGE, lambda s: AROUND + s + AROUND),
    },
    "armor failure": {
        "armor_empty_last_line": (AGES, line_as(-1, lambda s: "\n" + s)),
        "armor_empty_line_begin": (AGE, line_as(0, lambda s: s + "\n")),
        "armor_empty_line_end": (AGE, line_as(-1, lambda s: "\n" + s)),
        "armor_eol_between_padding": (b"age12", lambda s: s.replace("==", "=\n=")),
        "armor_garbage_leading": (AGE, lambda s: "garbage\n" + s),
        "armor_garbage_trailing": (AGE, lambda s: s + "garbage\n"),
        "armor_headers": (AGE, line_as(0, lambda s: s + "\nHeaders: are\nNot: allowed\n")),
        "armor_invalid_character_header": (AGE, line_as(1, lambda s: s[:4] + "*" + s[5:])),
        "armor_invalid_character_payload": (AGE, line_as(-2, lambda s: "*" + s[1:])),
        "armor_long_line": (AGE, body_as(lambda s: s + "\n")),
        "armor_lowercase": (AGE, lambda s: s.replace(" AGE ", " age ")),
        "armor_no_end_line": (AGE, lambda s: s.removesuffix("-----END AGE ENCRYPTED FILE-----\n")),
        "armor_no_padding": (AGE, line_as(-2, lambda s: s.rstrip("="))),
        "armor_not_canonical": (AGE, line_as(-2, lambda s: bump(s.rstrip("=")) + "=")),
        "armor_pgp_checksum": (AGE, body_as(lambda s: "\n" + wrapped(s) + "=yjEF\n")),
        "armor_short_line": (AGE, body_as(lambda s: s[:16] + "\n" + wrapped(s[16:]))),
        "armor_whitespace_begin": (AGE, line_as(0, lambda s: "----- BEGIN AGE ENCRYPTED FILE -----")),
        "armor_whitespace_end": (AGE, line_as(-1, lambda s: "----- END AGE ENCRYPTED FILE -----")),
        "armor_whitespace_eol": (AGE, line_as(-3, lambda s: s + " ")),
        "armor_whitespace_last_line": (AGE, line_as(-2, lambda s: s + " ")),
        "armor_whitespace_line_start": (AGE, line_as(-3, lambda s: " " + s)),
        "armor_wrong_type": (AGE, lambda s: s.replace("FILE", "MESSAGE")),
    },
}

NAMES = sorted(
    [
        *(name for recipes in HEADERS.values() for name in recipes),
        *(name for edits in ARMORS.values() for name in edits),
        *[*MACS, *STREAMS, *NONCES, *ARMORED],
    ]
)


class Vector(NamedTuple):
    expect: str
    draft: Draft
    # What may come out, whether or not the rest of it fails.
    good: bytes = b""
    armored: bytes | None = None

    def data(self) -> bytes:
        return self.draft.header() + self.draft.tail


def build(name: str) -> Vector:
    draft = Draft()
    if name in ARMORED:
        inner = build(ARMORED[name])
        return inner._replace(armored=armor(inner.data()).encode())
    for expect, recipes in HEADERS.items():
        if name in recipes:
            recipes[name](draft)
            draft.mac().payload()
            return Vector(expect, draft, bytes(draft.plaintext) if expect == "success" else b"")
    draft.x25519().mac()
    for expect, edits in ARMORS.items():
        if name in edits:
            content, edit = edits[name]
            draft.payload(content)
            armored = edit(armor(draft.header() + draft.tail)).encode()
            return Vector(expect, draft, content if expect == "success" else b"", armored)
    if name in MACS:
        expect, edit = MACS[name]
        return Vector(expect, draft.edit(-1, edit).payload())
    if name in NONCES:
        NONCES[name](draft)
        return Vector("header failure", draft)
    size, step = STREAMS[name]
    step(draft)
    return Vector("success" if size is None else "payload failure", draft, bytes(draft.plaintext[:size]))


# --- what is published

# The MAC line stands for all that is in front of it.
MAC_LINES = {
    "hmac_bad": "8McE3ix9R34E/vLrQv3yepsHjo/LXhfs22Ab3UyInmg",
    "hmac_truncated": "WyJp",
    "header_crlf": "2KIGb7ye32MWtUuEVWkO3MP6qCDLzOvT9wF06lelBSI",
    "scrypt_and_x25519": "yp4Z0lV1LEdkm1+uDCuPUV+9hIXbPKrBXKQ/f5Y03As",
    "scrypt_double": "a5d+4Ay1evJhoDskIzuTZV9bBgKk4573VZNfuoWJDPE",
    "scrypt_salt_missing": "1QsPcEbBSylfP4apakJqtDBJMrpd81rPuSLTCvdZx6E",
    "scrypt_work_factor_23": "38TpQMxQRRNMfmYYpBX6DDrPx4/QY5UmJnhPyVoX/cw",
    "stanza_base64_padding": "/B04zJExClyv/5eAl7g3u3ELs0CUtMpq6ujNdFoG15s",
    "stanza_empty_last_line": "D0Uu/whYjf/Cwqz6MHRR9T5em06PLAjTCMcw8aXdyEk",
    "stanza_invalid_character": "hnSCjLtEBMl3qMJ3K6Tq/SkIL6VZZ1s3Yl9IOSjxgy0",
    "stanza_not_canonical": "3dcBdeuKtDbEpx/hhcA6qEAR/niQh2MAsruVPRsH4CI",
    "stanza_spurious_cr": "ahynG58BNILnncvWP3dPKYYuzvcn8Xajrz3LdsOfwJI",
    "stanza_valid_characters": "qcNy6mAn80JKuXPUW7ANJdOhzbOtVSsIGM12i5B4vx4",
    "x25519_bad_tag": "zOCHpynV0aV7p4R6c+bOapgpq9TtpFgGgYghQ2+PIX8",
    "x25519_grease": "QIfAOEMt1fGOf2FP2m3+TwFQtfy2H3sX3YqUAQRApkM",
    "x25519_identity": "Pne3IPMDvBj7wRbPMcNViffpVZAx814tgMxp8AwyMhs",
    "x25519_long_share": "QbEwdWirchS37UUOPh7uVddRiOaWjFwRUpaQ4Q+Z1RE",
    "x25519_low_order": "sXw327YMT1/ULXe+ZyRMbMY0Z2jnWHGgI9j1we6yQ8A",
    "x25519_multiple_recipients": "855pKblQzZ3oabDowxRDQvSj/xo47ZSh5WTjkmK0I0U",
    "x25519_no_match": "rrpTlvKEKrK3EqhoOPJeP1KE8O1d2arrRez77mwekRc",
    "x25519_short_share": "Zn1/VRtHpD93HtIXSv1S++POXeKcQF7w1+hpXhMiAbk",
}

# What is behind the header.
TAILS = {
    "armor_full_last_line": "7s9ix86RtDMnTmjU8vkTTLdMW3bj4iHSYS3WWUtZB5wJqKgEe8kpsp0iOnD2CNG4DVKBC0Z7SAcCFb8xdwV9CRavSEE7OU1c",
    "x25519": "7s9ix86RtDMnTmjU8vkTTLdMW/73vqpSyPC8DpksHoMx+2Y=",
    "x25519_no_match": "3d9y0G+8q1ffPQ0xJJatIYzX/W+AeLv4gS3YeUcVXre9Xog=",
}

ARMORED_SCRYPT = """-----BEGIN AGE ENCRYPTED FILE-----
YWdlLWVuY3J5cHRpb24ub3JnL3YxCi0+IHNjcnlwdCByRjAvTndibFVISFRwZ1Fn
UnBlNUNRIDEwCmdVakV5bUZLTVZYUUVLZE1NSEwyNG9ZZXhqRTNUSUMwTzB6R1Nx
SjJhVVkKLS0tIElPWGlRWVN0a29UMW12WlcydEZPcVpkaFJWdmo1OGVnQUJ4L3NX
ZlpRYmMKGzXG5ofdANo6w3msn3QsIf0YWhuePe1znRSsappQEk24Ztg=
-----END AGE ENCRYPTED FILE-----
"""


def test_the_builder_makes_the_first_edition_of_x25519() -> None:
    draft = build("x25519_first_edition").draft
    assert draft.file_key == b"YELLOW SUBMARINE"
    assert draft.identities == ["AGE-SECRET-KEY-1XMWWC06LY3EE5RYTXM9MFLAZ2U56JJJ36S0MYPDRWSVLUL66MV4QX3S7F6"]
    assert draft.lines == [
        "age-encryption.org/v1",
        "-> X25519 TEiF0ypqr+bpvcqXNyCVJpL7OuwPdVwPL7KQEbFDOCc",
        "EmECAEcKN+n/Vs9SbWiV+Hu0r+E8R77DdWYyd83nw7U",
        "--- Vn+54jqiiUCE+WZcEVY3f1sqHjlu/z1LCQ/T7Xm7qI0",
    ]
    digest = hashlib.sha256(draft.plaintext).hexdigest()
    assert digest == "013f54400c82da08037759ada907a8b864e97de81c088a182062c4b5622fd2ab"


def test_the_builder_makes_the_published_files() -> None:
    assert {name: build(name).draft.lines[-1].split()[1] for name in MAC_LINES} == MAC_LINES
    assert {name: base64.b64encode(build(name).draft.tail).decode() for name in TAILS} == TAILS
    assert build("armor_scrypt").armored == ARMORED_SCRYPT.encode()


# --- what a reader makes of them

ERRORS: dict[str, type[Exception]] = {
    "no match": IdentityError,
    "HMAC failure": IntegrityError,
    "header failure": FormatError,
    "payload failure": IntegrityError,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_vector_comes_to_what_it_must(name: str) -> None:
    vector = build(name)
    data = vector.data()
    if vector.expect == "armor failure":
        assert vector.armored is not None
        with pytest.raises(FormatError):
            age_armor.decode(vector.armored)
        return
    if vector.armored is not None:
        assert age_armor.decode(vector.armored) == data
    texts = vector.draft.identities
    identities = [
        *(parse_identities("\n".join(texts)) if texts else ()),
        *map(PassphraseIdentity, vector.draft.passphrases),
    ]
    out = bytearray()
    failed: type[Exception] | None = None
    try:
        for chunk in opened_chunks(data, identities):
            out += chunk
    except tuple(ERRORS.values()) as error:
        failed = type(error)
    # Compared by digest: a difference of megabytes tells nobody anything.
    assert (failed, len(out)) == (ERRORS.get(vector.expect), len(vector.good))
    assert hashlib.sha256(out).digest() == hashlib.sha256(vector.good).digest()
