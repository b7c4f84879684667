"""What each stage of a push costs, one thread each: ``python -m bench.stages --write`` puts it into docs/benchmarks.

Costs are CPU-seconds per GB that the stage handles (raw bytes before compression, stored ones after it). What is left
of a whole push's CPU time when its stages are taken off is Python's own: the queues, the callbacks, the waking of
threads. All of that is counted as held under the interpreter's lock, which no second core shortens: more than it can
be.

The rates of whole pushes, on one core and on all of this host, are what ``bench.scale_model`` is held to.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec

from backhaul.formats.age import CHUNK_SIZE
from backhaul.formats.listing import read_page
from backhaul.formats.location import parse_location
from backhaul.operations.mirror.sync import sync
from backhaul.stores.base import Store
from backhaul.stores.body import PartBody
from backhaul.stores.open import open_store
from backhaul.testing.crashes import World
from backhaul.testing.data import dump_text
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY
from backhaul.transforms.compress import FRAME_SIZE, FrameCompressor
from backhaul.transforms.digest import StreamDigest, crc64nvme
from backhaul.transforms.encrypt import Batch, ChunkCipher
from bench.runs import machine, today
from bench.scale_model import PushRate, StageCosts
from bench.stores import null_server

PAGE = Path(__file__).resolve().parent.parent / "docs" / "benchmarks" / "stages.json"
SIZE = 256 << 20
PUSHED = 2 << 30
ROUNDS = 5
PART = 8 << 20
MIRRORED = (2_000, 22_000)
NAMES_A_DIRECTORY = 500
LISTED = 1000
LEVELS = ("auto", "1", "3", "9")


def cost(work: Callable[[], int], rounds: int = ROUNDS) -> float:
    """Return the median CPU-seconds of this thread per GB that ``work`` says it has handled."""
    found = []
    for _ in range(rounds):
        start = time.thread_time()
        handled = work()
        found.append((time.thread_time() - start) / handled * 1e9)
    return statistics.median(found)


def measure(directory: Path) -> StageCosts:
    """Measure every stage, and whole pushes."""
    source = directory / "source"
    with open(source, "wb") as file:
        file.writelines(dump_text(SIZE))
    text = source.read_bytes()
    blocks = [memoryview(text)[at : at + FRAME_SIZE] for at in range(0, len(text), FRAME_SIZE)]
    buffer = bytearray(FRAME_SIZE)

    def read() -> int:
        total = 0
        with open(source, "rb", buffering=0) as file:
            while count := file.readinto(buffer):
                total += count
        return total

    def hashed() -> int:
        digest = StreamDigest(crc=False)
        for block in blocks:
            digest.feed(block)
        return digest.size

    compressed: dict[str, float] = {}
    ratio = 1.0
    frames: list[bytes] = []
    for level in LEVELS:
        compressor = FrameCompressor(level)
        some = blocks if level == "auto" else blocks[:: 4 if level != "9" else 16]

        def squeeze(compressor: FrameCompressor = compressor, some: Iterable[memoryview] = tuple(some)) -> int:
            return sum(len(block) for block in some if compressor.compress(block))

        compressed[level] = cost(squeeze, 3)
        if level == "auto":
            frames = [compressor.compress(block) for block in blocks]
            ratio = len(text) / sum(map(len, frames))
    stored = b"".join(frames)
    part = bytearray(PART)
    body = bytes(PART)

    def digested() -> int:
        digest = StreamDigest()
        for frame in frames:
            digest.feed(frame)
        return digest.size

    def crc() -> int:
        crc64nvme(stored)
        return len(stored)

    def copied() -> int:
        for at in range(0, len(stored) - PART, PART):
            part[:] = memoryview(stored)[at : at + PART]
        return (len(stored) // PART) * PART

    def sealed() -> int:
        cipher = ChunkCipher(bytes(32))
        view = memoryview(stored)
        chunks: list[bytes | memoryview] = [view[at : at + CHUNK_SIZE] for at in range(0, len(stored), CHUNK_SIZE)]
        for at in range(0, len(chunks), 16):
            cipher.seal(Batch(at, chunks[at : at + 16], last=False))
        return len(stored)

    def written() -> int:
        with open(directory / "written", "wb", buffering=0) as file:
            file.writelines(frames)
        return len(stored)

    with sink() as store:
        upload = store.begin("k")
        checksum = crc64nvme(body)

        def sent() -> int:
            for number in range(1, 13):
                store.put_part(upload, number, (number - 1) * PART, PartBody(body), checksum)
            return 12 * PART

        def requested() -> int:
            for number in range(1000):
                store.put(f"{number}", PartBody(b""), 0)
            return 1000

        send, request = cost(sent), cost(requested)
    costs = StageCosts(
        date=today(),
        machine=machine(),
        read=cost(read),
        hash=cost(hashed),
        compress=compressed,
        ratio=ratio,
        digest=cost(digested),
        crc=cost(crc),
        copy=cost(copied),
        seal=cost(sealed),
        write=cost(written),
        send=send,
        python=0.0,
        listing=0.0,
        request=0.0,
        mirror_first=0.0,
        mirror_again=0.0,
        frame=FRAME_SIZE,
        pushes=(),
    )
    runs = [[mirrored(directory, count) for count in MIRRORED] for _ in range(3)]
    first, again = (
        statistics.median((many[kind] - few[kind]) / (MIRRORED[1] - MIRRORED[0]) * 1e6 for few, many in runs)
        for kind in (0, 1)
    )
    costs = msgspec.structs.replace(
        costs, mirror_first=first, mirror_again=again, request=request / 1e3, listing=listed()
    )
    longer = directory / "longer"
    with open(longer, "wb") as file:
        file.writelines(text for _ in range(PUSHED // len(text)))
    cores = sorted(os.sched_getaffinity(0))
    pushes = tuple(pushed(directory, (source, longer), cores[:count]) for count in range(1, len(cores) + 1))
    known = costs.read + costs.hash + compressed["auto"] + (costs.digest + costs.write) / ratio
    python = max(0.0, pushes[0].cpu - known)
    return msgspec.structs.replace(costs, python=python, pushes=pushes)


@contextlib.contextmanager
def sink() -> Iterator[Store]:
    """Give the store that a push has, in front of the sink that costs nothing."""
    with null_server() as endpoint:
        store = open_store(parse_location(f"s3://b/k?endpoint={endpoint}"))
        with contextlib.closing(store):
            yield store


def mirrored(directory: Path, names: int) -> tuple[float, float]:
    """Return the CPU-seconds of a mirror's first run over so many empty files, and of one without changes."""
    place = directory / "mirrored"
    for start in range(0, names, NAMES_A_DIRECTORY):
        inside = place / f"{start:09d}"
        inside.mkdir(parents=True)
        for number in range(start, start + NAMES_A_DIRECTORY):
            (inside / f"{number:09d}").touch()
    world = World(directory / "state")
    taken = []
    with world.process():
        for _ in range(2):
            began = time.process_time()
            sync(str(place), "s3://world/mirror", now=world.now)
            taken.append(time.process_time() - began)
    shutil.rmtree(place)
    shutil.rmtree(world.state)
    return taken[0], taken[1]


