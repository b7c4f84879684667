"""``make bench``: push and pull, plain and encrypted, against the tools that a person would pick, in the same run.

The ways alternate, round by round, so that a noisy neighbour hits all of them; what counts is each way's
median and the ratios. ``--write`` puts the tables into docs/BENCHMARKS.md.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import functools
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from backhaul.formats.quantities import format_size
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY, SeaweedFS, free_ports, seaweedfs, tool
from backhaul.transforms import compress
from backhaul.transforms.digest import StreamDigest

BUCKET = "bench"
ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "BENCHMARKS.md"


class Way(msgspec.Struct, frozen=True):
    """One way to do it: a shell command that reads stdin (push) or writes stdout (pull)."""

    name: str
    push: str
    pull: str
    slow: bool = False


class Run(msgspec.Struct, frozen=True):
    """One measured run: wall and CPU seconds, and the peak memory of its largest process."""

    wall: float
    cpu: float
    memory: int


def rclone(endpoint: str) -> str:
    """Return the beginning of an rclone command."""
    return (
        f"{tool('rclone')} --config /dev/null --s3-provider Other --s3-env-auth --s3-endpoint {endpoint} "
        "--s3-force-path-style --s3-use-multipart-etag false --s3-no-check-bucket"
    )


def ways(endpoint: str, key_prefix: str) -> list[Way]:
    """Return ours first, then the peers, each with its own object."""
    backhaul = f"{sys.executable} -m backhaul"
    s5 = f"{tool('s5cmd')} --endpoint-url {endpoint}"
    aws = f"{tool('aws')} --endpoint-url {endpoint}"
    zstd = tool("zstd")
    at = f"s3://{BUCKET}/{key_prefix}"
    return [
        Way("backhaul", f"{backhaul} push -q {at}-backhaul", f"{backhaul} pull -q {at}-backhaul"),
        Way("zstd -1 -T0, s5cmd", f"{zstd} -q -1 -T0 | {s5} pipe {at}-s5.zst", f"{s5} cat {at}-s5.zst | {zstd} -q -d"),
        Way(
            "zstd -1 -T0, rclone",
            f"{zstd} -q -1 -T0 | {rclone(endpoint)} rcat :s3:{BUCKET}/{key_prefix}-rclone.zst",
            f"{rclone(endpoint)} cat :s3:{BUCKET}/{key_prefix}-rclone.zst | {zstd} -q -d",
        ),
        Way(
            "zstd -1 -T0, aws s3 cp",
            f"{zstd} -q -1 -T0 | {aws} s3 cp - {at}-aws.zst",
            f"{aws} s3 cp {at}-aws.zst - | {zstd} -q -d",
        ),
        Way(
            "pbzip2, aws s3 cp",
            f"pbzip2 -q -c | {aws} s3 cp - {at}-bz.bz2",
            f"{aws} s3 cp {at}-bz.bz2 - | pbzip2 -q -d -c",
            slow=True,
        ),
    ]


def measured(command: str, environment: dict[str, str]) -> Run:
    """Run a pipeline; every stage must succeed."""
    start = time.monotonic()
    process = subprocess.Popen(
        ["bash", "-o", "pipefail", "-c", command], env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    words = process.stderr.read().decode(errors="replace")
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    process.stderr.close()
    if process.returncode:
        sys.exit(f"bench: this ended with status {process.returncode}: {command}\n{words}")
    return Run(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def middle(runs: list[Run]) -> Run:
    """Return the medians."""
    return Run(
        statistics.median(run.wall for run in runs),
        statistics.median(run.cpu for run in runs),
        int(statistics.median(run.memory for run in runs)),
    )


def table(title: str, size: int, results: dict[str, list[Run]], stored: dict[str, int]) -> list[str]:
    """Return a Markdown table; the last column is how many times as long each way took as ours."""
    ours = middle(results["backhaul"])
    lines = [
        f"### {title}",
        "",
        "| way | rate | wall | CPU | peak memory | ratio | time against ours |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, runs in results.items():
        run = middle(runs)
        ratio = f"{size / stored[name]:.2f}" if stored.get(name) else ""
        lines.append(
            f"| {name} | {size / run.wall / 1e6:.0f} MB/s | {run.wall:.2f} s | {run.cpu:.2f} s "
            f"| {format_size(run.memory)} | {ratio} | {run.wall / ours.wall:.2f} |"
        )
    return [*lines, ""]


def alternate(
    commands: dict[str, str], environment: dict[str, str], rounds: int, slow: set[str]
) -> dict[str, list[Run]]:
    """Run every command once a round (slow ones in the first round only); return all runs by name."""
    results: dict[str, list[Run]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, command in commands.items():
            if number and name in slow:
                continue
            results[name].append(measured(command, environment))
            print(f"  round {number + 1}: {name}: {results[name][-1].wall:.2f} s", file=sys.stderr)
    return results


@contextlib.contextmanager
def null_server() -> Iterator[str]:
    """Run the sink that costs nothing."""
    port = free_ports(1)[0]
    process = subprocess.Popen([sys.executable, "-m", "bench.null_s3", str(port)], cwd=ROOT)
    try:
        time.sleep(1)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def sizes(server: SeaweedFS, prefix: str) -> dict[str, int]:
    """Return each way's stored bytes."""
    client = server.client()
    suffixes = {
        "-backhaul/": "backhaul",
        "-s5": "s5cmd",
        "-rclone": "rclone",
        "-aws": "zstd -1 -T0, aws",
        "-bz": "pbzip2",
    }
    found: dict[str, int] = {}
    for entry in client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", []):
        for suffix, name in suffixes.items():
            if entry["Key"].startswith(prefix + suffix) and not entry["Key"].endswith(".json"):
                found[name] = entry["Size"]
    client.close()
    return {way.name: size for way in ways(server.endpoint, prefix) for name, size in found.items() if name in way.name}


