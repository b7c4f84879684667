"""Profiles, settings, named stores and limits by the hour: text in, values or an error in three parts out."""

from __future__ import annotations

import datetime as dt
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import ConfigurationError, StoreRefusedError, UsageError
from backhaul.formats.config import read_stores
from backhaul.formats.location import parse_location, parse_series
from backhaul.formats.profiles import PROFILES, S3_PROVIDERS, profile_of_reply, provider_of_host
from backhaul.formats.timetable import parse_timetable
from backhaul.operations import places
from backhaul.stores.s3.store import S3Store

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("host", "provider"),
    [
        ("s3.eu-west-1.amazonaws.com", "aws"),
        ("s3.amazonaws.com", "aws"),
        ("s3.cn-north-1.amazonaws.com.cn", "aws"),
        ("0123456789abcdef.r2.cloudflarestorage.com", "r2"),
        ("0123456789abcdef.eu.r2.cloudflarestorage.com", "r2"),
        ("s3.us-west-004.backblazeb2.com", "b2"),
        ("s3.eu-central-1.wasabisys.com", "wasabi"),
        ("storage.googleapis.com", "gcs"),
        ("s3.fr-par.scw.cloud", "scaleway"),
        ("bucket.s3.nl-ams.scw.cloud", "scaleway"),
        ("minio.example.com", None),
        ("amazonaws.com.example.org", None),
        ("notamazonaws.com", None),
        ("127.0.0.1", None),
    ],
)
def test_a_provider_is_known_by_its_host(host: str, provider: str | None) -> None:
    assert provider_of_host(host) == provider


@pytest.mark.parametrize(
    ("headers", "provider"),
    [
        ({"server": "MinIO"}, "minio"),
        ({"server": "SeaweedFS 8000GB 4.48"}, "seaweedfs"),
        ({"server": "Ceph Object Gateway (squid)"}, "ceph"),
        ({"x-rgw-object-type": "Normal"}, "ceph"),
        ({"server": "nginx"}, "generic"),
        ({}, "generic"),
    ],
)
def test_a_provider_is_known_by_its_answer(headers: dict[str, str], provider: str) -> None:
    assert profile_of_reply(headers).name == provider


@pytest.mark.parametrize(
    ("server", "safe"), [("SeaweedFS 8000GB 4.48", True), ("SeaweedFS 30GB 4.47", False), ("SeaweedFS", False)]
)
def test_a_seaweedfs_that_loses_data_to_an_abort(server: str, safe: bool) -> None:
    assert profile_of_reply({"server": server}).aborts_safely is safe


def test_settings_in_a_url() -> None:
    location = parse_location(
        "s3://b/p?provider=r2&max-part=64Mi&max-parts=100&timeout=5s&storage-class=STANDARD_IA"
        "&tags=team:db,env:prod&sse=aws:kms&kms-key=k1&retain-until=30d&lock-mode=compliance"
    )
    assert (location.provider, location.max_part, location.max_parts, location.timeout) == ("r2", 64 << 20, 100, 5.0)
    write = location.write
    assert write.storage_class == "STANDARD_IA"
    assert write.tags == (("team", "db"), ("env", "prod"))
    assert (write.encryption, write.kms_key) == ("aws:kms", "k1")
    assert (write.retain, write.retain_until, write.lock_mode) == (30 * 86400.0, None, "COMPLIANCE")
    until = parse_location("s3://b/p?retain-until=2027-01-01").write
    assert (until.retain, until.retain_until) == (None, "2027-01-01T00:00:00+00:00")


