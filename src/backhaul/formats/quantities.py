"""Rates, durations and sizes as people write and read them.

``K M G T`` are powers of 1,000, as links and disks are sold; ``Ki Mi Gi Ti`` are powers of 1,024.
"""

from __future__ import annotations

import re

from backhaul.errors import UsageError

_FACTORS = {
    "": 1,
    "k": 1000,
    "m": 1000**2,
    "g": 1000**3,
    "t": 1000**4,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
    "ti": 1 << 40,
}
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 604800}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?(?:/s)?", re.ASCII | re.IGNORECASE)
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhdw])+", re.ASCII | re.IGNORECASE)


def parse_size(text: str) -> int:
    """Read ``40M``, ``1.5GiB`` or ``512`` as bytes.

    Raises:
        UsageError: it is no size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2].lower() not in _FACTORS:
        raise UsageError(
            f"{text!r} is not a size",
            "a size is a number with K, M, G, T, Ki, Mi, Gi or Ti",
            "Write e.g. 40M.",
        )
    return int(float(match[1]) * _FACTORS[match[2].lower()])


def parse_rate(text: str) -> int:
    """Read ``40M`` (or ``40MB/s``) as bytes a second, at least 1.

    Raises:
        UsageError: it is no rate.
    """
    try:
        rate = parse_size(text)
    except UsageError as error:
        raise UsageError(f"{text!r} is not a rate", error.why, "Write e.g. 40M, for 40 MB a second.") from error
    if rate < 1:
        raise UsageError(
            f"{text!r} is not a rate", "nothing would ever arrive", "Write e.g. 40M, or leave --limit out."
        )
    return rate


def parse_duration(text: str) -> float:
    """Read ``24h``, ``1h30m`` or ``0s`` as seconds; a bare number is refused, since its unit is a guess.

    Raises:
        UsageError: it is no duration.
    """
    if not _DURATION.fullmatch(text.strip()):
        raise UsageError(
            f"{text!r} is not a duration",
            "a duration is numbers with s, m, h, d or w",
            "Write e.g. 24h or 1h30m.",
        )
    return sum(
        float(number) * _SECONDS[unit.lower()]
        for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smhdw])", text, re.IGNORECASE)
    )


def format_size(size: float) -> str:
    """Write bytes for people: ``0 B``, ``1.2 kB``, ``4.29 GB`` (powers of 1,000)."""
    units = ["B", "kB", "MB", "GB", "TB"]
    while abs(size) >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    unit = units[0]
    if unit == "B":
        return f"{size:.0f} B"
    digits = 2 if abs(size) < 9.995 else 1 if abs(size) < 99.95 else 0
    return f"{size:.{digits}f} {unit}"


def format_duration(seconds: float) -> str:
    """Write seconds for people: ``0.4 s``, ``12 s``, ``3 min 05 s``, ``2 h 10 min``, ``3 d 4 h``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"
