"""Data like that of real dumps, made quickly and the same every time."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta


def _words(text: str) -> list[str]:
    return text.split()


_FIRST = _words("Anna Ben Clara David Emma Felix Greta Hugo Ida Jonas Klara Leon Mia Nils Olga Paul Rosa Sven Tina")
_LAST = _words("Schmidt Meyer Novak Rossi Silva Jensen Kowalski Dubois García Larsen Weber Fischer Costa Øverland")
_CITIES = _words("Hamburg Berlin Lyon Porto Gdańsk Oslo Turin Graz Gent Malmö Leeds Cork")
_STATUS = _words("new paid packed shipped delivered returned")
_ADJECTIVES = _words("small red blue green heavy light wooden steel plastic ceramic woven vintage modern folding")
_NOUNS = _words("chair table lamp desk shelf cable charger bottle kettle bicycle helmet jacket backpack notebook")
_EVENTS = _words("view search add_to_cart checkout login logout")

_HEADER = """--
-- PostgreSQL database dump
--

SET statement_timeout = 0;
SET client_encoding = 'UTF8';
SET standard_conforming_strings = on;

"""
_FOOTER = b"--\n-- PostgreSQL database dump complete\n--\n\n"
_UNIQUE = 48 << 20


def dump_text(size: int, seed: int = 1) -> Iterator[bytes]:
    """Yield the text of a plain SQL dump, ``size`` bytes in all, in pieces of about a megabyte.

    Customers, orders and an event log in COPY format. After 48 MiB the text comes again: far beyond the
    window of every compressor that it is measured with, so repetition helps none of them.
    """
    footer = _FOOTER[-min(size, len(_FOOTER)) :] if size else b""
    left = size - len(footer)
    text = _text(seed)
    number = 0
    while left > 0:
        piece = text.piece(number)
        yield piece[:left]
        left -= len(piece)
        number += 1
    yield footer


def random_bytes(size: int, seed: int = 1) -> Iterator[bytes]:
    """Yield bytes that do not compress, the same for the same seed, in pieces of a megabyte."""
    generator = random.Random(seed)
    while size > 0:
        piece = generator.randbytes(min(size, 1 << 20))
        size -= len(piece)
        yield piece


class _Text:
    """The pieces of one seed's text; kept, since making them takes longer than most tests do with them."""

    def __init__(self, seed: int) -> None:
        self._fresh = _pieces(random.Random(seed))
        self._made: list[bytes] = []
        self._size = 0
        self._lock = threading.Lock()

    def piece(self, number: int) -> bytes:
        with self._lock:
            return self._piece(number)

    def _piece(self, number: int) -> bytes:
        while number >= len(self._made) and self._size < _UNIQUE:
            piece = next(self._fresh)
            self._made.append(piece)
            self._size += len(piece)
        return self._made[number % len(self._made)]


@functools.lru_cache(maxsize=2)
def _text(seed: int) -> _Text:
    return _Text(seed)


def _pieces(rng: random.Random) -> Iterator[bytes]:
    yield _HEADER.encode()
    customer = order = event = 0
    clock = datetime(2026, 1, 1, tzinfo=UTC)
    while True:
        rows = ["COPY public.customers (id, name, email, city, created_at) FROM stdin;\n"]
        for _ in range(3000):
            customer += 1
            first, last = rng.choice(_FIRST), rng.choice(_LAST)
            clock += timedelta(seconds=rng.randrange(40))
            rows.append(
                f"{customer}\t{first} {last}\t{first.lower()}.{customer}@example.com\t{rng.choice(_CITIES)}"
                f"\t{clock:%Y-%m-%d %H:%M:%S}+00\n"
            )
        yield from _joined(rows, "customers_pkey")
        rows = ["COPY public.orders (id, customer_id, placed_at, status, total, item, quantity, note) FROM stdin;\n"]
        for _ in range(9000):
            order += 1
            clock += timedelta(milliseconds=rng.randrange(90_000))
            note = "\\N" if rng.random() < 0.8 else f"leave at the door, {rng.choice(_ADJECTIVES)} gate"
            rows.append(
                f"{order}\t{rng.randrange(1, customer)}\t{clock:%Y-%m-%d %H:%M:%S.%f}+00\t{rng.choice(_STATUS)}"
                f"\t{rng.randrange(300, 90000) / 100}\t{rng.choice(_ADJECTIVES)} {rng.choice(_NOUNS)}"
                f"\t{rng.randrange(1, 6)}\t{note}\n"
            )
        yield from _joined(rows, "orders_pkey")
        rows = ["COPY public.events (id, at, session, payload) FROM stdin;\n"]
        for _ in range(6000):
            event += 1
            rows.append(
                f"{event}\t{clock:%Y-%m-%d %H:%M:%S}+00\t{rng.getrandbits(64):016x}"
                f'\t{{"type": "{rng.choice(_EVENTS)}", "customer": {rng.randrange(1, customer)}, '
                f'"ms": {rng.randrange(1, 900)}, "path": "/item/{rng.choice(_NOUNS)}"}}\n'
            )
        yield from _joined(rows, "events_pkey")


def _joined(rows: list[str], constraint: str) -> Iterator[bytes]:
    yield (
        "".join(rows) + f"\\.\n\nALTER TABLE ONLY public.t ADD CONSTRAINT {constraint} PRIMARY KEY (id);\n\n"
    ).encode()
