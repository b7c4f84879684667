"""How large part *n* of a multipart upload should be, for a stream whose length nobody knows yet.

S3 takes at most 10,000 parts of 5 MiB to 5 GiB. Parts start small, so that small backups are still sent in
parallel, and double after every 1,000, so that one upload reaches 8 TB of stored bytes. Parts hold
whole frames, so a part is at least its target and at most one frame larger.
"""

from __future__ import annotations

FIRST_SIZE = 8 << 20
PARTS_PER_STEP = 1000
MAX_PARTS = 10_000
MIN_SIZE = 5 << 20
MAX_SIZE = 5 << 30


def target_size(number: int) -> int:
    """Return the bytes at which part ``number`` (from 1) is full."""
    return FIRST_SIZE << ((number - 1) // PARTS_PER_STEP)


def reach() -> int:
    """Return the stored bytes that one upload can always hold: the sum of all targets."""
    return sum(target_size(number) for number in range(1, MAX_PARTS + 1))


def largest_target(stored_size: int) -> int:
    """Return the largest target among the parts that hold that many bytes; for the memory formula."""
    total = 0
    for step in range(MAX_PARTS // PARTS_PER_STEP):
        total += PARTS_PER_STEP * (FIRST_SIZE << step)
        if stored_size <= total:
            return FIRST_SIZE << step
    return FIRST_SIZE << (MAX_PARTS // PARTS_PER_STEP - 1)
