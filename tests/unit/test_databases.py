"""What databases need and no server: URLs, packing, SQL scripts, checksums, records, scripts on their way."""

from __future__ import annotations

import datetime as dt
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backhaul.databases.mariadb import MariaDBFacts, _global_privileges
from backhaul.databases.postgresql import quoted_always, unquoted
from backhaul.databases.prerequisites import Prerequisites, read_password, shortened
from backhaul.databases.proofs import compare_counts
from backhaul.databases.redis import DumpChecker
from backhaul.databases.temporary import OwnDirectory
from backhaul.errors import ConfigurationError, FormatError, SourceError, UsageError
from backhaul.formats import drill as drill_format
from backhaul.formats import manifest as manifest_format
from backhaul.formats.names import check_stream_name, parse_key
from backhaul.formats.source_url import is_source_url, parse_source_url
from backhaul.formats.sql_script import split_statements
from backhaul.model.drill import PROVED, DrillCheck, DrillRecord
from backhaul.model.manifest import DatabaseRecord, SourceRecord, StreamPart, TableRecord
from backhaul.planning.packing import MAX_PACKED, SMALL_TABLE, pack_tables
from backhaul.sources.base import unique_names
from backhaul.sources.postgresql import is_chatter
from backhaul.targets.mariadb import _Script
from tests.unit.test_formats import a_manifest

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("postgresql:///app", {"kind": "postgresql", "database": "app", "host": "", "port": None}),
        (
            "postgres://u%40x@h:5433/a%2Fb?sslmode=require",
            {"user": "u@x", "host": "h", "port": 5433, "database": "a/b"},
        ),
        ("postgresql://", {"kind": "postgresql", "database": ""}),
        ("postgresql+physical://h", {"kind": "postgresql+physical", "host": "h"}),
        ("mysql://root@/app?socket=/s", {"kind": "mariadb", "user": "root", "options": {"socket": "/s"}}),
        ("sqlite:///tmp/f.db", {"kind": "sqlite", "path": "/tmp/f.db"}),
        ("sqlite:////tmp/f%20g.db", {"kind": "sqlite", "path": "/tmp/f g.db"}),
        ("redis://:6380", {"kind": "redis", "port": 6380}),
        ("rediss://h", {"kind": "redis", "tls": True}),
        ("redis+unix:///run/r.sock", {"kind": "redis", "path": "/run/r.sock"}),
        ("dir:///a/b", {"kind": "dir", "path": "/a/b"}),
        ("file:///a", {"kind": "file", "path": "/a"}),
        ("a/relative path", {"kind": "file", "path": "a/relative path"}),
        ("postgresql:///a?password-file=/p", {"password_file": "/p", "options": {}}),
    ],
)
def test_urls(text: str, expected: dict[str, Any]) -> None:
    url = parse_source_url(text)
    assert {name: getattr(url, name) for name in expected} == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nosuch://x",
        "s3://bucket/x",
        "postgresql://u:geheim@h/d",
        "postgresql://h/d?password=geheim",
        "postgresql://h/d?sslpassword=geheim",
        "postgresql+physical://h/db",
        "postgresql://h:port/d",
        "sqlite://f.db",
        "dir://host/path",
        "sqlite:///f?unknown=1",
        "redis://h?x=1",
        "redis://h/5",
        "mariadb+physical://root@/shop",
    ],
)
def test_urls_that_are_none(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_source_url(text)
    assert "geheim" not in str(caught.value)
    assert caught.value.todo


def test_a_store_is_no_source() -> None:
    assert not is_source_url("s3://bucket/x")
    assert not is_source_url("/a/path")
    assert is_source_url("postgresql:///a")


@given(st.dictionaries(st.text(min_size=1, max_size=5), st.integers(0, 1 << 40), max_size=600), st.integers(1, 8))
def test_packing(sizes: dict[str, int], streams: int) -> None:
    bins = pack_tables(list(sizes.items()), streams)
    named = [name for names in bins for name in names]
    assert bins[0] == []  # the rest, whatever it is
    assert 1 <= len(bins) <= streams
    assert all(bins[1:])
    assert len(named) == len(set(named)) <= MAX_PACKED
    assert all(sizes[name] >= SMALL_TABLE for name in named)


def test_packing_balances() -> None:
    sizes = [(f"t{n}", (n + 1) * SMALL_TABLE) for n in range(40)] + [("small", 5)]
    bins = pack_tables(sizes, 4)
    by_name = dict(sizes)
    named = {name for names in bins for name in names}
    rest = sum(size for name, size in sizes if name not in named)
    loads = [rest, *(sum(by_name[name] for name in names) for names in bins[1:])]
    assert max(loads) <= 1.1 * min(loads)


@given(st.lists(st.text(max_size=80), max_size=20))
def test_names_of_streams(texts: list[str]) -> None:
    names = unique_names(texts)
    assert len({name.lower() for name in names}) == len(texts)
    for name in names:
        check_stream_name(f"{name}.data-1")


@given(st.text(max_size=200), st.text(max_size=200))
def test_names_that_are_cut_stay_apart(one: str, two: str) -> None:
    assert len(shortened(one, 40).encode()) <= 40
    if one != two:
        assert shortened(one, 40) != shortened(two, 40)


def test_statements() -> None:
    script = """-- a comment; with a semicolon
\\restrict abc
CREATE ROLE "x;y";
ALTER ROLE a WITH PASSWORD 'SCRAM$4096:a;b''c';
COMMENT ON ROLE a IS 'two
lines; one statement';
COMMENT ON ROLE b IS E'a\\';b';
DO $x$ begin; end; $x$;
\\unrestrict abc
"""
    found = list(split_statements(script))
    assert len(found) == 5
    assert found[0] == 'CREATE ROLE "x;y"'
    assert found[2].endswith("lines; one statement'")
    assert found[4].startswith("DO $x$")


def test_names_of_tables() -> None:
    assert unquoted('public."a.b"') == ("public", "a.b")
    assert unquoted('"Gr ""x"".y".t') == ('Gr "x".y', "t")
    assert quoted_always('public."a.b"') == '"public"."a.b"'


def test_chatter_of_postgresql() -> None:
    assert is_chatter(b'pg_dump: dumping contents of table "public.t"')
    assert not is_chatter(b"pg_dump: error: something")
    assert not is_chatter(b"pg_restore: warning: errors ignored on restore: 1")
    assert not is_chatter(b"perl: cannot set locale")


def test_privileges_of_mariadb() -> None:
    grants = ["GRANT SELECT, RELOAD, SHOW VIEW ON *.* TO `a`@`%`", "GRANT ALL PRIVILEGES ON `db`.* TO `a`@`%`"]
    assert _global_privileges(grants) == {"SELECT", "RELOAD", "SHOW VIEW"}
    assert "ALL PRIVILEGES" in _global_privileges(["GRANT ALL PRIVILEGES ON *.* TO `r`@`l` WITH GRANT OPTION"])


def test_privileges_on_one_database() -> None:
    facts = MariaDBFacts(
        version="10.11.1",
        user="a@b",
        variables={},
        privileges=frozenset({"RELOAD"}),
        grants=(
            "GRANT RELOAD ON *.* TO `a`@`b`",
            "GRANT ALL PRIVILEGES ON `shop\\_1`.* TO `a`@`b`",
            "GRANT SELECT ON `x`.* TO `a`@`b`",
        ),
    )
    assert facts.may("EVENT", "shop_1")
    assert facts.may("SELECT", "x")
    assert not facts.may("EVENT", "x")
    assert facts.may("RELOAD", "anything")


def dump_of_redis(body: bytes) -> bytes:
    import anycrc

    content = b"REDIS0010" + body + b"\xff"
    return content + int(anycrc.Model("CRC64-REDIS").calc(content)).to_bytes(8, "little")


@given(st.binary(max_size=300), st.integers(1, 50))
def test_dumps_of_redis(body: bytes, step: int) -> None:
    content = dump_of_redis(body)
    checker = DumpChecker()
    for start in range(0, len(content), step):
        checker.feed(content[start : start + step])
    assert checker.check("r").startswith("CRC-64")
    assert checker.size == len(content)


@given(st.binary(min_size=20, max_size=100), st.data())
def test_dumps_of_redis_that_are_damaged(body: bytes, data: Any) -> None:
    content = bytearray(dump_of_redis(body))
    content[data.draw(st.integers(0, len(content) - 9))] ^= 1 << data.draw(st.integers(0, 7))
    cut = data.draw(st.sampled_from([len(dump_of_redis(body)), len(content) - 1, 5, 0]))
    checker = DumpChecker()
    checker.feed(bytes(content[:cut]))
    with pytest.raises(SourceError):
        checker.check("r")


def test_a_dump_of_redis_without_a_checksum() -> None:
    checker = DumpChecker()
    checker.feed(b"REDIS0010" + b"x" * 20 + b"\xff" + bytes(8))
    assert "rdbchecksum" in checker.check("r")


class _Sink:
    name = "sink"

    def __init__(self) -> None:
        self.content = bytearray()

    def start(self, raw_size: int, group: object) -> None: ...

    def write(self, data: memoryview) -> None:
        self.content += data

    def commit(self) -> None: ...

    def abort(self) -> None: ...


SCRIPT = (
    b"/*!40101 SET NAMES utf8mb4 */;\n"
    + b"".join(
        b"\n--\n-- Dumping data for table `%s`\n--\n\nINSERT INTO `%s` VALUES (1,'-- Dumping data for table `a`');\n"
        % (n, n)
        for n in (b"a", b"b c", b"d``e")
    )
    + b"/*!40103 SET TIME_ZONE=@OLD_TIME_ZONE */;\n-- Dump completed on 2026\n"
)


@given(st.integers(1, len(SCRIPT)))
def test_a_script_on_its_way(step: int) -> None:
    tables: list[str] = []
    sink = _Sink()
    script = _Script(sink, tables.append, ())  # type: ignore[arg-type]
    for start in range(0, len(SCRIPT), step):
        script.write(memoryview(SCRIPT[start : start + step]))
    script.commit()
    assert bytes(sink.content) == SCRIPT
    assert tables == ["a", "b c", "d``e"]


@given(st.integers(1, len(SCRIPT)))
def test_a_script_of_which_one_table_is_wanted(step: int) -> None:
    sink = _Sink()
    script = _Script(sink, lambda name: None, ["b c"])  # type: ignore[arg-type]
    for start in range(0, len(SCRIPT), step):
        script.write(memoryview(SCRIPT[start : start + step]))
    script.commit()
    content = bytes(sink.content)
    assert b"INSERT INTO `b c`" in content
    assert b"INSERT INTO `a`" not in content
    assert b"INSERT INTO `d``e`" not in content
    assert content.startswith(b"/*!40101 SET NAMES")
    assert content.endswith(b"-- Dump completed on 2026\n")


def test_prerequisites_are_one_list() -> None:
    missing = Prerequisites("It")
    missing.require()
    missing.add("a", "why a", "do a")
    with pytest.raises(ConfigurationError) as one:
        missing.require()
    assert (one.value.what, one.value.why, one.value.todo) == ("It needs a", "why a", "do a")
    missing.add("b", "why b", "do b")
    with pytest.raises(ConfigurationError) as two:
        missing.require()
    assert "a: why a\nb: why b" in two.value.why
    assert two.value.todo == "do a\ndo b"
    assert missing.program("no-such-program-anywhere") is None


def test_password_files(tmp_path: Path) -> None:
    path = tmp_path / "p"
    path.write_text("geheim \nrest\n")
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="640"):
        read_password(str(path))
    path.chmod(0o600)
    assert read_password(str(path)) == "geheim "
    path.write_text("\n")
    with pytest.raises(ConfigurationError):
        read_password(str(path))
    with pytest.raises(ConfigurationError):
        read_password(str(tmp_path / "none"))


