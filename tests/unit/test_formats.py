"""The formats: bytes and text to values and back, and what they refuse."""

from __future__ import annotations

import datetime as dt
import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import ConfigurationError, FormatError, UsageError
from backhaul.formats import manifest as manifest_format
from backhaul.formats import names, seekable
from backhaul.formats.location import parse_location, parse_reference, parse_series
from backhaul.formats.quantities import format_duration, format_size, parse_duration, parse_rate, parse_size
from backhaul.formats.redaction import redact_command, redact_text
from backhaul.formats.seekable import SeekTable
from backhaul.formats.when import When, parse_when
from backhaul.model.manifest import (
    Codec,
    Manifest,
    ProducerRecord,
    RawBytes,
    SeekTablePosition,
    StoredBytes,
    StoreRecord,
    StreamRecord,
    Tool,
)

pytestmark = pytest.mark.unit


# -- seek table --------------------------------------------------------------------------------------------


def table_of(entries: list[tuple[int, int]]) -> SeekTable:
    table = SeekTable()
    for stored, raw in entries:
        table.append(stored, raw)
    return table


@given(st.lists(st.tuples(st.integers(1, 2**32 - 1), st.integers(0, 2**32 - 1)), max_size=50))
def test_seek_table_round_trip(entries: list[tuple[int, int]]) -> None:
    encoded = seekable.encode(table_of(entries))
    assert len(encoded) == seekable.table_size(len(entries))
    decoded = seekable.decode(encoded)
    assert list(zip(decoded.stored_sizes, decoded.raw_sizes, strict=True)) == entries
    assert decoded.stored_size == sum(stored for stored, _ in entries)
    assert decoded.raw_size == sum(raw for _, raw in entries)


def test_seek_table_bytes_are_those_of_the_specification() -> None:
    # Written out by hand from the format's description: two frames, no checksums.
    assert seekable.encode(table_of([(10, 100), (20, 200)])) == bytes.fromhex(
        "5e2a4d18 19000000 0a000000 64000000 14000000 c8000000 02000000 00 b1ea928f".replace(" ", "")
    )


def test_seek_table_with_checksums_is_read() -> None:
    body = struct.pack("<III", 10, 100, 0xDEADBEEF) + struct.pack("<III", 20, 200, 0xFEEDFACE)
    data = (
        struct.pack("<II", seekable.SKIPPABLE_MAGIC, len(body) + 9)
        + body
        + struct.pack("<IBI", 2, 0x80, seekable.SEEKABLE_MAGIC)
    )
    table = seekable.decode(data)
    assert (list(table.stored_sizes), list(table.raw_sizes)) == ([10, 20], [100, 200])


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 1000)), min_size=1, max_size=20), st.data())
def test_seek_table_finds_the_frame_of_every_byte(entries: list[tuple[int, int]], data: st.DataObject) -> None:
    table = table_of(entries)
    offset = data.draw(st.integers(0, table.raw_size - 1))
    frame = table.frame_at(offset)
    assert table.raw_offsets[frame] <= offset < table.raw_offsets[frame + 1]


@given(st.binary(max_size=200))
def test_seek_table_of_noise_is_refused(noise: bytes) -> None:
    with pytest.raises(FormatError):
        seekable.decode(noise)


@pytest.mark.parametrize("position", [0, 4, 8, 24, 28, 29])
def test_seek_table_with_a_changed_byte_is_refused_or_differs(position: int) -> None:
    good = seekable.encode(table_of([(10, 100), (20, 200)]))
    bad = bytearray(good)
    bad[position] ^= 0x44
    try:
        table = seekable.decode(bad)
    except FormatError:
        return
    assert position == 8
    assert list(table.stored_sizes) != [10, 20]


# -- manifest ----------------------------------------------------------------------------------------------