def s3_environment(endpoint: str) -> dict[str, str]:
    """Return what every way needs to talk to that endpoint."""
    return {
        **os.environ,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_ENDPOINT_URL": endpoint,
    }


@contextlib.contextmanager
def real_server(directory: Path) -> Iterator[SeaweedFS]:
    """Run SeaweedFS with the bucket in it."""
    with seaweedfs(directory / "s3") as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


def pipelines(directory: Path, text: Path, rounds: int) -> list[str]:
    """Measure push and pull against the peers; return the lines of the report."""
    size = text.stat().st_size
    noise = directory / "noise"
    with open(noise, "wb") as file:
        file.writelines(random_bytes(min(size, 500_000_000)))
    lines: list[str] = []
    with real_server(directory) as server:
        environment = s3_environment(server.endpoint)
        known = ways(server.endpoint, "text")
        slow = {way.name for way in known if way.slow}
        pushes = {way.name: f"cat {text} | {way.push}" for way in known}
        print("push of dump text to SeaweedFS", file=sys.stderr)
        results = alternate(pushes, environment, rounds, slow)
        stored = sizes(server, "text")
        lines += table("Push of dump text to SeaweedFS on the same machine", size, results, stored)
        print("pull of it", file=sys.stderr)
        pulls = {way.name: f"{way.pull} > /dev/null" for way in known}
        lines += table("Pull of it", size, alternate(pulls, environment, rounds, slow), {})
    with null_server() as endpoint:
        known = [way for way in ways(endpoint, "sink") if not way.slow]
        for title, path in (("dump text", text), ("random bytes", noise)):
            print(f"push of {title} to a sink", file=sys.stderr)
            commands = {way.name: f"cat {path} | {way.push}" for way in known}
            commands["zstd -1 -T0 alone, to nowhere"] = f"cat {path} | {tool('zstd')} -q -1 -T0 > /dev/null"
            commands["a pipe alone, to nowhere"] = f"cat {path} | cat > /dev/null"
            lines += table(
                f"Push of {title} to an S3 sink that costs nothing",
                path.stat().st_size,
                alternate(commands, s3_environment(endpoint), rounds, set()),
                {},
            )
    return lines + stages(text, noise)


def encryption(directory: Path, text: Path, rounds: int) -> list[str]:
    """Measure what encryption costs a push, and a pull of what is encrypted against age's own program."""
    size = text.stat().st_size
    key = directory / "key"
    backhaul, zstd, age = f"{sys.executable} -m backhaul", tool("zstd"), tool("age")
    made = subprocess.run([*backhaul.split(), "keygen", "-o", str(key)], stdout=subprocess.PIPE, text=True, check=True)
    recipient = made.stdout.strip()
    lines: list[str] = []

    def pushes(endpoint: str) -> dict[str, str]:
        at = f"s3://{BUCKET}/"
        s5 = f"{tool('s5cmd')} --endpoint-url {endpoint}"
        return {
            "backhaul": f"cat {text} | {backhaul} push -q {at}plain",
            "backhaul, encrypted": f"cat {text} | {backhaul} push -q {at}sealed --encrypt-to {recipient}",
            "zstd -1 -T0, age, s5cmd": f"cat {text} | {zstd} -q -1 -T0 | {age} -r {recipient} | {s5} pipe {at}s5",
        }

    with null_server() as endpoint:
        print("encrypted push to a sink", file=sys.stderr)
        results = alternate(pushes(endpoint), s3_environment(endpoint), rounds, set())
        lines += table("Push of dump text to an S3 sink that costs nothing, encrypted and not", size, results, {})
    with real_server(directory) as server:
        print("encrypted push to SeaweedFS", file=sys.stderr)
        environment = s3_environment(server.endpoint)
        results = alternate(pushes(server.endpoint), environment, rounds, set())
        lines += table("Push of dump text to SeaweedFS, encrypted and not", size, results, {})
        print("encrypted pull from SeaweedFS", file=sys.stderr)
        s5 = f"{tool('s5cmd')} --endpoint-url {server.endpoint}"
        opened = f"{age} -d -i {key} | {zstd} -q -d > /dev/null"
        results = alternate(
            {
                "backhaul": f"{backhaul} pull -q s3://{BUCKET}/sealed --identity {key} > /dev/null",
                "s5cmd, age -d, zstd -d": f"{s5} cat s3://{BUCKET}/s5 | {opened}",
                "rclone, age -d, zstd -d": f"{rclone(server.endpoint)} cat :s3:{BUCKET}/s5 | {opened}",
            },
            environment,
            rounds,
            set(),
        )
        lines += table("Pull of encrypted dump text from SeaweedFS", size, results, {})
    print("encrypted pull from a disk", file=sys.stderr)
    disk = directory / "disk"
    measured(f"cat {text} | {backhaul} push -q {disk} --encrypt-to {recipient}", dict(os.environ))
    (stored,) = disk.rglob("data.zst.age")
    results = alternate(
        {
            "backhaul": f"{backhaul} pull -q {disk} --identity {key} > /dev/null",
            "age -d, zstd -d": f"{age} -d -i {key} {stored} | {zstd} -q -d > /dev/null",
        },
        dict(os.environ),
        rounds,
        set(),
    )
    return lines + table("Pull of encrypted dump text from a disk", size, results, {})