def test_what_dead_runs_left_is_collected(tmp_path: Path) -> None:
    living = OwnDirectory("x-", str(tmp_path))
    dead = OwnDirectory("x-", str(tmp_path))
    (dead.path / "data").write_text("clear")
    os.close(dead._descriptor)  # as a kill would
    dead._descriptor = -1
    other = OwnDirectory("x-", str(tmp_path))
    assert living.path.exists()
    assert not dead.path.exists()
    living.remove()
    other.remove()
    assert list(tmp_path.iterdir()) == []


def tables(*rows: int | None, apart: bool = False) -> list[TableRecord]:
    return [TableRecord(name=f"t{number}", rows=count, apart=apart) for number, count in enumerate(rows)]


def test_counts_that_differ_are_found() -> None:
    assert compare_counts("d", tables(1, 2), {"t0": 1, "t1": 2}).state == "ok"
    wrong = compare_counts("d", tables(1, 2), {"t0": 1, "t1": 3})
    assert wrong.state == "failed"
    assert "t1 has 3 rows, 2 were backed up" in wrong.detail
    assert compare_counts("d", tables(1, 2), {"t0": 1}).state == "failed"
    assert compare_counts("d", tables(None), {}).state == "failed"  # a table that is gone, counted or not
    assert compare_counts("d", tables(None), {"t0": "it is damaged"}).state == "failed"
    assert compare_counts("d", tables(None), {"t0": 7}).state == "skipped"
    assert compare_counts("d", tables(5, apart=True), {"t0": 7}).state == "skipped"