def listed() -> float:
    """Return the CPU-seconds that a million names take in listings, page by page, without the requests."""
    entries = "".join(
        f"<Contents><Key>set/{number:09d}</Key><LastModified>2026-11-21T02:00:00.000Z</LastModified>"
        f"<ETag>&quot;{number:032x}&quot;</ETag><Size>{number}</Size><StorageClass>STANDARD</StorageClass></Contents>"
        for number in range(LISTED)
    )
    page = f"<ListBucketResult><EncodingType>url</EncodingType>{entries}</ListBucketResult>".encode()

    def parsed() -> int:
        return sum(len(read_page(page, "set/").objects) for _ in range(20))

    return cost(parsed) / 1e3


def pushed(directory: Path, files: tuple[Path, Path], cores: list[int]) -> PushRate:
    """Return what each GB more costs a push of a file to a directory, on some cores only.

    A short file and a long one by turns: what both take alike, start and end, is not the pipeline's.
    """
    command = ["taskset", "-c", ",".join(map(str, cores)), sys.executable, "-m", "backhaul", "push", "-q"]
    more = (files[1].stat().st_size - files[0].stat().st_size) / 1e9
    differences = []
    for _ in range(ROUNDS):
        wall, cpu = [], []
        for file in files:
            series = directory / "series"
            start = time.monotonic()
            process = subprocess.Popen([*command, str(series), "--from", str(file)])
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                sys.exit("bench: the push failed")
            wall.append(time.monotonic() - start)
            cpu.append(usage.ru_utime + usage.ru_stime)
            shutil.rmtree(series)
        differences.append((wall[1] - wall[0], cpu[1] - cpu[0]))
    return PushRate(
        cores=len(cores),
        rate=more / statistics.median(wall for wall, _ in differences),
        cpu=statistics.median(cpu for _, cpu in differences) / more,
    )


def main() -> None:
    """Measure and print, or keep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.name} beside the other results")
    options = parser.parse_args()
    os.environ.update(AWS_ACCESS_KEY_ID=ACCESS_KEY, AWS_SECRET_ACCESS_KEY=SECRET_KEY)
    with tempfile.TemporaryDirectory(prefix="backhaul-bench-", dir="/dev/shm") as scratch:
        text = msgspec.json.format(msgspec.json.encode(measure(Path(scratch))), indent=2) + b"\n"
    if options.write:
        PAGE.write_bytes(text)
    else:
        print(text.decode())


if __name__ == "__main__":
    main()
