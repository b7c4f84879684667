"""The ASCII armor of age files (C2SP ``age``, after RFC 7468): for identity files that were encrypted with ``-a``."""

from __future__ import annotations

import base64
import binascii

from backhaul.errors import FormatError

BEGIN = b"-----BEGIN AGE ENCRYPTED FILE-----"
END = b"-----END AGE ENCRYPTED FILE-----"
_COLUMNS = 64


def is_armored(data: bytes) -> bool:
    """Tell whether that is armored, rightly or not."""
    return data.lstrip().startswith(BEGIN)


def decode(data: bytes) -> bytes:
    """Return the file inside.

    Strict, since what a lenient reader would pass over could be anything: lines of 64 columns, canonical base64,
    nothing but white space before and after. Lines end with LF or CRLF.

    Raises:
        FormatError: it is not that.
    """
    lines = data.strip(b" \t\r\n").replace(b"\r\n", b"\n").split(b"\n")
    if len(lines) < 2 or lines[0] != BEGIN or lines[-1] != END:
        raise _malformed("its first or last line is not the format's")
    body = lines[1:-1]
    if any(len(line) != _COLUMNS for line in body[:-1]) or (body and not 0 < len(body[-1]) <= _COLUMNS):
        raise _malformed("a line has another length than 64 columns")
    text = b"".join(body)
    try:
        inside = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise _malformed("it holds something else than base64") from error
    if base64.b64encode(inside) != text:
        raise _malformed("its base64 is not canonical")
    return inside


def _malformed(why: str) -> FormatError:
    return FormatError("This is no armored age file", why)
