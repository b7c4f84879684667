"""Latency: how long the small things take, Python's start included.

The bytecode is compiled before, as an installation does it. The shell that starts each way is in its time.
"""

from __future__ import annotations

import compileall
import http.client
import os
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from botocore.auth import S3SigV4Auth
from botocore.awsrequest import AWSRequest
from botocore.credentials import Credentials

import backhaul
from backhaul.formats import names
from backhaul.formats.quantities import format_size
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY, SeaweedFS
from bench.results import Comparison, Results
from bench.runs import FailedError, alternate, machine, shell, today, versions
from bench.stores import BACKHAUL, BUCKET, aws, rclone, real_server, s3_environment, s5cmd

BACKUPS = 10_000
PUSH, PULL = "backhaul push to S3", "backhaul pull from S3"
_COLUMNS = ["wall", "from - to", "CPU", "peak memory", "time against ours"]
# 10,000 nights are 27 years.
_FIRST = 852_076_800


class _Unsigned(S3SigV4Auth):
    def payload(self, request: Any) -> str:
        return "UNSIGNED-PAYLOAD"


def _put(connection: http.client.HTTPConnection, target: str, body: bytes, endpoint: str) -> None:
    request = AWSRequest("PUT", endpoint + target, headers={"x-amz-content-sha256": "UNSIGNED-PAYLOAD"})
    request.context["payload_signing_enabled"] = False
    _Unsigned(Credentials(ACCESS_KEY, SECRET_KEY), "s3", "us-east-1").add_auth(request)
    connection.request("PUT", target, body, dict(request.headers.items()))
    reply = connection.getresponse()
    reply.read()
    if reply.status != 200:
        raise FailedError(f"{target} was not stored: {reply.status}")


def fill(server: SeaweedFS, bucket: str, series: str, count: int) -> None:
    """Make a series of so many backups: a real one, and the same under other ids, a day apart."""
    os.environ.update(server.environment)
    made = backhaul.push(f"s3://{bucket}/{series}-one", backhaul.StreamSource(_pipe(b"x" * 1024)))
    client = server.client()
    objects: dict[str, bytes] = {}
    for entry in client.list_objects_v2(Bucket=bucket, Prefix=f"{series}-one/")["Contents"]:
        body = client.get_object(Bucket=bucket, Key=entry["Key"])["Body"].read()
        objects[entry["Key"].rpartition("/")[2]] = body
    client.close()
    connection = http.client.HTTPConnection(urlsplit(server.endpoint).netloc)
    for number in range(count):
        backup = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(_FIRST + number * 86_400))
        for file, content in objects.items():
            body = content.replace(made.id.encode(), backup.encode()) if file == names.MANIFEST else content
            _put(connection, f"/{bucket}/{series}/{backup}/{file}", body, server.endpoint)
    connection.close()


def _pipe(data: bytes) -> int:
    reading, writing = os.pipe()
    os.write(writing, data)
    os.close(writing)
    return reading


def latency(directory: Path, size: int, rounds: int) -> Results:
    """Measure small things to a directory and to SeaweedFS and back, ``size`` bytes each, and long listings."""
    compileall.compile_dir(str(Path(backhaul.__file__).parent), quiet=2)
    data = directory / "small"
    data.write_bytes(os.urandom((size + 1) // 2).hex().encode()[:size])
    local, remote = directory / "series", f"s3://{BUCKET}/series"
    with real_server(directory / "seaweed") as server:
        environment = s3_environment(server.endpoint)
        amazon, s5, cone = aws(server.endpoint), s5cmd(server.endpoint), rclone(server.endpoint)
        client = f"{sys.executable} -c 'import boto3; boto3.client(\"s3\")'"
        commands = {
            "backhaul --version": f"{BACKHAUL} --version",
            "backhaul push to a directory": f"{BACKHAUL} push {local}",
            "backhaul pull from a directory": f"{BACKHAUL} pull {local}",
            "backhaul list of a directory": f"{BACKHAUL} list {local}",
            PUSH: f"{BACKHAUL} push {remote}",
            "aws s3 cp to S3": f"{amazon} s3 cp - s3://{BUCKET}/aws",
            "rclone rcat to S3": f"{cone} rcat :s3:{BUCKET}/rclone",
            "s5cmd pipe to S3": f"{s5} pipe s3://{BUCKET}/s5",
            PULL: f"{BACKHAUL} pull {remote}",
            "aws s3 cp from S3": f"{amazon} s3 cp s3://{BUCKET}/aws -",
            "backhaul list on S3": f"{BACKHAUL} list {remote}",
            "a shell that does nothing": "true",
            "python -c pass": f"{sys.executable} -c pass",
            "boto3.client('s3'), no request": client,
        }
        fed = {name: f"{command} < {data} > /dev/null" for name, command in commands.items()}
        small = alternate(shell(fed, environment), rounds, limits=list(commands)[-3:])
        bases = {PUSH: ("to S3",), PULL: ("from S3",)}
        for line in small:
            line.base = next((base for base, ends in bases.items() if line.name.endswith(ends)), "none")
        print(f"a series of {BACKUPS:,} backups", file=sys.stderr)
        fill(server, BUCKET, "many", BACKUPS)
        many = f"s3://{BUCKET}/many"
        commands = {
            "backhaul list": f"{BACKHAUL} list {many}",
            "backhaul list --json": f"{BACKHAUL} list --json {many}",
            "backhaul pull of the newest": f"{BACKHAUL} pull {many}",
            "aws s3 ls --recursive": f"{amazon} s3 ls --recursive {many}/",
            "s5cmd ls": f"{s5} ls '{many}/*'",
        }
        silent = {name: f"{command} > /dev/null" for name, command in commands.items()}
        listed = alternate(shell(silent, environment), max(3, rounds // 2))
    title = f"{format_size(size)}, Python's start included"
    return Results(
        area="latency",
        date=today(),
        machine=machine(),
        conditions=f"medians of {rounds} alternating rounds, listings of {max(3, rounds // 2)}",
        comparisons=[
            Comparison("small", title, _COLUMNS, small, shows="wall"),
            Comparison(
                "list",
                f"A series of {BACKUPS:,} backups in SeaweedFS",
                _COLUMNS,
                listed,
                base="backhaul list",
                shows="wall",
            ),
        ],
        versions=versions("aws", "rclone", "s5cmd", "weed"),
    )
