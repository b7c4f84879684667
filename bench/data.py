"""The data of the benchmarks, as files: dump text, a pgbench database's dump, a mixture, and what does not compress."""

from __future__ import annotations

import base64
import os
import random
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import PostgreSQL

# What a row of pgbench_accounts takes in COPY text; there are 100,000 for each unit of scale.
_PGBENCH_ROW = 97
_PGBENCH_ROWS = 100_000


def write(path: Path, pieces: Iterable[bytes]) -> Path:
    """Write a file, so that it lies in the page cache and nothing of it is still to be written."""
    with open(path, "wb") as file:
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())
    return path


def text(path: Path, size: int) -> Path:
    """Write dump text: COPY blocks of customers, orders and events."""
    return write(path, dump_text(size))


def incompressible(path: Path, size: int) -> Path:
    """Write random bytes."""
    return write(path, random_bytes(size))


def mixed(path: Path, size: int) -> Path:
    """Write dump text between attachments; see ``mixture``."""
    return write(path, mixture(size))


def mixture(size: int, seed: int = 1) -> Iterator[bytes]:
    """Yield dump text in stretches of 2 to 12 MB between attachments of 1 to 8 MB, ``size`` bytes in all.

    An attachment is a JPEG or the like as dumps hold them: base64 text (of which a quarter can be saved), or the
    bytes themselves, as in a custom format or an archive (of which nothing can), by turns.
    """
    rng = random.Random(seed)
    rows = dump_text(size, seed)
    encoded = True
    while size > 0:
        stretch = rng.randrange(2_000_000, 12_000_000)
        while stretch > 0 and size > 0:
            piece = next(rows)[:size]
            yield piece
            stretch -= len(piece)
            size -= len(piece)
        attachment = rng.randbytes(rng.randrange(1_000_000, 8_000_000))
        if encoded:
            attachment = base64.b64encode(attachment)
        encoded = not encoded
        yield attachment[:size]
        size -= len(attachment)


def pgbench(path: Path, size: int) -> Path:
    """Write the plain dump of a real pgbench database, about ``size`` bytes of it, made by a real server."""
    scale = max(1, round(size / _PGBENCH_ROWS / _PGBENCH_ROW))
    server = PostgreSQL(Path(tempfile.mkdtemp(prefix="backhaul-bench-pg-")))
    try:
        server.start()
        server.sql("create database bench")
        environment = {**os.environ, **server.environment}
        # Primary keys are one line each in the dump, and take half of the time to make.
        making = [PostgreSQL.program("pgbench"), "-i", "-q", "-I", "dtG", "-s", str(scale), "bench"]
        subprocess.run(making, env=environment, check=True, capture_output=True)
        with open(path, "wb") as file:
            subprocess.run([PostgreSQL.program("pg_dump"), "bench"], env=environment, stdout=file, check=True)
            os.fsync(file.fileno())
    finally:
        server.stop()
    return path
