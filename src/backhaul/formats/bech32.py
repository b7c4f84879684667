"""Bech32 (BIP 173) as age uses it for keys: whole bytes, no limit of length, checksums over the lower-case form."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from backhaul.errors import FormatError

_ALPHABET = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_GENERATOR = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)
_CHECKSUM_LENGTH = 6


def encode(prefix: str, data: bytes) -> str:
    """Return the lower-case string for that human-readable part."""
    values = list(_regroup(data, 8, 5, pad=True))
    state = _checksum([*_expand(prefix), *values, *([0] * _CHECKSUM_LENGTH)]) ^ 1
    values += [state >> 5 * (_CHECKSUM_LENGTH - 1 - place) & 31 for place in range(_CHECKSUM_LENGTH)]
    return f"{prefix}1{''.join(_ALPHABET[value] for value in values)}"


def decode(text: str) -> tuple[str, bytes]:
    """Return the human-readable part, in lower case, and the bytes.

    Raises:
        FormatError: it is no Bech32, or mistyped. (The text is not quoted: it may be a secret.)
    """
    if not text.isascii():
        raise _malformed("it has letters that the format does not use")
    if text not in (text.lower(), text.upper()):
        raise _malformed("it mixes upper and lower case")
    prefix, one, rest = text.lower().rpartition("1")
    if not one or not prefix or len(rest) < _CHECKSUM_LENGTH or not all("!" <= letter <= "~" for letter in prefix):
        raise _malformed("a part of it is missing")
    values = [_ALPHABET.find(letter) for letter in rest]
    if -1 in values:
        raise _malformed("it has letters that the format does not use")
    if _checksum([*_expand(prefix), *values]) != 1:
        raise _malformed("its checksum is wrong: it is mistyped or cut")
    groups = values[:-_CHECKSUM_LENGTH]
    data = bytes(_regroup(groups, 5, 8, pad=False))
    if list(_regroup(data, 8, 5, pad=True)) != groups:
        raise _malformed("it does not end with a whole byte")
    return prefix, data


def _expand(prefix: str) -> list[int]:
    codes = prefix.encode()
    return [*(code >> 5 for code in codes), 0, *(code & 31 for code in codes)]


def _checksum(values: Iterable[int]) -> int:
    state = 1
    for value in values:
        top = state >> 25
        state = (state & 0x1FFFFFF) << 5 ^ value
        for bit, constant in enumerate(_GENERATOR):
            if top >> bit & 1:
                state ^= constant
    return state


def _regroup(values: Iterable[int], size: int, new_size: int, *, pad: bool) -> Iterator[int]:
    """Cut a row of ``size``-bit numbers into ``new_size``-bit ones; what is left over is padded, or dropped."""
    held = bits = 0
    for value in values:
        held = held << size | value
        bits += size
        while bits >= new_size:
            bits -= new_size
            yield held >> bits
            held &= (1 << bits) - 1
    if pad and bits:
        yield held << new_size - bits


def _malformed(why: str) -> FormatError:
    return FormatError("This is no age key", why)