def a_manifest() -> Manifest:
    return Manifest(
        format=manifest_format.FORMAT,
        version=manifest_format.VERSION,
        id="20261121T020000Z",
        started="2026-11-21T02:00:00Z",
        finished="2026-11-21T02:53:00Z",
        host="db7",
        tool=Tool(name="backhaul", version="0.1.0"),
        streams=(
            StreamRecord(
                name="data",
                object="data.zst",
                raw=RawBytes(size=100, blake3="00" * 32),
                stored=StoredBytes(size=50, blake3="11" * 32, crc64nvme="AAAAAAAAAAA="),
                codec=Codec(name="zstd", frame_size=4 << 20, setting="auto"),
                frames=1,
                producer=0,
                store=StoreRecord(etag='"e"'),
                seek_table=SeekTablePosition(offset=25, size=25),
            ),
        ),
        producers=(ProducerRecord(kind="command", command=("pg_dump", "app"), exit_status=0, seconds=3.5),),
    )


def test_manifest_round_trip() -> None:
    manifest = a_manifest()
    encoded = manifest_format.encode(manifest)
    assert manifest_format.decode(encoded, expected_id=manifest.id) == manifest
    assert encoded.count(b"\n") > 20, "a person can read it"


def test_manifest_keeps_what_it_does_not_know() -> None:
    document = json.loads(manifest_format.encode(a_manifest()))
    document["version"] = "1.7"
    document["drills"] = [{"at": "later"}]
    document["streams"][0]["dictionary"] = {"id": 7}
    document["streams"][0]["codec"]["threads"] = 4
    manifest = manifest_format.decode(json.dumps(document).encode())
    assert manifest.streams[0].raw.size == 100
    assert json.loads(manifest_format.encode(manifest)) == document


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda d: d.update(format="other"), id="another format"),
        pytest.param(lambda d: d.update(version="2.0"), id="newer major"),
        pytest.param(lambda d: d.update(version=7), id="version of another type"),
        pytest.param(lambda d: d.update(id="yesterday"), id="no id"),
        pytest.param(lambda d: d.update(id="20261121T020001Z"), id="another id"),
        pytest.param(lambda d: d.pop("streams"), id="no streams"),
        pytest.param(lambda d: d["streams"][0]["raw"].update(size="many"), id="a size that is none"),
    ],
)
def test_manifest_that_is_refused(change: Any) -> None:
    document = json.loads(manifest_format.encode(a_manifest()))
    change(document)
    with pytest.raises(FormatError) as caught:
        manifest_format.decode(json.dumps(document).encode(), where="the/object", expected_id="20261121T020000Z")
    assert "the/object" in caught.value.what
    assert caught.value.why
    assert caught.value.todo


@given(st.binary(max_size=300))
def test_manifest_of_garbage_is_refused(garbage: bytes) -> None:
    with pytest.raises(FormatError):
        manifest_format.decode(garbage)


# -- names and times ---------------------------------------------------------------------------------------


@given(st.datetimes(min_value=dt.datetime(1970, 1, 1), max_value=dt.datetime(9999, 1, 1), timezones=st.just(dt.UTC)))
def test_ids_are_times_and_sort_like_them(time: dt.datetime) -> None:
    whole = time.replace(microsecond=0)
    assert names.parse_backup_id(names.backup_id(time)) == whole
    later = whole + dt.timedelta(seconds=1)
    assert names.backup_id(whole) < names.backup_id(later)


@pytest.mark.parametrize("text", ["20261321T020000Z", "20261121T020000", "２０261121T020000Z", "", "latest"])
def test_what_is_no_id(text: str) -> None:
    assert not names.is_backup_id(text)


@pytest.mark.parametrize("name", ["", "a/b", ".hidden", "-x", "manifest.json", "data.zst", "x.age", "ü", "a" * 101])
def test_stream_names_that_are_refused(name: str) -> None:
    with pytest.raises(UsageError):
        names.check_stream_name(name)


