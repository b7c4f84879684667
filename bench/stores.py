"""The stores that benchmarks run against, and how the peers are told where they are."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY, SeaweedFS, free_ports, seaweedfs, tool

BUCKET = "bench"
BACKHAUL = f"{sys.executable} -m backhaul"
_ROOT = Path(__file__).resolve().parent.parent
_START_TIMEOUT = 10.0


def rclone(endpoint: str) -> str:
    """Return the beginning of an rclone command."""
    return (
        f"{tool('rclone')} --config /dev/null --s3-provider Other --s3-env-auth --s3-endpoint {endpoint} "
        "--s3-force-path-style --s3-use-multipart-etag false --s3-no-check-bucket"
    )


def s5cmd(endpoint: str) -> str:
    """Return the beginning of an s5cmd command."""
    return f"{tool('s5cmd')} --endpoint-url {endpoint}"


def aws(endpoint: str) -> str:
    """Return the beginning of a command of AWS's own tool."""
    return f"{tool('aws')} --endpoint-url {endpoint}"


def curl(endpoint: str) -> str:
    """Return the beginning of a command of the simplest client; a path below the endpoint follows, without a space."""
    return (
        f"curl -sSf --aws-sigv4 aws:amz:us-east-1:s3 --user {ACCESS_KEY}:{SECRET_KEY} "
        f"-H 'x-amz-content-sha256: UNSIGNED-PAYLOAD' {endpoint}"
    )


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
    with seaweedfs(directory) as server:
        client = server.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        yield server


@contextlib.contextmanager
def serving(command: list[str], port: int) -> Iterator[str]:
    """Run a server of ours, and wait until it can be called; give its URL.

    Raises:
        RuntimeError: it did not start.
    """
    process = subprocess.Popen(command, cwd=_ROOT)
    try:
        deadline = time.monotonic() + _START_TIMEOUT
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), 1):
                break
            if time.monotonic() > deadline or process.poll() is not None:
                raise RuntimeError("the sink did not start; its words are on stderr")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


@contextlib.contextmanager
def null_server(keep: Path | None = None) -> Iterator[str]:
    """Run the sink that costs nothing; with ``keep``, one that keeps what it gets in files there, to be read again."""
    port = free_ports(1)[0]
    command = [sys.executable, "-m", "bench.null_s3", str(port), *([str(keep)] if keep else [])]
    with serving(command, port) as endpoint:
        yield endpoint
