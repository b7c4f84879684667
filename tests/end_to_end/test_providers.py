"""Whole backups on providers that are narrow: segments, settings of what is written, and ``doctor``."""

from __future__ import annotations

import datetime as dt
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.faults import Fault, FaultPlan, FaultProxy
from backhaul.testing.providers import ProviderProxy, ProviderRules
from backhaul.testing.s3_proxy import S3Proxy, S3Request
from backhaul.testing.servers import MotoS3, RcloneS3, SeaweedFS, SmallS3, s3_client, s3_environment, tool
from tests.conftest import Cli, keys, open_uploads


@pytest.fixture(params=[MotoS3, RcloneS3])
def small(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SmallS3]:
    server: SmallS3 = request.param(tmp_path / "server")
    server.start()
    try:
        yield server
    finally:
        server.kill()


def test_a_backup_in_segments(cli: Cli, s3: Any, bucket: str) -> None:
    """Three parts an upload: 80 MB are several objects, one backup, and ``cat`` puts them together."""
    content = b"".join(random_bytes(50_000_000)) + b"".join(dump_text(60_000_000))
    url = f"s3://{bucket}/app?provider=generic&max-parts=3"
    result = cli.ok("push", url, "--json", input=content).json
    (destination,) = result["destinations"]
    names = sorted(key.rpartition("/")[2] for key in keys(s3, bucket))
    assert names == ["data.zst.0001", "data.zst.0002", "manifest.json"]
    assert destination["objects"] == 2
    assert cli.ok("pull", "-q", url).out == content
    # Any reader of the series, whatever it takes the provider for.
    assert cli.ok("pull", "-q", f"s3://{bucket}/app").out == content
    (backup,) = cli.ok("list", url, "--json").json["backups"]
    assert backup["streams"] == ["data"]
    assert backup["stored_size"] == result["stored_size"]
    shown = cli.ok("show", url).out.decode()
    assert "2 objects, data.zst.0001 to data.zst.0002" in shown
    assert cli.ok("verify", "--deep", url).code == 0
    whole = b"".join(
        s3.get_object(Bucket=bucket, Key=f"app/{backup['id']}/{name}")["Body"].read() for name in names[:-1]
    )
    plain = subprocess.run(["zstd", "-d", "-c", "-q"], input=whole, capture_output=True, check=True).stdout
    assert plain == content
    # Each is decodable alone: a segment ends where a frame ends.
    second = s3.get_object(Bucket=bucket, Key=f"app/{backup['id']}/{names[1]}")["Body"].read()
    tail = subprocess.run(["zstd", "-d", "-c", "-q"], input=second, capture_output=True, check=True).stdout
    assert content.endswith(tail) and tail

    s3.delete_object(Bucket=bucket, Key=f"app/{backup['id']}/{names[1]}")
    for command in (("pull", url, "-o", "out"), ("verify", url), ("verify", "--deep", url)):
        broken = cli(*command)
        assert broken.code == 1
        assert names[1] in broken.err, "the segment that is missing is named"


def test_a_push_that_fails_takes_all_segments_back(cli: Cli, s3: Any, bucket: str) -> None:
    script = "head -c 100000000 /dev/urandom; exit 3"
    result = cli("push", f"s3://{bucket}/app?provider=generic&max-parts=3", "--", "sh", "-c", script)
    assert result.code == 1
    assert keys(s3, bucket) == []
    assert open_uploads(s3, bucket) == []


@pytest.mark.parametrize("provider", ["b2", "gcs"])
def test_a_provider_whose_etags_say_nothing_of_the_bytes(
    cli: Cli, seaweed: SeaweedFS, bucket: str, provider: str
) -> None:
    """No checksums, ETags that are no MD5s: verify tells the object that was committed, and --deep its bytes."""
    rules = ProviderRules(checksums=False, conditional_writes="ignored", part_copies=False, opaque_etags=True)
    content = b"".join(random_bytes(20_000_000))
    with ProviderProxy(seaweed.endpoint, rules) as proxy:
        url = f"s3://{bucket}/app?endpoint={proxy.endpoint}&provider={provider}"
        cli.ok("push", url, "-q", input=content)
        checks = cli.ok("verify", url, "--json").json["checks"]
        assert "checksum" not in {check["check"] for check in checks}
        assert {check["state"] for check in checks} == {"ok"}
        assert cli.ok("verify", "--deep", url).code == 0
        assert cli.ok("pull", "-q", url).out == content
        assert proxy.refusals == []