@pytest.mark.parametrize("codec", ["zstd", "none"])
@given(name=st.from_regex(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,30}", fullmatch=True))
def test_stream_objects_are_recognised(codec: str, name: str) -> None:
    try:
        names.check_stream_name(name)
    except UsageError:
        return
    key = names.object_key("20261121T020000Z", names.stream_file(name, codec))
    assert names.parse_key(key) == names.ObjectName("stream", "20261121T020000Z", name)


@pytest.mark.parametrize(
    "key",
    ["README", "20261121T020000Z", "20261121T020000Z/a/b", "x/manifest.json", "20261121T020000Z/.data.zst.0a.partial"],
)
def test_names_of_other_people(key: str) -> None:
    assert names.parse_key(key) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("latest", When()),
        ("20261121T020000Z", When(id="20261121T020000Z")),
        ("2026-11-21", When(at=dt.datetime(2026, 11, 21, 23, 59, 59, 999999, tzinfo=dt.UTC))),
        ("20261121", When(at=dt.datetime(2026, 11, 21, 23, 59, 59, 999999, tzinfo=dt.UTC))),
        ("2026-11-21T04:30", When(at=dt.datetime(2026, 11, 21, 4, 30, tzinfo=dt.UTC))),
        ("2026-11-21 04:30:10+02:00", When(at=dt.datetime(2026, 11, 21, 2, 30, 10, tzinfo=dt.UTC))),
    ],
)
def test_when(text: str, expected: When) -> None:
    assert parse_when(text) == expected


@pytest.mark.parametrize("text", ["", "yesterday", "2026-13-01", "oldest"])
def test_when_that_is_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_when(text)


# -- locations ---------------------------------------------------------------------------------------------


def test_locations() -> None:
    s3 = parse_location("s3://acme/db 7//ö/orders/?endpoint=http://127.0.0.1:9000&region=eu-1&profile=p")
    assert (s3.kind, s3.bucket, s3.path) == ("s3", "acme", "db 7/ö/orders")
    assert (s3.endpoint, s3.region, s3.profile) == ("http://127.0.0.1:9000", "eu-1", "p")
    assert parse_location("/mnt/a b").path == "/mnt/a b"
    assert parse_location("file:///mnt/a").path == "/mnt/a"
    assert parse_location("./a:b").kind == "local"


@pytest.mark.parametrize(
    "text", ["", "s3://", "s3://bucket", "s3://b/../x", "http://x/y", "file://x", "s3://b/x?secret=1", "a\0b"]
)
def test_locations_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(text)
    assert caught.value.todo


def test_a_store_that_no_config_names() -> None:
    with pytest.raises(ConfigurationError, match="offsite"):
        parse_location("offsite:db7/orders")


def test_a_whole_series_is_not_one_backup() -> None:
    assert parse_series("/b/me@home").path == "/b/me@home"
    for text in ("s3://b/x@latest", "/b/x@2026-11-21", "/b/x@20261121T020000Z"):
        with pytest.raises(UsageError) as caught:
            parse_series(text)
        assert text.partition("@")[0] in caught.value.todo


