"""``python -m bench.reliability``: the figures of docs/RELIABILITY.md, counted anew.

Three parts: the crash enumerator over every operation that changes stores; the soak through each kind of bad line,
against SeaweedFS; and an interrupted push of a large file, with the bytes that its second run sends. Counts, not times.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from tests.end_to_end.test_crashes import NOISE, Clean, PushOfAFile, PushSomethingSmall, PushToOne, PushToTwo

from backhaul.testing.crashes import Operation, enumerate_crashes
from backhaul.testing.data import random_bytes
from backhaul.testing.servers import SeaweedFS, seaweedfs
from backhaul.testing.soak import PLANS, soak

ROUNDS = int(os.environ.get("ROUNDS", "8"))
SIZE = int(os.environ.get("SIZE", str(5 * 10**9)))


def crashes(directory: Path) -> None:
    """Print a row for each operation."""
    file = directory / "dump"
    file.write_bytes(NOISE)
    both = ("s3://world/app", "s3://elsewhere/app")
    operations: list[tuple[str, Operation]] = [
        ("push of one request", PushSomethingSmall()),
        ("push to one store, in parts and segments", PushToOne()),
        ("push to two stores", PushToTwo()),
        ("resumed push of a file to one store", PushOfAFile(file, both[:1])),
        ("resumed push of a file to two stores", PushOfAFile(file, both)),
        ("clean of a series full of dead runs", Clean()),
    ]
    print("| operation | effects | runs (3 faults each) | backups read back | unsound |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, operation in operations:
        report = enumerate_crashes(operation, directory / name)
        print(f"| {name} | {len(report.effects)} | {report.runs} | {report.pulls} | 0 |", flush=True)


def faults(server: SeaweedFS) -> None:
    """Print a row for each kind of line."""
    client = server.client()
    client.create_bucket(Bucket="soak")
    client.close()
    print("| line | operations | faults injected | ended with an error | data lost | wrong results |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    total: Counter[str] = Counter()
    row: dict[str, int] = {}
    for name, plan in PLANS.items():
        report = soak(server.endpoint, "soak", plan, ROUNDS)
        row = {
            "operations": report.operations,
            "faults": sum(report.faults.values()),
            "failed": report.failed,
            "lost": len(report.lost),
            "wrong": len(report.wrong),
        }
        total.update(row)
        print(f"| {name} | " + " | ".join(map(str, row.values())) + " |", flush=True)
        for words in (*report.lost, *report.wrong):
            print(f"    {words}", file=sys.stderr)
    print("| **all** | " + " | ".join(str(total[key]) for key in row) + " |")


def resume(server: SeaweedFS, directory: Path) -> None:
    """Print what the second run of an interrupted push sends."""
    client = server.client()
    client.create_bucket(Bucket="resume")
    client.close()
    file = directory / "large"
    with open(file, "wb") as out:
        piece = b"".join(random_bytes(100_000_000))
        out.writelines(number.to_bytes(8, "big") + piece[8:] for number in range(SIZE // len(piece)))
    command = [sys.executable, "-m", "backhaul", "push", "s3://resume/files", "--from", str(file), "--json"]
    environment = {**os.environ, "BACKHAUL_STATE": str(directory / "state")}
    first = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)
    (directory / "state" / "uploads").mkdir(parents=True, exist_ok=True)
    lines = 0
    while lines < SIZE // 2 // (8 << 20) and first.poll() is None:
        time.sleep(0.1)
        lines = sum(path.read_bytes().count(b"\n") for path in (directory / "state" / "uploads").iterdir())
    first.send_signal(signal.SIGKILL)
    first.wait()
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    (destination,) = json.loads(done.stdout)["destinations"]
    print(
        f"{SIZE / 1e9:.1f} GB, killed at about half: {destination['reused']} bytes were there,"
        f" {destination['sent']} were sent by the second run, of {destination['stored_size']} stored"
    )


def main() -> None:
    """Run all three."""
    with tempfile.TemporaryDirectory(prefix="backhaul-reliability-") as name:
        directory = Path(name)
        crashes(directory)
        print()
        with seaweedfs(directory / "seaweed") as server:
            os.environ.update(server.environment)
            faults(server)
            print()
            resume(server, directory)


if __name__ == "__main__":
    main()