def test_damage_on_the_way_to_a_server_that_checks_nothing(cli: Cli, tmp_path: Path) -> None:
    """moto takes a wrong MD5 without a word: the ETag that comes back tells, and the part is sent again."""
    server = MotoS3(tmp_path / "server")
    server.start()
    try:
        client = s3_client(server.endpoint)
        client.create_bucket(Bucket="weak")
        client.close()
        plan = FaultPlan(corrupt_request=Fault(only=lambda r: r.operation == "UploadPart", limit=2))
        content = b"".join(random_bytes(30_000_000))
        with FaultProxy(server.endpoint, plan) as proxy:
            environment = s3_environment(proxy.endpoint)
            (destination,) = cli.ok("push", "s3://weak/app", "--json", input=content, env=environment).json[
                "destinations"
            ]
            assert proxy.injected["corrupt_request"] == 2
            assert destination["retries"] >= 2
        assert cli.ok("pull", "-q", "s3://weak/app", env=s3_environment(server.endpoint)).out == content
    finally:
        server.kill()


def test_weak_servers_hold_whole_backups(cli: Cli, small: SmallS3) -> None:
    environment = s3_environment(small.endpoint)
    client = s3_client(small.endpoint)
    client.create_bucket(Bucket="weak")
    content = b"".join(random_bytes(30_000_000))
    cli.ok("push", "s3://weak/app", "-q", input=content, env=environment)
    assert cli.ok("pull", "-q", "s3://weak/app", env=environment).out == content
    for deep in ((), ("--deep",)):
        assert cli.ok("verify", "s3://weak/app", *deep, env=environment).code == 0
    diagnosis = cli.ok("doctor", "s3://weak/app", "--json", env=environment).json
    lacking = {each["name"]: each for each in diagnosis["diagnoses"] if each["state"] != "ok"}
    assert any("CRC64NVME" in name for name in lacking), "it accepts wrong checksums"
    assert all(each["cost"] or "could not be found out" in each["detail"] for each in lacking.values()), lacking
    assert diagnosis["left"] == []
    cli.ok("clean", "--older-than", "0s", "s3://weak/app", env=environment)
    assert len(keys(client, "weak")) == 1 + len([key for key in keys(client, "weak") if "data" in key])
    client.close()


SETTINGS = """
[stores.vault]
url = "s3://BUCKET/db"
storage-class = "STANDARD_IA"
sse = "AES256"
tags = { team = "db" }
retain-until = "30d"
lock-mode = "compliance"
"""


class Recording(S3Proxy):
    """Keeps the headers of what is written; asks the server for nothing that it lacks."""

    def __init__(self, upstream: str) -> None:
        super().__init__(upstream)
        self.written: dict[str, dict[str, str]] = {}

    def edit(self, request: S3Request) -> Mapping[str, str]:
        asked = ("x-amz-object-lock", "x-amz-storage-class", "x-amz-tagging", "x-amz-server-side")
        if request.operation in ("PutObject", "CreateMultipartUpload"):
            self.written[request.key] = {k: v for k, v in request.headers.items() if k.startswith(asked)}
        return {k: v for k, v in super().edit(request).items() if not k.startswith(asked)}


def test_what_is_written_asks_for_what_was_set(cli: Cli, seaweed: SeaweedFS, bucket: str, tmp_path: Path) -> None:
    """Storage class of the stream alone; tags, encryption and lock of the manifest too; of the claim, encryption."""
    config = tmp_path / "config.toml"
    config.write_text(SETTINGS.replace("BUCKET", bucket))
    with Recording(seaweed.endpoint) as proxy:
        environment = {"AWS_ENDPOINT_URL": proxy.endpoint}
        for size, stream in ((100, "small"), (20_000_000, "large")):
            arguments = ("--config", str(config), "push", f"vault:{stream}", "-q")
            cli.ok(*arguments, input=b"".join(random_bytes(size)), env=environment)
        assert len(proxy.written) == 6
        for key, asked in proxy.written.items():
            until = asked.pop("x-amz-object-lock-retain-until-date", None)
            assert asked.pop("x-amz-server-side-encryption") == "AES256"
            assert asked.pop("x-amz-storage-class", None) == ("STANDARD_IA" if "data" in key else None)
            if "claim" in key:
                assert (until, asked) == (None, {}), "a claim is deleted again"
                continue
            assert asked == {"x-amz-tagging": "team=db", "x-amz-object-lock-mode": "COMPLIANCE"}
            days = (dt.datetime.fromisoformat(str(until)) - dt.datetime.now(dt.UTC)).total_seconds() / 86400
            assert 29.9 < days < 30.1


