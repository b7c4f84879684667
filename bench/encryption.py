"""What encryption costs a push, and a pull of what is encrypted against age's own program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from backhaul.formats.quantities import format_size
from backhaul.testing.servers import tool
from bench import data
from bench.pipelines import COMPRESS_ALONE, DECODE_ALONE, DOWNLOAD_ALONE, PULL, PUSH, compressed, sized
from bench.results import Comparison, Results
from bench.runs import alternate, machine, measured, shell, today, versions
from bench.stores import BACKHAUL, BUCKET, curl, null_server, rclone, real_server, s3_environment, s5cmd

_PUSH = [column for column in PUSH if column != "ratio"]
_BOTH_ALONE = "zstd -1 -T0, age alone, to nowhere"


def encryption(directory: Path, size: int, rounds: int) -> Results:
    """Measure pushes to the sink and to SeaweedFS, and pulls from there and from a disk."""
    text = data.text(directory / "text", size)
    ready = compressed(text)
    key = directory / "key"
    zstd, age = tool("zstd"), tool("age")
    made = subprocess.run([*BACKHAUL.split(), "keygen", "-o", str(key)], stdout=subprocess.PIPE, text=True, check=True)
    recipient = made.stdout.strip()

    def pushes(endpoint: str) -> dict[str, str]:
        at = f"s3://{BUCKET}/"
        return {
            "backhaul": f"cat {text} | {BACKHAUL} push -q {at}plain",
            "backhaul, encrypted": f"cat {text} | {BACKHAUL} push -q {at}sealed --encrypt-to {recipient}",
            "zstd -1 -T0, age, s5cmd": (
                f"cat {text} | {zstd} -q -1 -T0 | {age} -r {recipient} | {s5cmd(endpoint)} pipe {at}s5"
            ),
        }

    with null_server() as endpoint:
        print("encrypted push to a sink", file=sys.stderr)
        commands = pushes(endpoint)
        commands[COMPRESS_ALONE] = f"cat {text} | {zstd} -q -1 -T0 > /dev/null"
        commands[_BOTH_ALONE] = f"cat {text} | {zstd} -q -1 -T0 | {age} -r {recipient} > /dev/null"
        limits = [COMPRESS_ALONE, _BOTH_ALONE]
        to_sink = alternate(shell(commands, s3_environment(endpoint)), rounds, limits=limits)
    with real_server(directory / "s3") as server:
        print("encrypted push to SeaweedFS", file=sys.stderr)
        environment = s3_environment(server.endpoint)
        to_store = alternate(shell(pushes(server.endpoint), environment), rounds)
        print("encrypted pull from SeaweedFS", file=sys.stderr)
        opened = f"{age} -d -i {key} | {zstd} -q -d > /dev/null"
        commands = {
            "backhaul": f"{BACKHAUL} pull -q s3://{BUCKET}/sealed --identity {key} > /dev/null",
            "s5cmd, age -d, zstd -d": f"{s5cmd(server.endpoint)} cat s3://{BUCKET}/s5 | {opened}",
            "rclone, age -d, zstd -d": f"{rclone(server.endpoint)} cat :s3:{BUCKET}/s5 | {opened}",
            DOWNLOAD_ALONE: f"{curl(server.endpoint)}/{BUCKET}/s5 > /dev/null",
        }
        from_store = alternate(shell(commands, environment), rounds, limits=[DOWNLOAD_ALONE])
    print("encrypted pull from a disk", file=sys.stderr)
    disk = directory / "disk"
    measured(f"cat {text} | {BACKHAUL} push -q {disk} --encrypt-to {recipient}", os.environ)
    (stored,) = disk.rglob("data.zst.age")
    commands = {
        "backhaul": f"{BACKHAUL} pull -q {disk} --identity {key} > /dev/null",
        "age -d, zstd -d": f"{age} -d -i {key} {stored} | {zstd} -q -d > /dev/null",
        DECODE_ALONE: f"{zstd} -q -d -c {ready} > /dev/null",
    }
    from_disk = alternate(shell(commands), rounds, limits=[DECODE_ALONE])
    sink = "Push of dump text to an S3 sink that costs nothing, encrypted and not"
    store = "Push of dump text to SeaweedFS, encrypted and not"
    return Results(
        area="encryption",
        date=today(),
        machine=machine(),
        conditions=f"{format_size(size)} of dump text, medians of {rounds} alternating rounds",
        comparisons=[
            Comparison("push-sink", sink, _PUSH, sized(to_sink, size)),
            Comparison("push", store, _PUSH, sized(to_store, size)),
            Comparison("pull", "Pull of encrypted dump text from SeaweedFS", PULL, sized(from_store, size)),
            Comparison("pull-disk", "Pull of encrypted dump text from a disk", PULL, sized(from_disk, size)),
        ],
        versions=versions("zstd", "age", "s5cmd", "rclone", "curl", "weed"),
    )