def test_records_of_drills() -> None:
    record = DrillRecord(
        format=drill_format.FORMAT,
        version=drill_format.VERSION,
        id="20261121T020000Z",
        started="2026-11-21T03:00:00Z",
        finished="2026-11-21T03:10:00Z",
        host="h",
        tool="backhaul",
        result=PROVED,
        seconds={"restore": 1.5},
        checks=(DrillCheck(name="n", state="ok"),),
    )
    assert drill_format.decode(drill_format.encode(record), where="x") == record
    key = drill_format.drill_key(record.id, dt.datetime(2026, 11, 21, 3, tzinfo=dt.UTC))
    assert key == "20261121T020000Z/drill-20261121T030000Z.json"
    name = parse_key(key)
    assert name is not None
    assert name.kind == "record"
    for wrong in (b"", b"[]", drill_format.encode(record).replace(b'"1.0"', b'"2.0"'), b'{"format": "backhaul-drill"}'):
        with pytest.raises(FormatError):
            drill_format.decode(wrong, where="x")


def test_a_source_in_a_manifest() -> None:
    source = SourceRecord(
        kind="postgresql",
        server="15.1",
        address="h:5432",
        state_of="2026-11-21T02:00:00Z",
        coordinates={"lsn": "0/1"},
        databases=(DatabaseRecord(name="a", tables=(TableRecord(name="public.t", rows=3),), needs={"roles": ("r",)}),),
    )
    plain = a_manifest()
    streams = tuple(msgspec.structs.replace(s, part=StreamPart(section="data", database="a")) for s in plain.streams)
    manifest = msgspec.structs.replace(plain, source=source, streams=streams)
    text = manifest_format.encode(manifest)
    assert manifest_format.decode(text) == manifest
    # What a newer version adds inside is kept where it was.
    newer = text.replace(b'"kind": "postgresql"', b'"kind": "postgresql", "later": {"x": [1]}')
    again = manifest_format.encode(manifest_format.decode(newer))
    assert b'"later"' in again
