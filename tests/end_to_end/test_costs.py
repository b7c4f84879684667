"""What a gigabyte costs, counted: system calls, fresh memory and requests. Times tell nothing on a shared machine.

Each cost is the difference between two runs, one of ``MORE`` bytes more: start-up and the first use of buffers are in
both. Memory that is touched for the first time is a page fault: a copy that somebody adds on the way shows as one more
time the stream's size. The bounds follow from how large the pieces are, with room for what the kernel does not take
at once; they are far below what the same work cost with one more copy, or with pieces of 64 KiB.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from backhaul.operations import memory
from backhaul.testing.data import dump_text
from backhaul.testing.s3_proxy import S3Proxy, S3Request
from backhaul.testing.servers import SeaweedFS
from backhaul.transforms.compress import FRAME_SIZE
from backhaul.version import VERSION
from tests.conftest import Cli

MIB = 1 << 20
LESS = 128 * MIB  # more than a pull has buffers for: from here on it uses them again
MORE = 128 * MIB
FRAMES = MORE // FRAME_SIZE
PAGE = os.sysconf("SC_PAGE_SIZE")
_COUNTED = "read,readv,preadv2,pread64,write,writev,pwrite64,sendto,sendmsg,mmap,munmap,openat,fsync"

Command = Callable[[str], list[str]]


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of ``text`` and ``noise``, each short and long. (Frames see nothing of what is repeated.)"""
    directory = tmp_path_factory.mktemp("sources")
    blocks = {"text": b"".join(dump_text(16 * MIB))[: 16 * MIB], "noise": os.urandom(16 * MIB)}
    for name, block in blocks.items():
        for size in (LESS, LESS + MORE):
            with open(directory / f"{name}-{size}", "wb") as file:
                file.writelines(block for _ in range(size // len(block)))
    return directory


class Costs:
    """Runs a command on the short and on the long source, and returns what the long one cost more."""

    def __init__(self, cli: Cli, directory: Path) -> None:
        self._cli = cli
        self._directory = directory

    def _run(self, command: list[str], source: Path | None) -> int:
        """Run it; return its page faults."""
        with open(source or os.devnull, "rb") as stdin:
            process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.DEVNULL, env=self._cli.environment, cwd=self._directory
            )
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0, command
        return usage.ru_minflt

    def _calls(self, command: list[str], source: Path | None) -> dict[str, int]:
        report = self._directory / "calls"
        traced = ["strace", "-f", "-c", "-U", "name,calls", "-e", f"trace={_COUNTED}", "-o", str(report), *command]
        self._run(traced, source)
        return {
            name: int(count) for name, count in re.findall(r"^\s*(\w+)\s+(\d+)\s*$", report.read_text(), re.MULTILINE)
        }

    def of(self, make: Command, source: Path | None = None, name: str = "") -> dict[str, int]:
        """Return the calls by name, and as ``fresh`` the bytes of memory touched for the first time.

        Args:
            make: gives the arguments for a name that tells runs apart.
            source: the directory of what is read on stdin, if anything is.
            name: that of the source.
        """
        known: list[dict[str, int]] = []
        for size in (LESS, LESS + MORE):
            stdin = source / f"{name}-{size}" if source is not None else None
            plain = [sys.executable, "-m", "backhaul", *make(f"{size}")]
            calls = self._calls(plain, stdin)
            known.append({**calls, "fresh": self._run(plain, stdin) * PAGE})
        names = known[0].keys() | known[1].keys()
        return {key: known[1].get(key, 0) - known[0].get(key, 0) for key in names}


def reads(stored: int) -> tuple[int, int]:
    """Return by how many requests a pull may fetch ``MORE`` that is stored as so much, and in how many pieces decode it.

    Whole frames make a range, and whole frames of a range make a piece.
    """
    frames_a_range = min(FRAMES, memory.RANGE_STORED // -(-stored // FRAMES))
    ranges = -(-FRAMES // frames_a_range)
    return ranges, ranges * -(-frames_a_range // (memory.PIECE_RAW // FRAME_SIZE))


@pytest.fixture
def costs(cli: Cli, tmp_path: Path) -> Costs:
    return Costs(cli, tmp_path)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["text", "noise"])
def test_a_push_to_a_disk_and_its_pull(costs: Costs, sources: Path, tmp_path: Path, name: str) -> None:
    series = tmp_path / "series"
    spent = costs.of(lambda run: ["push", "-q", f"{series}/{run}"], sources, name)
    stored = {
        size: max(path.stat().st_size for path in (series / f"{size}").rglob("data.zst*"))
        for size in (LESS, LESS + MORE)
    }
    more = stored[LESS + MORE] - stored[LESS]
    # A block of the stream is read by one call, into memory that is used again.
    assert spent.get("readv", 0) + spent.get("read", 0) <= 2 * FRAMES
    # A frame leaves in pieces that double from 64 KiB to 256 KiB: at most seventeen of them for its 4 MiB.
    assert spent["pwrite64"] <= 20 * FRAMES + 16
    # A frame is made in memory of its own, and copied nowhere.
    assert spent["fresh"] <= 1.25 * more + 8 * MIB
    assert spent["mmap"] + spent["munmap"] <= 4 * FRAMES
    assert spent.get("fsync", 0) <= 0

    spent = costs.of(lambda run: ["pull", "-q", f"{series}/{run}"])
    ranges, pieces = reads(more)
    assert spent["preadv2"] + spent.get("pread64", 0) <= ranges + 2
    assert spent["write"] <= pieces + 2
    # What was decoded lies in buffers that are used again.
    assert spent["fresh"] <= MORE // 8


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", ["text", "noise"])
def test_a_push_to_s3_and_its_pull(
    costs: Costs, cli: Cli, sources: Path, seaweed: SeaweedFS, bucket: str, name: str
) -> None:
    spent = costs.of(lambda run: ["push", "-q", f"s3://{bucket}/{run}"], sources, name)
    stored = {}
    client = seaweed.client()
    for size in (LESS, LESS + MORE):
        found = client.list_objects_v2(Bucket=bucket, Prefix=f"{size}/")["Contents"]
        stored[size] = max(entry["Size"] for entry in found)
    client.close()
    more = stored[LESS + MORE] - stored[LESS]
    parts = -(-more // (8 * MIB))
    # Pieces double from 64 KiB to 256 KiB: 33 for each 8 MiB, and the headers; here and there one is taken in two.
    assert spent["sendto"] + spent.get("sendmsg", 0) <= 1.5 * 34 * parts + 64
    assert spent.get("readv", 0) + spent.get("read", 0) <= 2 * FRAMES + 32
    # The frame, and nothing else: parts are gathered in buffers that are used again.
    assert spent["fresh"] <= 1.25 * more + 16 * MIB
    assert spent["mmap"] + spent["munmap"] <= 4 * FRAMES

    spent = costs.of(lambda run: ["pull", "-q", f"s3://{bucket}/{run}"])
    ranges, pieces = reads(more)
    assert spent["sendto"] <= ranges + 8
    assert spent["write"] <= pieces + 8
    assert spent["fresh"] <= MORE // 8


def test_requests_are_parts_and_ranges(cli: Cli, sources: Path, seaweed: SeaweedFS, bucket: str) -> None:
    """What the bytes themselves cost in requests; everything else is asked as often for a short stream."""
    pushes: list[int] = []
    pulls: list[int] = []
    for size in (LESS, LESS + MORE):
        for command, counted in (("push", pushes), ("pull", pulls)):
            with S3Proxy(seaweed.endpoint) as proxy, open(sources / f"noise-{size}", "rb") as stdin:
                environment = {**cli.environment, "AWS_ENDPOINT_URL": proxy.endpoint}
                process = subprocess.run(
                    [sys.executable, "-m", "backhaul", command, "-q", f"s3://{bucket}/requests-{size}"],
                    stdin=stdin if command == "push" else subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    env=environment,
                    check=False,
                )
                assert process.returncode == 0
                counted.append(len(proxy.requests))
    # Frames of noise are a few bytes longer than what is in them: a part of 8 MiB more, once in a while.
    assert MORE // (8 * MIB) <= pushes[1] - pushes[0] <= MORE // (8 * MIB) + 1
    assert pulls[1] - pulls[0] == MORE // (memory.RANGE_STORED // FRAME_SIZE * FRAME_SIZE)


class Asking(S3Proxy):
    """Notes which bodies clients asked about before they sent them, and who the clients say they are."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.asked: list[int] = []
        self.sent: list[int] = []
        self.agents: set[str] = set()

    def edit(self, request: S3Request) -> Mapping[str, str]:
        self.agents.add(request.headers["user-agent"])
        return super().edit(request)

    def request_body(self, request: S3Request, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        (self.asked if request.headers.get("expect") == "100-continue" else self.sent).append(length)
        return pieces


def test_little_is_sent_at_once_and_much_after_the_store_was_asked(
    cli: Cli, seaweed: SeaweedFS, bucket: str, tmp_path: Path
) -> None:
    """A round trip less for each small file of a mirror, and for the records of a backup."""
    tree = tmp_path / "tree"
    tree.mkdir()
    sizes = [1, 5000, 64 << 10, (64 << 10) + 1, 1 << 20]
    for size in sizes:
        (tree / f"{size}").write_bytes(bytes(size))
    with Asking(seaweed.endpoint) as proxy:
        at = f"s3://{bucket}/m?endpoint={proxy.endpoint}"
        cli.ok("sync", "-q", str(tree), at, env={"BACKHAUL_STATE": str(tmp_path / "state")})
        assert {size for size in proxy.asked if size in sizes} == set(sizes[3:])
        assert {size for size in proxy.sent if size in sizes} == set(sizes[:3])
        for seen in (proxy.asked, proxy.sent, proxy.agents):
            seen.clear()
        cli.ok("push", "-q", f"s3://{bucket}/s?endpoint={proxy.endpoint}", input=b"x" * 1024)
        assert proxy.asked == []
        assert len(proxy.sent) >= 2
        assert proxy.agents
        assert all(agent.startswith(f"backhaul/{VERSION} ") for agent in proxy.agents)
