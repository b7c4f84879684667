"""What a command loads before it works: every module here is time that a person, or cron, waits for.

Modules are counted, since times differ from host to host. What is heavy, and how heavy: docs/BENCHMARKS.md.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import botocore.exceptions
import botocore.loaders
import pytest

from backhaul.model.location import Location
from backhaul.stores.s3 import client
from backhaul.stores.s3.client import new_session
from backhaul.testing.s3_proxy import S3Proxy
from backhaul.testing.servers import SeaweedFS, s3_environment

# Loaded only by what uses them; each takes 10 to 100 ms.
_NEVER = {
    "asyncio",
    "apprise",
    "boto3",
    "email.mime",
    "jinja2",
    "multiprocessing",
    "psycopg",
    "pymysql",
    "requests",
    "s3transfer",
    "smtplib",
    "sqlite3",
    "starlette",
    "uvicorn",
    "backhaul.databases",
    "backhaul.jobs",
    "backhaul.network",
    "backhaul.operations.fan_out",
    "backhaul.operations.mirror",
    "backhaul.reporting",
    "backhaul.testing",
}
_S3 = {"awscrt", "botocore", "urllib3", "dateutil", "backhaul.stores.s3"}
_WORK = {"awscrt", "blake3", "zstandard", "cryptography", "backhaul.operations.push", "backhaul.stores.local"}
NOTHING: Mapping[str, str] = {}
_RUN = """
import json, sys
from backhaul.cli.main import run
status = run(sys.argv[1:])
sys.stdout.flush()
print(json.dumps([status, sorted(sys.modules)]), file=sys.stderr)
"""

_LEFT = """
import atexit, gc
from backhaul.cli.main import main
atexit.register(lambda: print(len(gc.get_objects()), gc.get_freeze_count()))
main(["--version"])
"""


def loaded(*arguments: str, stdin: bytes = b"", environment: Mapping[str, str] = NOTHING) -> set[str]:
    """Run a command in a process of its own; return the modules that it has loaded at its end."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, *arguments],
        input=stdin,
        capture_output=True,
        env={**os.environ, **environment},
        check=False,
        timeout=60,
    )
    words = done.stderr.decode()
    status, modules = json.loads(words.splitlines()[-1])
    assert status == 0, words
    return set(modules)


def among(modules: set[str], heavy: set[str]) -> list[str]:
    """Return the modules that are heavy, or in a heavy package."""
    return sorted(name for name in modules if any(name == h or name.startswith(h + ".") for h in heavy))


def test_a_command_leaves_nothing_to_be_looked_through_at_its_end() -> None:
    """What botocore alone makes takes 90 ms to look through, for a process whose memory the kernel takes anyway."""
    done = subprocess.run([sys.executable, "-c", _LEFT], capture_output=True, check=True, timeout=60)
    left, frozen = map(int, done.stdout.split()[-2:])
    assert left < 1000 < frozen


@pytest.mark.parametrize("option", ["--version", "--help"])
def test_what_works_on_nothing_loads_nothing_to_work_with(option: str) -> None:
    modules = loaded(option)
    assert among(modules, _NEVER | _S3 | _WORK | {"rich", "ssl", "http.client"}) == []


def test_a_command_loads_no_other_commands() -> None:
    modules = loaded("--version")
    commands = {name for name in modules if name.startswith("backhaul.cli.")}
    assert commands == {"backhaul.cli.command", "backhaul.cli.main", "backhaul.cli.output"}


def test_a_listing_of_a_directory_loads_no_digests(tmp_path: Path) -> None:
    modules = loaded("list", str(tmp_path))
    assert among(modules, _NEVER | _S3 | {"cryptography", "zstandard"}) == []


def test_a_push_to_a_disk_and_back_loads_neither_s3_nor_databases_nor_networks(tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    disk = _S3 - {"awscrt"} | {"rich"}
    assert among(loaded("push", "-q", series, stdin=b"x" * 1024), _NEVER | disk) == []
    assert (
        among(loaded("pull", "-q", series, "-o", str(tmp_path / "back")), _NEVER | disk | {"backhaul.operations.push"})
        == []
    )
    assert (tmp_path / "back").read_bytes() == b"x" * 1024


def test_a_push_to_s3_and_back_loads_no_transfers_and_no_databases_or_networks(
    seaweed: SeaweedFS, bucket: str, tmp_path: Path
) -> None:
    series = f"s3://{bucket}/series"
    assert (
        among(loaded("push", "-q", series, stdin=b"x" * 1024, environment=seaweed.environment), _NEVER | {"rich"}) == []
    )
    back = loaded("pull", "-q", series, "-o", str(tmp_path / "back"), environment=seaweed.environment)
    assert among(back, _NEVER | {"rich", "backhaul.operations.push"}) == []
    assert (tmp_path / "back").read_bytes() == b"x" * 1024


def test_s3_is_described_as_botocore_describes_it() -> None:
    client._models.cache_clear()  # botocore writes into a model when it makes a client of it, its own loader's too
    ours = new_session(Location(text="s3://b/p", kind="s3", bucket="b", path="p")).get_component("data_loader")
    theirs = botocore.loaders.Loader()
    for service in ("s3", "sts"):  # sts is asked for credentials where a profile assumes a role
        for kind in ("service-2", "endpoint-rule-set-1", "paginators-1"):
            assert ours.load_service_model(service, kind) == theirs.load_service_model(service, kind)
    for name in ("endpoints", "partitions", "_retry", "sdk-default-configuration"):
        assert ours.load_data(name) == theirs.load_data(name)
    with pytest.raises(botocore.exceptions.UnknownServiceError):
        ours.load_service_model("s4", "service-2")


def test_models_of_ones_own_count_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "s3" / "2006-03-01"
    model.mkdir(parents=True)
    (model / "waiters-2.json").write_text('{"version": 2, "waiters": {"mine": {}}}')
    monkeypatch.setenv("AWS_DATA_PATH", str(tmp_path))
    session = new_session(Location(text="s3://b/p", kind="s3", bucket="b", path="p"))
    assert session.get_component("data_loader").load_service_model("s3", "waiters-2")["waiters"] == {"mine": {}}


def test_a_listing_asks_once_for_a_thousand_names_and_never_for_a_backup(seaweed: SeaweedFS, bucket: str) -> None:
    connection = seaweed.client()
    with ThreadPoolExecutor(4) as pool:
        ids = [
            f"2026{month:02}{day:02}T{hour:02}0000Z" for month in (1, 2) for day in range(1, 26) for hour in range(12)
        ]
        keys = [f"series/{i}/{file}" for i in ids for file in ("data.zst", "manifest.json")]
        list(pool.map(lambda key: connection.put_object(Bucket=bucket, Key=key, Body=b"x"), keys))
    connection.close()
    with S3Proxy(seaweed.endpoint) as proxy:
        done = subprocess.run(
            [sys.executable, "-m", "backhaul", "list", f"s3://{bucket}/series"],
            capture_output=True,
            env={**os.environ, **s3_environment(proxy.endpoint)},
            check=True,
        )
        assert [line.split()[0].decode() for line in done.stdout.splitlines()] == ["backup", *ids]
        pages = -(-len(keys) // 1000)
        assert proxy.count("ListObjectsV2") == pages == 2
        # (The one other question is which provider it is.)
        assert len(proxy.requests) == pages + 1