def test_what_is_written_has_what_was_set(cli: Cli, tmp_path: Path) -> None:
    """The same, asked of a server that keeps it. (moto forgets the lock of uploads in parts.)"""
    server = MotoS3(tmp_path / "server")
    server.start()
    try:
        environment = s3_environment(server.endpoint)
        client = s3_client(server.endpoint)
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        config = tmp_path / "config.toml"
        config.write_text(SETTINGS.replace("BUCKET", "locked"))
        cli.ok("--config", str(config), "push", "vault:small", "-q", input=b"content", env=environment)
        assert sorted(key.rpartition("/")[2] for key in keys(client, "locked")) == ["data.zst", "manifest.json"]
        for key in keys(client, "locked"):
            head = client.head_object(Bucket="locked", Key=key)
            assert head.get("StorageClass", "STANDARD") == ("STANDARD_IA" if "data" in key else "STANDARD")
            assert head["ServerSideEncryption"] == "AES256"
            assert head["ObjectLockMode"] == "COMPLIANCE"
            tags = client.get_object_tagging(Bucket="locked", Key=key)["TagSet"]
            assert tags == [{"Key": "team", "Value": "db"}]
        wrong = cli("push", "s3://locked/x?provider=r2&retain-until=1d", "--", "echo", "x", env=environment)
        assert wrong.code == 10
        assert "object lock" in wrong.err
        client.close()
    finally:
        server.kill()


def test_doctor_leaves_nothing_and_ends_with_what_it_found(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    good = cli.ok("doctor", f"s3://{bucket}/app")
    assert "SeaweedFS" in good.out.decode()
    assert "✗" not in good.out.decode()
    assert keys(s3, bucket) == []
    assert open_uploads(s3, bucket) == []
    wrong = cli("doctor", f"s3://{bucket}/app?retain-until=30d")
    assert wrong.code == 10
    assert "object lock" in wrong.err
    for store, code in ((f"s3://{bucket}-none", 10), ("s3://x?endpoint=http://127.0.0.1:1", 1)):
        result = cli("doctor", store)
        assert result.code == code, result.err
        assert "next:" in result.err
    assert "does not exist" in cli.ok("doctor", str(tmp_path / "none")).out.decode()
    assert not (tmp_path / "none").exists()


def test_doctor_says_where_a_profile_is_wrong(cli: Cli, seaweed: SeaweedFS, s3: Any, bucket: str) -> None:
    rules = ProviderRules(equal_parts=True, checksums=False, conditional_writes="refused", part_copies=False)
    with ProviderProxy(seaweed.endpoint, rules) as proxy:
        result = cli("doctor", f"s3://{bucket}/app?endpoint={proxy.endpoint}&provider=aws", "--json")
        assert result.code == 10
        problems = {each["name"]: each for each in result.json["diagnoses"] if each["state"] == "problem"}
        assert "parts of different sizes" in problems
        assert any("CRC64NVME" in name for name in problems)
        assert any("only if absent" in name for name in problems)
        assert any("copies ranges" in name for name in problems)
        assert all(each["cost"] and each["todo"] for each in problems.values())
        assert cli.ok("doctor", f"s3://{bucket}/app?endpoint={proxy.endpoint}&provider=generic").code == 0
    assert keys(s3, bucket) == []
    assert open_uploads(s3, bucket) == []


def test_the_programs_that_play_stores_are_there() -> None:
    """A missing server fails a test; it never skips one."""
    assert [Path(tool(name)).exists() for name in ("weed", "rclone", "moto_server", "zstd")] == [True] * 4
