"""Parity: pieces that make up for lost ones without a word to the sender.

Pure. With a parity of K, a chunk's pieces lie in rows of ``stride`` pieces, at most K rows, and each column has one
parity piece: the exclusive or of its pieces, the short ones filled up with zeros. The pieces of a column are a whole
row apart, so that a burst of losses as long as a row takes one of each column, and all of them come back.
A whole row is one number to Python: the work for each chunk is a few operations on a few big integers.
"""

from __future__ import annotations

from collections.abc import Sequence

from backhaul.formats.chunk import PIECE_SIZE


def stride(pieces: int, parity: int) -> int:
    """Return how many parity pieces a chunk of so many pieces has, and how far apart a column's pieces are."""
    return -(-pieces // parity)


def column(place: int, pieces: int, parity: int) -> range:
    """Return the places of the pieces that are in one column with that piece, itself among them."""
    apart = stride(pieces, parity)
    return range(place % apart, pieces, apart)


def parity_pieces(chunk: bytes | bytearray | memoryview, parity: int) -> list[bytes]:
    """Return a chunk's parity pieces, ``PIECE_SIZE`` bytes each, by column."""
    view = memoryview(chunk)
    count = stride(-(-len(view) // PIECE_SIZE), parity)
    row = count * PIECE_SIZE
    # (Little-endian, so that a row that is too short is as if zeros followed.)
    total = 0
    for start in range(0, len(view), row):
        total ^= int.from_bytes(view[start : start + row], "little")
    block = total.to_bytes(row, "little")
    return [block[start : start + PIECE_SIZE] for start in range(0, row, PIECE_SIZE)]


def recover(others: Sequence[bytes | bytearray | memoryview], parity_piece: bytes | memoryview, length: int) -> bytes:
    """Return the one missing piece of a column: ``length`` bytes, from all others and the parity piece."""
    total = int.from_bytes(parity_piece, "little")
    for piece in others:
        total ^= int.from_bytes(piece, "little")
    # (A wrong piece among them shows here or in the chunk's tag.)
    return total.to_bytes(PIECE_SIZE, "little")[:length]
