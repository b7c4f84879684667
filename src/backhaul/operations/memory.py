"""The memory formula: what a push or a pull may use at most, term by term, from the numbers that set it.

Python, botocore and their like take ``BASE``; everything else is buffers with a fixed number and size.
``--json`` prints the terms and their sum; tests hold real runs to it.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource

from backhaul.formats.age import CHUNK_SIZE, SEALED_CHUNK_SIZE, Payload
from backhaul.formats.chunk import LARGEST_BODY
from backhaul.formats.seekable import ENTRY_SIZE, table_size
from backhaul.model.memory import MemoryBound
from backhaul.stores import multipart
from backhaul.stores.base import PartRules
from backhaul.transforms import compress, encrypt

# Interpreter, libraries, thread stacks and allocator slack, as measured on an idle and on a busy process.
BASE = 110 << 20
# Pieces that wait for one destination; a burst of the producer passes without stalling the others.
QUEUE_BYTES = 16 << 20
# What a pull fetches by one request, and what it decodes at once: two frames, also of what did not compress.
RANGE_STORED = 9 << 20
PIECE_RAW = 9 << 20


_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MMAP_THRESHOLD = 2 << 20
_TRIM_THRESHOLD = 8 << 20


def settle_allocator() -> None:
    """Have glibc take every piece of two megabytes or more from the kernel, and give it back when it is freed.

    By itself glibc moves that threshold up as it goes, keeps large pieces in per-thread heaps, and, since a
    frame is allocated at its largest and then shrunk, fragments them: 10 GB of dump took 550 MB instead of
    the formula's 260. Smaller pieces come and go all the time: a heap keeps that much of its end for the next one,
    since memory that is given back and taken again costs page faults (without, sealing took twice the time). These
    are settings of the whole process; other C libraries do not know them.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        libc.mallopt(_M_TRIM_THRESHOLD, _TRIM_THRESHOLD)


def default_workers() -> int:
    """Return the number of cores that this process may run on."""
    return max(1, len(os.sched_getaffinity(0)))


def push_window(workers: int) -> int:
    """Return the blocks in flight: one a worker, and as many read ahead or waiting for their turn."""
    return 2 * workers + 1


def most_stored(raw_size: int, header_size: int = 0) -> int:
    """Return the most bytes that a stream of that raw size can be when it is stored.

    ``header_size`` is that of an encrypted stream, whose chunks have tags.
    """
    frames = raw_size // compress.FRAME_SIZE + 1
    content = frames * compress.largest_frame(compress.FRAME_SIZE) + table_size(frames)
    return Payload(header_size, content).end if header_size else content


def push_bound(
    workers: int,
    setting: str,
    destinations: list[PartRules],
    stored_size: int = 0,
    frames: int = 0,
    *,
    encrypted: bool = False,
    lanes: int = 1,
) -> MemoryBound:
    """Return the bound of a push; ``workers``, ``stored_size`` and ``frames`` are those of each of ``lanes`` streams.

    ``stored_size`` and ``frames`` are what was stored so far: parts, and with them their buffers, grow with
    the stream (``formats.part_sizes``), and the seek table has 8 bytes a frame, twice while it is encoded,
    and some room that its array keeps to grow into.
    """
    window = push_window(workers)
    frame = compress.largest_frame(compress.FRAME_SIZE)
    each = {
        "read buffers": (window + 1) * compress.FRAME_SIZE,
        "frames in flight": (window + 1) * frame,
        "compressor tables": workers * (compress.context_memory(setting) + compress.FRAME_SIZE),
        "queues": len(destinations) * (QUEUE_BYTES + frame),
        "part buffers": sum(multipart.memory_bound(rules, frame, stored_size) for rules in destinations),
        "seek table": 4 * frames * ENTRY_SIZE,
        # Each batch as it comes, sealed chunk by chunk, and sealed as one; and the frames that its ends lie in.
        **({"sealing": 3 * (window + 2) * encrypt.BATCH_SIZE + 2 * frame} if encrypted else {}),
    }
    return _bound({"base": BASE, **{term: lanes * size for term, size in each.items()}})


def pull_bound(
    workers: int, largest_frame: int, largest_stored: int, frames: int, *, encrypted: bool = False, lanes: int = 1
) -> MemoryBound:
    """Return the bound of a pull, or of ``lanes`` at once; the sizes are the largest frame's, raw and stored.

    What is encrypted is fetched in whole chunks, and opened into memory of its own.
    """
    fetched = max(RANGE_STORED, largest_stored)
    if encrypted:
        fetched = (fetched // CHUNK_SIZE + 2) * SEALED_CHUNK_SIZE
    decoders = pull_decoders(workers)
    each = {
        "fetched ranges": pull_window(workers) * fetched,
        # (What has no frames is decoded as it was fetched.)
        "decoded pieces": pull_window(decoders) * max(PIECE_RAW, RANGE_STORED, largest_frame),
        **({"opened pieces": decoders * fetched} if encrypted else {}),
        "damaged pieces": decoders * fetched,  # fetched again, beside what came first
        "seek table": frames * (ENTRY_SIZE + 2 * 40),
    }
    return _bound({"base": BASE, **{term: lanes * size for term, size in each.items()}})


# Opened chunks that wait for the consumer as they are, so that they need not be opened again.
OPENED_AHEAD = 32 << 20
# Byte arrays that wait to be used again.
RECYCLED = 16 << 20
_SINK_QUEUE = 8 << 20


def fan_out_bound(log: int, streams: int) -> MemoryBound:
    """Return the bound of a sender's or a receiver's own part: its log, and what its streams have in hand.

    Args:
        log: most bytes of chunks in memory.
        streams: how many there are at once.
    """
    chunk = LARGEST_BODY
    frames = default_workers() + 3
    return _bound(
        {
            "base": BASE,
            "chunks": log + 2 * chunk,
            "opened chunks": OPENED_AHEAD,
            "buffers": RECYCLED,
            "streams": streams * (_SINK_QUEUE + frames * 2 * compress.FRAME_SIZE),
        }
    )


def sender_terms(log: int) -> dict[str, int]:
    """Return what a fan-out adds to the bound of a push; ``log`` is most bytes of chunks in memory."""
    return {"fan-out chunks": log + 2 * LARGEST_BODY, "fan-out buffers": RECYCLED}


def pull_window(workers: int) -> int:
    """Return the ranges, or pieces, in flight: one a worker, one on its way out, one ready."""
    return workers + 2


def pull_decoders(workers: int) -> int:
    """Return how many threads decode where ``workers`` fetch: they seldom wait, so one a core is enough."""
    return min(workers, default_workers())


def peak_memory() -> int:
    """Return the most resident memory that this process has had so far, in bytes.

    The kernel's high-water mark of this program; ``getrusage`` would begin with that of whoever started it.
    """
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _bound(terms: dict[str, int]) -> MemoryBound:
    return MemoryBound(terms=terms, total=sum(terms.values()))
