"""Push and pull of one stream, against the pipelines that a person would type: four kinds of data, three stores.

SeaweedFS on the same machine is a real store that takes its part of the cores; the sink costs next to nothing, and so
does the source in memory: what is left there is the client's own time. What bounds all ways runs in the same rounds.
"""

from __future__ import annotations

import functools
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul.formats.quantities import format_size
from backhaul.testing.servers import s3_client, tool
from backhaul.transforms import compress
from backhaul.transforms.digest import StreamDigest
from bench import data
from bench.results import Comparison, Line, Results, Sheet
from bench.runs import FailedError, alternate, machine, measured, shell, today, versions
from bench.stores import BACKHAUL, BUCKET, aws, curl, null_server, rclone, real_server, s3_environment, s5cmd

PUSH = ["rate", "wall", "from - to", "CPU", "peak memory", "ratio", "time against ours"]
PULL = ["rate", "wall", "from - to", "CPU", "peak memory", "time against ours"]
PIPE_ALONE = "a pipe alone, to nowhere"
COMPRESS_ALONE = "zstd -1 -T0 alone, to nowhere"
UPLOAD_ALONE = "the upload alone: a ready .zst"
DOWNLOAD_ALONE = "the download alone, not decoded"
DECODE_ALONE = "zstd -d alone, from a file"


class Way(msgspec.Struct, frozen=True):
    """One way to do it: a shell command that reads stdin (push) and one that writes stdout (pull)."""

    name: str
    key: str
    push: str
    pull: str
    slow: bool = False


class Kind(msgspec.Struct, frozen=True):
    """One kind of data: its name, how its file is made, and the part of the area's size that it has."""

    name: str
    title: str
    make: Callable[[Path, int], Path]
    share: int


KINDS = (
    Kind("text", "dump text", data.text, 1),
    Kind("pgbench", "a pgbench database's dump", data.pgbench, 1),
    Kind("mixed", "dump text with attachments", data.mixed, 1),
    Kind("random", "random bytes", data.incompressible, 2),
)


def ways(endpoint: str, prefix: str) -> list[Way]:
    """Return ours first, then the peers, each with its own object."""
    zstd, at = tool("zstd"), f"s3://{BUCKET}/{prefix}"
    return [
        Way("backhaul", "backhaul", f"{BACKHAUL} push -q {at}-backhaul", f"{BACKHAUL} pull -q {at}-backhaul"),
        Way(
            "zstd -1 -T0, s5cmd",
            "s5cmd",
            f"{zstd} -q -1 -T0 | {s5cmd(endpoint)} pipe {at}-s5cmd",
            f"{s5cmd(endpoint)} cat {at}-s5cmd | {zstd} -q -d",
        ),
        Way(
            "zstd -1 -T0, rclone",
            "rclone",
            f"{zstd} -q -1 -T0 | {rclone(endpoint)} rcat :s3:{BUCKET}/{prefix}-rclone",
            f"{rclone(endpoint)} cat :s3:{BUCKET}/{prefix}-rclone | {zstd} -q -d",
        ),
        Way(
            "zstd -1 -T0, aws s3 cp",
            "aws",
            f"{zstd} -q -1 -T0 | {aws(endpoint)} s3 cp - {at}-aws",
            f"{aws(endpoint)} s3 cp {at}-aws - | {zstd} -q -d",
        ),
        Way(
            "pbzip2, aws s3 cp",
            "pbzip2",
            f"pbzip2 -q -c | {aws(endpoint)} s3 cp - {at}-pbzip2",
            f"{aws(endpoint)} s3 cp {at}-pbzip2 - | pbzip2 -q -d -c",
            slow=True,
        ),
    ]


def count_stored(endpoint: str, prefix: str, known: list[Way], lines: list[Line]) -> None:
    """Write into each way's line what it has stored for one push."""
    client = s3_client(endpoint)
    for way in known:
        found = client.list_objects_v2(Bucket=BUCKET, Prefix=f"{prefix}-{way.key}").get("Contents", [])
        for line in lines:
            if line.name == way.name:
                line.stored = max((entry["Size"] for entry in found), default=None)
    client.close()


