"""Which tables go into which stream, so that all streams end at about the same time."""

from __future__ import annotations

from collections.abc import Sequence

# What is smaller is not worth a place of its own: it goes with all the rest.
SMALL_TABLE = 16 << 20
# Command lines are finite; the largest tables matter, and there are never many of them.
MAX_PACKED = 400


def pack_tables(sizes: Sequence[tuple[str, int]], streams: int) -> list[list[str]]:
    """Assign tables to at most ``streams`` streams, the largest first, each to the emptiest.

    The first stream is the one for *the rest*: what no other stream names, known now or not, so that nothing can be
    forgotten. Its list is always empty, and its load counted.

    Args:
        sizes: names and bytes.
        streams: at most so many, at least 1.

    Returns:
        The names of each stream; streams that would be empty are left out, but for the first.
    """
    large = sorted((pair for pair in sizes if pair[1] >= SMALL_TABLE), key=lambda pair: (-pair[1], pair[0]))[
        :MAX_PACKED
    ]
    packed = {name for name, _ in large}
    loads = [sum(size for name, size in sizes if name not in packed)] + [0] * (streams - 1)
    bins: list[list[str]] = [[] for _ in range(streams)]
    for name, size in large:
        emptiest = min(range(streams), key=lambda index: loads[index])
        bins[emptiest].append(name)
        loads[emptiest] += size
    return [[], *(names for names in bins[1:] if names)]