def mirrors(directory: Path, text: Path, rounds: int) -> list[str]:
    """Measure mirrors; see ``bench.mirror``."""
    from bench.mirror import mirror

    return mirror(directory, text, rounds)


def databases(directory: Path, text: Path, rounds: int) -> list[str]:
    """Measure a database of 5 GB; see ``bench.databases``."""
    from bench.databases import databases as measure

    return measure(directory, rounds)


def fan_out(directory: Path, payload: Path, rounds: int) -> list[str]:
    """Measure one sender with many receivers; see ``bench.fan_out``."""
    from bench.fan_out import fan_out as measure

    return measure(directory, payload, rounds)


SECTIONS = {
    "pipelines": pipelines,
    "encryption": encryption,
    "mirror": mirrors,
    "databases": databases,
    "fan-out": fan_out,
}


def stages(text: Path, noise: Path) -> list[str]:
    """Measure the stages of a push and a pull alone, in one thread, by CPU time: the best of five."""
    frame = compress.FRAME_SIZE
    lines = ["### One core, one stage at a time", "", "| stage | dump text | random bytes |", "| --- | ---: | ---: |"]
    contents = [path.read_bytes()[: 16 * frame] for path in (text, noise)]
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
    for name, job in jobs.items():
        cells = []
        for kind in (0, 1):
            best = float("inf")
            for _ in range(5):
                start = time.thread_time()
                job(kind)
                best = min(best, time.thread_time() - start)
            cells.append(f"{len(contents[kind]) / best / 1e6:.0f} MB/s")
        lines.append(f"| {name} | {cells[0]} | {cells[1]} |")
    return [*lines, ""]


def machine() -> str:
    """Say what this was measured on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2_000_000_000, help="bytes of dump text, or of what is fanned out")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SECTIONS, help="one section")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    options = parser.parse_args()
    for name, section in SECTIONS.items():
        if options.only not in (None, name):
            continue
        directory = Path(tempfile.mkdtemp(prefix="backhaul-bench-"))
        try:
            text = directory / "text"
            what = "medians of alternating rounds (one for rclone and aws where they take long)"
            if name == "databases":
                what = "one round" if options.rounds == 1 else f"medians of {options.rounds} alternating rounds"
            elif name == "fan-out":
                what = f"random bytes, medians of {options.rounds} alternating rounds"
                with open(text, "wb") as file:
                    file.writelines(random_bytes(options.size))
            elif name != "mirror":
                what = (
                    f"{format_size(options.size)} of dump text, medians of {options.rounds} alternating rounds "
                    "(one for pbzip2)"
                )
                with open(text, "wb") as file:
                    file.writelines(dump_text(options.size))
            lines = [
                f"Measured on {dt.datetime.now(dt.UTC):%Y-%m-%d} on {machine()}: {what}.",
                "",
                *section(directory, text, options.rounds),
            ]
        finally:
            shutil.rmtree(directory, ignore_errors=True)
        body = "\n".join(lines)
        print(body)
        if options.write:
            begin, end = f"<!-- {name} -->", f"<!-- end of {name} -->"
            head, _, rest = PAGE.read_text().partition(begin)
            PAGE.write_text(f"{head}{begin}\n\n{body}\n{end}{rest.partition(end)[2]}")


if __name__ == "__main__":
    main()
