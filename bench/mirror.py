"""The mirror's part of ``make bench``: a first sync, a night without changes, and a groomed set, against the peers.

What bounds all ways: a copy of the files on the same disk, and a walk that looks at each file and a listing alone.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
import random
import shutil
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from backhaul.formats.quantities import format_size
from backhaul.model.mirror import Entry, FileIdentity, LocalFile, Totals
from backhaul.model.objects import StoredObject
from backhaul.model.profile import BY_KEY
from backhaul.planning.mirror_diff import Rules, diff, in_order
from backhaul.testing.s3_proxy import S3Proxy
from backhaul.testing.servers import S3Server
from bench.results import Comparison, Line, Results, Run, Sheet
from bench.runs import FailedError, alternate, attempt, machine, measured, shell, today, versions
from bench.stores import BACKHAUL, BUCKET, aws, rclone, real_server, s5cmd

# All of these are for a first sync of 4 GB of chunks; with less, there is less of everything.
SIZE = 4_000_000_000
SMALL_FILES, CHUNKS, MANY_FILES = 5_000, 10, 100_000
GROOMED, GROOMED_SHARE = 12, 40
_COLUMNS = ["wall", "from - to", "CPU", "peak memory", "time against ours"]
_COPY_ALONE = "a copy on the same disk, nothing else"
_WALK_ALONE = "find alone: each file's size and time"
_LISTING_ALONE = "the listing alone, s5cmd"


class Counting(S3Proxy):
    """Counts the bytes of bodies that are sent."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.sent = 0

    def request_body(self, request: Any, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        for piece in pieces:
            self.sent += len(piece)
            yield piece


def peers(directory: Path, endpoint: str, prefix: str) -> dict[str, str]:
    """Return the command of each way; none deletes anything."""
    return {
        "backhaul": f"{BACKHAUL} sync -q {directory} s3://{BUCKET}/{prefix}backhaul",
        "s5cmd": f"{s5cmd(endpoint)} sync {directory}/ s3://{BUCKET}/{prefix}s5cmd/ > /dev/null",
        "rclone": f"{rclone(endpoint)} copy {directory} :s3:{BUCKET}/{prefix}rclone",
        "aws": f"{aws(endpoint)} s3 sync --quiet {directory} s3://{BUCKET}/{prefix}aws",
    }


def write_chunks(directory: Path, count: int, size: int, rng: random.Random) -> None:
    """Write opaque chunks."""
    directory.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        with open(directory / f"chunk-{number:04d}", "wb") as file:
            file.writelines(rng.randbytes(min(1 << 20, size - offset)) for offset in range(0, size, 1 << 20))


def write_small(directory: Path, count: int, largest: int, rng: random.Random) -> None:
    """Write many small files, a hundred directories of them."""
    for number in range(count):
        place = directory / f"d{number % 100:02d}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"file-{number:06d}").write_bytes(rng.randbytes(rng.randrange(100, largest)))


def groom(directory: Path, rng: random.Random) -> int:
    """Rewrite inside chunks, shrink, rename and drop some; return the bytes that are new."""
    chunks = sorted(directory.iterdir())
    new = 0
    for path in chunks[:6]:
        content = bytearray(path.read_bytes())
        for _ in range(3):
            size = rng.randrange(len(content) // 100, len(content) // 4)
            at = rng.randrange(0, len(content) - size)
            content[at : at + size] = rng.randbytes(size)
            new += size
        path.write_bytes(content)
    content = bytearray(chunks[6].read_bytes())
    del content[3 * len(content) // 10 : len(content) // 2]
    chunks[6].write_bytes(content)
    for number, path in enumerate(chunks[7:9]):
        path.rename(directory / f"renamed-{number}")
    chunks[9].unlink()
    return new


def mirror(directory: Path, size: int, rounds: int) -> Results:
    """Measure the three nights, with ``size`` bytes of chunks in the first."""
    rng = random.Random(1)
    with real_server(directory / "server") as server:
        environment = {**os.environ, **server.environment, "BACKHAUL_STATE": str(directory / "state")}
        comparisons = [
            _first(directory / "first", server, size, rounds, rng, environment),
            _unchanged(directory / "many", server, size, rounds, rng, environment),
            _groomed(directory / "groomed", server, size, rng, environment),
        ]
    return Results(
        area="mirror",
        date=today(),
        machine=machine(),
        conditions=f"medians of {rounds} alternating rounds (one for rclone and aws where they take long)",
        comparisons=comparisons,
        sheets=[memory_of_the_comparison(max(10_000, _less(1_000_000, size)))],
        versions=versions("s5cmd", "rclone", "aws", "weed"),
    )


def _less(count: int, size: int) -> int:
    return max(1, count * min(size, SIZE) // SIZE)


def _first(
    first: Path, server: S3Server, size: int, rounds: int, rng: random.Random, environment: dict[str, str]
) -> Comparison:
    print("first sync", file=sys.stderr)
    small = _less(SMALL_FILES, size)
    write_small(first, small, 40_000, rng)
    write_chunks(first / "chunks", CHUNKS, size // CHUNKS, rng)
    copy = first.with_name("copy")
    names = [*peers(first, server.endpoint, ""), _COPY_ALONE]
    lines = {name: Line(name, limit=name == _COPY_ALONE) for name in names}
    client = server.client()
    for number in range(rounds):
        commands = peers(first, server.endpoint, f"first-{number}-")
        commands[_COPY_ALONE] = f"cp -r {first} {copy}"
        for name, measure in shell(commands, environment).items():
            if number and name == "aws":
                continue
            attempt(lines[name], measure, f"round {number + 1}")
            # All begin with a disk that has nothing left to write, and as much room.
            shutil.rmtree(copy, ignore_errors=True)
            os.sync()
            pages = client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"first-{number}-{name}")
            for page in pages:
                for entry in page.get("Contents", []):
                    client.delete_object(Bucket=BUCKET, Key=entry["Key"])
    client.close()
    shutil.rmtree(first)
    title = f"First sync of {small:,} small files and {format_size(size)} of chunks"
    return Comparison("first", title, _COLUMNS, list(lines.values()), shows="wall")


def _unchanged(
    many: Path, server: S3Server, size: int, rounds: int, rng: random.Random, environment: dict[str, str]
) -> Comparison:
    print("no change", file=sys.stderr)
    count = _less(MANY_FILES, size)
    write_small(many, count, 300, rng)
    ours = peers(many, server.endpoint, "many-")["backhaul"]
    measured(ours, environment)
    at = f"{BUCKET}/many-backhaul"
    # All compare with what Backhaul has uploaded: it has the times in the objects' metadata, as rclone wants them.
    commands = {
        "backhaul": ours,
        "s5cmd": f"{s5cmd(server.endpoint)} sync {many}/ s3://{at}/",
        "rclone": f"{rclone(server.endpoint)} copy --fast-list {many} :s3:{at}",
        "aws": f"{aws(server.endpoint)} s3 sync {many} s3://{at}",
        _WALK_ALONE: f"find {many} -printf '%s %T@ %p\\n' > /dev/null",
        _LISTING_ALONE: f"{s5cmd(server.endpoint)} ls 's3://{at}/*' > /dev/null",
    }
    limits = [_WALK_ALONE, _LISTING_ALONE]
    lines = alternate(shell(commands, environment), rounds + 2, once={"rclone", "aws"}, limits=limits)
    shutil.rmtree(many)
    return Comparison("unchanged", f"A night without changes: {count:,} files", _COLUMNS, lines, shows="wall")


def _groomed(groomed: Path, server: S3Server, size: int, rng: random.Random, environment: dict[str, str]) -> Comparison:
    print("groomed set", file=sys.stderr)
    chunk = size // GROOMED_SHARE
    write_chunks(groomed, GROOMED, chunk, rng)
    lines = []
    with Counting(server.endpoint) as proxy:
        environment = environment | {"AWS_ENDPOINT_URL": proxy.endpoint}
        commands = peers(groomed, proxy.endpoint, "groomed-")
        for name, command in commands.items():
            try:
                measured(command, environment)
            except FailedError as error:
                print(f"  {name} could not copy the set: {error}", file=sys.stderr)
        time.sleep(1.5)  # peers compare whole seconds
        new = groom(groomed, rng)

        def counted(command: str) -> Run:
            before = proxy.sent
            run = measured(command, environment)
            return msgspec.structs.replace(run, sent=proxy.sent - before)

        lines = alternate({name: functools.partial(counted, command) for name, command in commands.items()}, 1)
    for line in lines:
        line.size = new
    lines.append(Line("the new bytes alone", [Run(0, 0, sent=new)], limit=True, size=new))
    title = f"A groomed set of {format_size(GROOMED * chunk)}, {format_size(new)} of it new"
    columns = ["wall", "CPU", "peak memory", "bytes sent", "time against ours"]
    return Comparison("groomed", title, columns, lines, shows="sent")


def memory_of_the_comparison(most: int) -> Sheet:
    """Compare synthetic listings of growing length, and say what memory that takes."""
    rows = []
    for count in sorted({most // 100, most // 10, most}):

        def local(count: int = count) -> Iterator[tuple[bytes, LocalFile]]:
            for number in range(count):
                key = f"d/{number:09d}"
                yield key.encode(), LocalFile(key=key, kind="file", identity=FileIdentity(1, number, 1, 1, 1))

        def known(count: int = count) -> Iterator[tuple[bytes, Entry]]:
            for number in range(count):
                key = f"d/{number:09d}"
                yield key.encode(), Entry(key=key, size=1, modified=1, etag="e", mode=0)

        now = dt.datetime.now(dt.UTC)
        stored = (StoredObject(key=f"d/{number:09d}", size=1, modified=now, etag="e") for number in range(count))
        rules = Rules(now=now, order=BY_KEY)
        tracemalloc.start()
        start = time.perf_counter()
        changes = sum(1 for _ in diff(local(), known(), in_order(stored, BY_KEY, ""), rules, Totals()))
        took = time.perf_counter() - start
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert changes == 0
        rows.append([f"{count:,}", format_size(peak), f"{took / count * 1e6:.1f} µs (traced)"])
    return Sheet("Memory of the comparison", ["names", "peak", "time a name"], rows)
