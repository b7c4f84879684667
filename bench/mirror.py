"""The mirror's part of ``make bench``: a first sync, a night without changes, and a groomed set, against the peers."""

from __future__ import annotations

import datetime as dt
import os
import random
import resource
import shutil
import sys
import time
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from backhaul.formats.quantities import format_size
from backhaul.model.mirror import Entry, FileIdentity, LocalFile, Totals
from backhaul.model.objects import StoredObject
from backhaul.model.profile import BY_KEY
from backhaul.planning.mirror_diff import Rules, diff, in_order
from backhaul.testing.s3_proxy import S3Proxy
from backhaul.testing.servers import seaweedfs, tool
from bench.bench import BUCKET, Run, alternate, measured, middle, rclone

SMALL_FILES, CHUNKS, CHUNK_SIZE = 5_000, 10, 400_000_000
MANY_FILES = 100_000
GROOMED, GROOMED_SIZE = 12, 100_000_000


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
    s5 = f"{tool('s5cmd')} --endpoint-url {endpoint}"
    return {
        "backhaul": f"{sys.executable} -m backhaul sync -q {directory} s3://{BUCKET}/{prefix}backhaul",
        "s5cmd": f"{s5} sync {directory}/ s3://{BUCKET}/{prefix}s5cmd/ > /dev/null",
        "rclone": f"{rclone(endpoint)} copy {directory} :s3:{BUCKET}/{prefix}rclone",
        "aws": f"{tool('aws')} --endpoint-url {endpoint} s3 sync --quiet {directory} s3://{BUCKET}/{prefix}aws",
    }


def rows(title: str, results: dict[str, list[Run]], sent: dict[str, str] | None = None) -> list[str]:
    """Return a table; the last column is how many times as long each way took as ours."""
    ours = middle(results["backhaul"])
    head = "| way | wall | CPU | peak memory | " + ("bytes sent | " if sent else "") + "time against ours |"
    lines = [f"### {title}", "", head, "| --- " + "| ---: " * (5 if sent else 4) + "|"]
    for name, runs in results.items():
        run = middle(runs)
        extra = f"| {sent[name]} " if sent else ""
        # The kernel counts a child's peak from what its parent had: below that there is nothing to be told.
        known = run.memory > 1.02 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        memory = format_size(run.memory) if known else "-"
        lines.append(f"| {name} | {run.wall:.2f} s | {run.cpu:.2f} s | {memory} {extra}| {run.wall / ours.wall:.2f} |")
    return [*lines, ""]


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
            size = rng.randrange(1_000_000, 24_000_000)
            at = rng.randrange(0, len(content) - size)
            content[at : at + size] = rng.randbytes(size)
            new += size
        path.write_bytes(content)
    content = bytearray(chunks[6].read_bytes())
    del content[30_000_000:50_000_000]
    chunks[6].write_bytes(content)
    for number, path in enumerate(chunks[7:9]):
        path.rename(directory / f"renamed-{number}")
    chunks[9].unlink()
    return new


def mirror(directory: Path, text: Path, rounds: int) -> list[str]:
    """Measure the three nights; ``text`` is not used."""
    rng = random.Random(1)
    lines: list[str] = []
    state = {"BACKHAUL_STATE": str(directory / "state")}
    rounds = min(rounds, 3)
    with seaweedfs(directory / "server") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        environment = {**os.environ, **server.environment, **state}

        print("first sync", file=sys.stderr)
        first = directory / "first"
        write_small(first, SMALL_FILES, 40_000, rng)
        write_chunks(first / "chunks", CHUNKS, CHUNK_SIZE, rng)
        results: dict[str, list[Run]] = {}
        for number in range(rounds):
            for name, command in peers(first, server.endpoint, f"first-{number}-").items():
                if number and name == "aws":
                    continue
                results.setdefault(name, []).append(measured(command, environment))
                print(f"  round {number + 1}: {name}: {results[name][-1].wall:.2f} s", file=sys.stderr)
                os.sync()
                for page in client.get_paginator("list_objects_v2").paginate(
                    Bucket=BUCKET, Prefix=f"first-{number}-{name}"
                ):
                    for entry in page.get("Contents", []):
                        client.delete_object(Bucket=BUCKET, Key=entry["Key"])
        shutil.rmtree(first)
        lines += rows(
            f"First sync of {SMALL_FILES:,} small files and {format_size(CHUNKS * CHUNK_SIZE)} of chunks", results
        )

        print("no change", file=sys.stderr)
        many = directory / "many"
        write_small(many, MANY_FILES, 300, rng)
        ours = peers(many, server.endpoint, "many-")
        measured(ours["backhaul"], environment)
        at = f"{BUCKET}/many-backhaul"
        # All compare with what Backhaul has uploaded: it has the times in the objects' metadata, as rclone wants them.
        commands = {
            "backhaul": ours["backhaul"],
            "s5cmd": f"{tool('s5cmd')} --endpoint-url {server.endpoint} sync {many}/ s3://{at}/",
            "rclone": f"{rclone(server.endpoint)} copy --fast-list {many} :s3:{at}",
            "aws": f"{tool('aws')} --endpoint-url {server.endpoint} s3 sync {many} s3://{at}",
        }
        results = alternate(commands, environment, rounds + 2, {"rclone", "aws"})
        lines += rows(f"A night without changes: {MANY_FILES:,} files", results)
        shutil.rmtree(many)

        print("groomed set", file=sys.stderr)
        groomed = directory / "groomed"
        write_chunks(groomed, GROOMED, GROOMED_SIZE, rng)
        results, sent = {}, {}
        with Counting(server.endpoint) as proxy:
            environment |= {"AWS_ENDPOINT_URL": proxy.endpoint}
            commands = peers(groomed, proxy.endpoint, "groomed-")
            for command in commands.values():
                measured(command, environment)
            time.sleep(1.5)  # peers compare whole seconds
            new = groom(groomed, rng)
            for name, command in commands.items():
                before = proxy.sent
                results[name] = [measured(command, environment)]
                sent[name] = f"{format_size(proxy.sent - before)} ({(proxy.sent - before) / new:.2f}x)"
        title = f"A groomed set of {format_size(GROOMED * GROOMED_SIZE)}, {format_size(new)} of it new"
        lines += rows(title, results, sent)
    return lines + memory_rows()


def memory_rows() -> list[str]:
    """Compare synthetic listings of growing length, and say what memory that takes."""
    lines = ["### Memory of the comparison", "", "| names | peak | time a name |", "| ---: | ---: | ---: |"]
    for count in (10_000, 100_000, 1_000_000):

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
        lines.append(f"| {count:,} | {format_size(peak)} | {took / count * 1e6:.1f} µs (traced) |")
    return [*lines, ""]
