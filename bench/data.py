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


def log(path: Path, size: int) -> Path:
    """Write lines of a web server's log."""
    return write(path, log_lines(size))


# Rows of a log are made once, and repeated: no frame sees so far back.
_LOG = 64_000_000
_PATHS = (
    "/",
    "/login",
    "/api/v1/orders",
    "/api/v1/customers",
    "/static/app.js",
    "/static/style.css",
    "/search",
    "/cart",
)
_AGENTS = (
    "Mozilla/5.0 (Windows NT 10.0; Win64; x64) AppleWebKit/537.36 (KHTML, like Gecko) Chrome/120.0.0.0 Safari/537.36",
    "Mozilla/5.0 (iPhone; CPU iPhone OS 17_1 like Mac OS X) AppleWebKit/605.1.15 (KHTML, like Gecko) Mobile/15E148",
    "Mozilla/5.0 (X11; Linux x86_64; rv:121.0) Gecko/20100101 Firefox/121.0",
    "curl/7.88.1",
)


def log_lines(size: int, seed: int = 1) -> Iterator[bytes]:
    """Yield ``size`` bytes of a web server's log, in the combined format of Apache and nginx.

    Clients come back (their addresses are spread as a few heavy users and many light ones), paths have ids and
    queries, sizes and times of answers are what they are.
    """
    rng = random.Random(seed)
    clients = [
        f"{rng.randrange(1, 224)}.{rng.randrange(256)}.{rng.randrange(256)}.{rng.randrange(256)}" for _ in range(20_000)
    ]
    agents = [rng.choice(_AGENTS) for _ in clients]
    lines: list[str] = []
    length = 0
    seconds = 0.0
    while length < min(size, _LOG):
        seconds += rng.expovariate(90.0)
        who = min(int(rng.paretovariate(0.6)) - 1, len(clients) - 1)
        path = rng.choice(_PATHS)
        if path.startswith("/api"):
            path += f"/{rng.randrange(1, 4_000_000)}"
        elif path == "/search":
            path += f"?q={rng.randrange(36**4):x}&page={rng.randrange(1, 9)}"
        day, rest = divmod(int(seconds), 86_400)
        stamp = f"{1 + day:02d}/Mar/2026:{rest // 3600:02d}:{rest // 60 % 60:02d}:{rest % 60:02d} +0000"
        status = rng.choices((200, 304, 404, 302, 500), (88, 6, 3, 2, 1))[0]
        line = (
            f'{clients[who]} - - [{stamp}] "{"POST" if path == "/login" else "GET"} {path} HTTP/1.1" {status}'
            f' {int(rng.lognormvariate(8, 1.5))} "https://shop.example/" "{agents[who]}" {rng.expovariate(20):.3f}\n'
        )
        lines.append(line)
        length += len(line)
    block = "".join(lines).encode()
    while size > 0:
        yield block[:size]
        size -= len(block)


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