@pytest.mark.parametrize("text", ["s3:/b/x", "s3//b/x", "s3:b/x"])
def test_what_is_almost_s3(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_location(text)
    assert "s3://b/x" in caught.value.todo


def test_references() -> None:
    assert parse_reference("/b/orders@20261121T020000Z")[1].id == "20261121T020000Z"
    location, when = parse_reference("/b/me@home@latest")
    assert (location.path, when) == ("/b/me@home", When())
    assert parse_reference("/b/me@home/orders")[0].path == "/b/me@home/orders"
    with pytest.raises(UsageError, match="home") as caught:
        parse_reference("/b/me@home")
    assert "@latest" in caught.value.todo


# -- quantities --------------------------------------------------------------------------------------------


def test_quantities() -> None:
    assert parse_size("40M") == 40_000_000
    assert parse_size("1.5GiB") == 3 << 29
    assert parse_rate("40MB/s") == 40_000_000
    assert parse_duration("1h30m") == 5400
    assert parse_duration("0s") == 0
    assert format_size(0) == "0 B"
    assert format_size(999) == "999 B"
    assert format_size(1_234_567) == "1.23 MB"
    assert format_size(48.8 * (1 << 40)) == "53.7 TB"
    assert format_duration(0.44) == "0.4 s"
    assert format_duration(3599.7) == "1 h 00 min"
    assert format_duration(100_000) == "1 d 3 h"


@pytest.mark.parametrize("text", ["", "M", "-1M", "1X", "1 000", "0", "0.1"])
def test_rates_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_rate(text)


@pytest.mark.parametrize("text", ["", "24", "h", "-1h", "1y", "1h 30"])
def test_durations_that_are_refused(text: str) -> None:
    with pytest.raises(UsageError):
        parse_duration(text)


@given(st.floats(0, 1e15))
def test_sizes_for_people_are_short(size: float) -> None:
    assert len(format_size(size)) <= 9


# -- secrets -----------------------------------------------------------------------------------------------

SECRETS = [
    ["mysqldump", "-uroot", "-phunter2", "app"],
    ["/usr/bin/mariadb-dump", "--password=hunter2", "app"],
    ["tool", "--password", "hunter2", "app"],
    ["tool", "--api-key=hunter2"],
    ["pg_dump", "postgresql://me:hunter2@db/app"],
    ["pg_dump", "host=db password=hunter2 dbname=app"],
    ["pg_dump", "host=db password='hunter2 x' dbname=app"],
    ["env", "PGPASSWORD=hunter2", "pg_dump", "app"],
    ["sh", "-c", "PGPASSWORD=hunter2 pg_dump app | gzip"],
    ["sh", "-c", "mysqldump -phunter2 app"],
    ["sh", "-c", "tool --secret hunter2 --verbose"],
    ["curl", "-u", "me:hunter2", "http://x"],
    ["env", "AWS_SECRET_ACCESS_KEY=hunter2", "tool"],
    ["redis-cli", "-u", "redis://:hunter2@host/0"],
    ["redis-cli", "-a", "hunter2", "--rdb", "-"],
    ["sshpass", "-p", "hunter2", "ssh", "db"],
    ["mongodump", "-u", "me", "-p", "hunter2"],
    ["curl", "-ume:hunter2", "http://x"],
    ["sh", "-c", "curl -u me:hunter2 http://x"],
    ["curl", "-H", "Authorization: Bearer hunter2", "http://x"],
    ["openssl", "enc", "-k", "hunter2"],
    ["openssl", "enc", "-pass", "pass:hunter2"],
    ["sqlplus", "scott/hunter2@db"],
    ["pg_dump", "postgresql://me:s3c/r@hunter2@db/app"],
    ["tool", "--password=s3 hunter2"],
    ["tool", "--password", "-hunter2"],
]


@pytest.mark.parametrize("command", SECRETS, ids=lambda c: " ".join(c)[:40])
def test_secrets_are_masked(command: list[str]) -> None:
    masked = redact_command(command)
    assert "hunter2" not in " ".join(masked)
    assert masked[0] == command[0]
    assert "***" in " ".join(masked)
    assert len(masked) == len(command)


@pytest.mark.parametrize(
    "command",
    [
        ["pg_dump", "-Fc", "-Z0", "-p", "5433", "app"],
        ["mariadb-dump", "--single-transaction", "-p", "app"],
        ["tar", "-cf", "-", "passwords/"],
        ["pg_dump", "postgresql://me@db/app"],
        ["sh", "-c", "pg_dump app | head -c 100"],
    ],
)
def test_what_is_no_secret_is_left(command: list[str]) -> None:
    assert redact_command(command) == tuple(command)


def test_the_key_that_hosts_share_is_masked_wherever_it_stands() -> None:
    text = redact_text("sh -c 'echo BACKHAUL-SHARED-KEY-1 12nHanOVwZ6ASTQKmZ6FLKC4qICRwuf05KUNJrfIhec= > key'")
    assert "12nHan" not in text
    assert "BACKHAUL-SHARED-KEY-1 ***" in text