@pytest.mark.parametrize(
    "setting",
    [
        "provider=nobody",
        "max-part=1Mi",
        "max-parts=1",
        "max-parts=x",
        "timeout=0s",
        "sse=rot13",
        "kms-key=k",
        "tags=x",
        "retain-until=soon",
        "lock-mode=maybe",
        "lock-mode=compliance",
        "tags=a:b,a:c",
        "password=x",
        "endpoint=http://user:secret@host",
        "region=",
    ],
)
def test_settings_that_make_no_sense(setting: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(f"s3://b/p?{setting}")
    assert caught.value.what and caught.value.why and caught.value.todo


@pytest.mark.parametrize(
    "setting",
    [
        "provider=r2&tags=a:b",
        "provider=r2&retain-until=1d",
        "provider=b2&storage-class=GLACIER",
        "provider=gcs&tags=a:b",
    ],
)
def test_what_a_provider_lacks_is_said_before_the_first_byte(setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_CONFIG_FILE", "/dev/null")
    with pytest.raises(StoreRefusedError):
        S3Store(parse_location(f"s3://b/p?endpoint=http://127.0.0.1:1&{setting}"))


CONFIG = """
[stores.offsite]
url = "s3://acme/backups"
endpoint = "https://s3.example.com"
storage_class = "ONEZONE_IA"
provider = "scaleway"
tags = { team = "db", env = "prod" }
retain-until = 2027-01-01

[stores.bucket]
url = "s3://whole"

[stores.usb]
url = "/mnt/usb"
"""


def test_named_stores() -> None:
    stores = read_stores(CONFIG, "config.toml")
    place = parse_series("offsite:db7/orders", stores)
    assert (place.bucket, place.path, place.endpoint) == ("acme", "backups/db7/orders", "https://s3.example.com")
    assert (place.provider, place.write.storage_class) == ("scaleway", "ONEZONE_IA")
    assert place.write.tags == (("team", "db"), ("env", "prod"))
    assert place.write.retain_until == "2027-01-01T00:00:00+00:00"
    assert place.text == "offsite:db7/orders"
    assert parse_series("bucket:x", stores).path == "x"
    assert parse_series("usb:orders", stores).path == "/mnt/usb/orders"
    for wrong in ("offsite:", "offsite:../x", "nobody:x", "offsite:x?region=y"):
        with pytest.raises((UsageError, ConfigurationError)):
            parse_series(wrong, stores)


def test_every_mistake_of_a_config_is_told_at_once() -> None:
    text = (
        '[stores.a]\nurl = "s3://b/p"\nstorage-clas = "X"\n[stores.b]\n[stores.c]\nurl = "s3://b/p"\nmax-parts = 1\n'
        '[stores.d]\nurl = "/mnt"\nregion = "x"\n'
    )
    with pytest.raises(ConfigurationError) as caught:
        read_stores(text, "config.toml")
    for words in ("[stores.a]", "did you mean storage-class", "[stores.b]", "[stores.c]", "[stores.d]"):
        assert words in caught.value.why
    with pytest.raises(ConfigurationError):
        read_stores("not toml", "config.toml")
    for wrong in ("stores = 1", "[store.a]\nurl = 's3://b/p'", "[stores.'a b']\nurl = 's3://b/p'"):
        with pytest.raises(ConfigurationError):
            read_stores(wrong, "config.toml")


def test_the_config_is_found_and_read_only_when_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "config.toml"
    monkeypatch.setenv(places.CONFIG_VARIABLE, str(file))
    assert places.series_at("s3://b/p").path == "p"
    with pytest.raises(ConfigurationError):
        places.series_at("offsite:x")
    file.write_text(CONFIG)
    assert places.series_at("offsite:x").path == "backups/x"
    assert places.store_at("bucket:").path == ""


@pytest.mark.parametrize("name", S3_PROVIDERS)
def test_every_profile_can_be_named(name: str) -> None:
    assert parse_location(f"s3://b/p?provider={name}").provider == name
    assert PROFILES[name].title


# -- limits by the hour ------------------------------------------------------------------------------------


def at(text: str) -> dt.datetime:
    return dt.datetime.fromisoformat(f"2026-11-21T{text}")


def test_a_limit_by_the_hour() -> None:
    table = parse_timetable("08:00-18:00=5M,22:00-06:00=off,40M")
    rates = {"07:59:59": 40, "08:00:00": 5, "17:59:59": 5, "18:00:00": 40, "22:00:00": None, "05:59:00": None}
    for time, rate in rates.items():
        assert table.rate_at(at(time)) == (rate * 1_000_000 if rate is not None else None), time
    assert table.slowest == 5_000_000
    assert parse_timetable("40M").rate_at(at("12:00:00")) == 40_000_000
    assert parse_timetable("08:00-18:00=5M").rate_at(at("20:00:00")) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "fast",
        "0",
        "08:00=5M",
        "25:00-26:00=5M",
        "08:00-08:00=5M",
        "40M,08:00-18:00=5M",
        "08:00-18:00=",
        "=5M",
        "5M,",
    ],
)
def test_limits_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_timetable(text)
    assert caught.value.todo


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_every_minute_is_in_exactly_one_of_two_halves(start: int, end: int, minute: int) -> None:
    if start == end:
        return
    hours = f"{start // 60:02d}:{start % 60:02d}-{end // 60:02d}:{end % 60:02d}"
    rest = f"{end // 60:02d}:{end % 60:02d}-{start // 60:02d}:{start % 60:02d}"
    time = dt.datetime(2026, 1, 1, minute // 60, minute % 60)
    inside = parse_timetable(f"{hours}=1").rate_at(time)
    outside = parse_timetable(f"{rest}=1").rate_at(time)
    assert [inside, outside].count(1) == 1