def sized(lines: list[Line], size: int) -> list[Line]:
    """Write the size of the payload into lines."""
    for line in lines:
        line.size = size
    return lines


def compressed(path: Path) -> Path:
    """Write what zstd makes of a file."""
    ready = path.with_suffix(".zst")
    measured(f"{tool('zstd')} -q -1 -T0 -f {path} -o {ready} && sync {ready}")
    return ready


def pipelines(directory: Path, size: int, rounds: int) -> Results:
    """Measure all of it; the texts have ``size`` bytes, other data less."""
    comparisons: list[Comparison] = []
    stage_inputs = []
    for kind in KINDS:
        print(f"making {kind.title}", file=sys.stderr)
        path = kind.make(directory / kind.name, max(1, size // kind.share))
        ready = compressed(path)
        if kind.name == "text":
            comparisons += _real(directory, path, ready, rounds)
        comparisons.append(_sink(kind, path, ready, rounds))
        comparisons.append(_source(kind, path, ready, rounds))
        if kind.name in ("text", "random"):
            with open(path, "rb") as file:
                stage_inputs.append(file.read(16 * compress.FRAME_SIZE))
        path.unlink()
        ready.unlink()
    parts = ", ".join(f"{format_size(size // kind.share)} of {kind.title}" for kind in KINDS)
    return Results(
        area="pipelines",
        date=today(),
        machine=machine(),
        conditions=f"{parts}; medians of {rounds} alternating rounds (one for pbzip2)",
        comparisons=comparisons,
        sheets=[stages(*stage_inputs)],
        versions=versions("zstd", "s5cmd", "rclone", "aws", "pbzip2", "curl", "weed", "pg_dump"),
    )


def _real(directory: Path, path: Path, ready: Path, rounds: int) -> list[Comparison]:
    size = path.stat().st_size
    with real_server(directory / "s3") as server:
        at, environment = server.endpoint, s3_environment(server.endpoint)
        known = ways(at, "text")
        slow = [way.name for way in known if way.slow]
        print("push of dump text to SeaweedFS", file=sys.stderr)
        commands = {way.name: f"cat {path} | {way.push}" for way in known}
        commands[UPLOAD_ALONE] = f"{s5cmd(at)} cp {ready} s3://{BUCKET}/ready"
        pushed = alternate(shell(commands, environment), rounds, once=slow, limits=[UPLOAD_ALONE])
        count_stored(at, "text", known, pushed)
        print("pull of it", file=sys.stderr)
        commands = {way.name: f"{way.pull} > /dev/null" for way in known}
        commands[DOWNLOAD_ALONE] = f"{curl(at)}/{BUCKET}/ready > /dev/null"
        pulled = alternate(shell(commands, environment), rounds, once=slow, limits=[DOWNLOAD_ALONE])
    shutil.rmtree(directory / "s3", ignore_errors=True)
    return [
        Comparison("push", "Push of dump text to SeaweedFS on the same machine", PUSH, sized(pushed, size)),
        Comparison("pull", "Pull of dump text from SeaweedFS on the same machine", PULL, sized(pulled, size)),
    ]


def _sink(kind: Kind, path: Path, ready: Path, rounds: int) -> Comparison:
    print(f"push of {kind.title} to a sink", file=sys.stderr)
    with null_server() as endpoint:
        known = [way for way in ways(endpoint, kind.name) if not way.slow]
        commands = {way.name: f"cat {path} | {way.push}" for way in known}
        commands[COMPRESS_ALONE] = f"cat {path} | {tool('zstd')} -q -1 -T0 > /dev/null"
        commands[PIPE_ALONE] = f"cat {path} | cat > /dev/null"
        commands[UPLOAD_ALONE] = f"{curl(endpoint)}/{BUCKET}/ready -T {ready}"
        limits = [COMPRESS_ALONE, PIPE_ALONE, UPLOAD_ALONE]
        lines = alternate(shell(commands, s3_environment(endpoint)), rounds, limits=limits)
        count_stored(endpoint, kind.name, known, lines)
    title = f"Push of {kind.title} to an S3 sink that costs nothing"
    return Comparison(f"push-{kind.name}", title, PUSH, sized(lines, path.stat().st_size))


def _source(kind: Kind, path: Path, ready: Path, rounds: int) -> Comparison:
    print(f"pull of {kind.title} from memory", file=sys.stderr)
    # (A file system in memory, if there is one; else what is read again lies in the page cache.)
    memory = Path("/dev/shm")
    kept = Path(tempfile.mkdtemp(prefix="backhaul-bench-", dir=memory if memory.is_dir() else None))
    try:
        with null_server(kept) as endpoint:
            environment = s3_environment(endpoint)
            commands = {}
            for way in (way for way in ways(endpoint, kind.name) if not way.slow):
                commands[way.name] = f"{way.pull} > /dev/null"
                try:
                    measured(f"cat {path} | {way.push}", environment)
                except FailedError as error:
                    # Its pull will fail too, and that is what the table says.
                    print(f"  {way.name} could not push: {error}", file=sys.stderr)
            measured(f"{curl(endpoint)}/{BUCKET}/ready -T {ready}", environment)
            commands[DECODE_ALONE] = f"{tool('zstd')} -q -d -c {ready} > /dev/null"
            commands[DOWNLOAD_ALONE] = f"{curl(endpoint)}/{BUCKET}/ready > /dev/null"
            lines = alternate(shell(commands, environment), rounds, limits=[DECODE_ALONE, DOWNLOAD_ALONE])
    finally:
        shutil.rmtree(kept, ignore_errors=True)
    title = f"Pull of {kind.title} from an S3 server in memory"
    return Comparison(f"pull-{kind.name}", title, PULL, sized(lines, path.stat().st_size))


def stages(text: bytes, noise: bytes) -> Sheet:
    """Measure the stages of a push and a pull alone, in one thread, by CPU time: the best of five."""
    frame = compress.FRAME_SIZE
    contents = (text, noise)
    blocks = [[memoryview(c)[i : i + frame] for i in range(0, len(c), frame)] for c in contents]
    compressor, decompressor = compress.FrameCompressor(compress.AUTO), compress.FrameDecompressor()
    frames = [[memoryview(compressor.compress(block)) for block in kind] for kind in blocks]
    out = memoryview(bytearray(frame))

    def decode(kind: int) -> None:
        for stored, block in zip(frames[kind], blocks[kind], strict=True):
            decompressor.decompress_into(stored, out[: len(block)])

    def digest(kind: int, *, crc: bool) -> None:
        feeder = StreamDigest(crc=crc)
        for block in blocks[kind]:
            feeder.feed(block)

    jobs: dict[str, Callable[[int], object]] = {
        "compress (auto)": lambda kind: [compressor.compress(block) for block in blocks[kind]],
        "decompress": decode,
        "BLAKE3": functools.partial(digest, crc=False),
        "BLAKE3 and CRC64NVME": functools.partial(digest, crc=True),
    }
    rows = []
    for name, job in jobs.items():
        cells = []
        for kind in (0, 1):
            best = min(thread_seconds(functools.partial(job, kind)) for _ in range(5))
            cells.append(f"{len(contents[kind]) / best / 1e6:.0f} MB/s")
        rows.append([name, *cells])
    return Sheet("One core, one stage at a time", ["stage", "dump text", "random bytes"], rows)


def thread_seconds(job: Callable[[], object]) -> float:
    """Return the CPU seconds that this thread takes for it."""
    start = time.thread_time()
    job()
    return time.thread_time() - start
