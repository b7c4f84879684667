"""Streams that are encrypted already, by their first bytes: to encrypt or compress them again buys nothing."""

from __future__ import annotations

from backhaul.formats.age import VERSION_LINE
from backhaul.formats.age_armor import BEGIN

_BEGINNINGS = (
    (VERSION_LINE, "age"),
    (BEGIN, "age"),
    (b"-----BEGIN PGP MESSAGE-----", "OpenPGP"),
    (b"Salted__", "openssl enc"),
)


def encrypted_as(head: bytes) -> str | None:
    """Return what a stream that begins like that was encrypted with, as far as its beginning tells."""
    return next((name for beginning, name in _BEGINNINGS if head.startswith(beginning)), None)
