"""A real database into a real S3 store and back, with Backhaul and without it."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from backhaul.testing.servers import PostgreSQL, tool
from tests.conftest import Cli

SCHEMA = """
create extension if not exists plpgsql;
create table customers (id bigint generated always as identity primary key, name text not null, born date);
create table orders (
  id bigserial primary key,
  customer bigint not null references customers,
  placed timestamptz not null default now(),
  total numeric(12,2) not null check (total >= 0),
  tags text[],
  payload jsonb
);
create table "Größe & Maß" (schlüssel text primary key, wert bytea);
create table empty_one (id int);
create index on orders (customer);
create view totals as select customer, sum(total) from orders group by 1;
insert into customers (name, born)
  select 'customer ' || n, date '1950-01-01' + n % 20000 from generate_series(1, 20000) n;
insert into orders (customer, placed, total, tags, payload)
  select 1 + n % 20000, timestamptz '2026-01-01' + n * interval '7 seconds', n % 9000 / 100.0,
         array['a' || n % 7, 'b'], jsonb_build_object('n', n, 'ä', md5(n::text))
  from generate_series(1, 300000) n;
insert into "Größe & Maß" select 'k' || n, decode(md5(n::text), 'hex') from generate_series(1, 5000) n;
"""


@pytest.fixture
def database(postgres: PostgreSQL) -> Iterator[str]:
    names = ("orders", "by_backhaul", "by_hand", "by_psql", "from_damaged")
    for name in names:
        postgres.sql(f"drop database if exists {name}")
    postgres.sql("create database orders")
    postgres.sql(SCHEMA, "orders")
    yield "orders"
    for name in names:
        postgres.sql(f"drop database if exists {name}")


def fingerprint(postgres: PostgreSQL, database: str) -> dict[str, str]:
    """Row count and a checksum of every table's content, and the sequences' state."""
    names = postgres.sql(
        "select format('%I.%I', schemaname, tablename) from pg_tables where schemaname = 'public' order by 1", database
    )
    result = {
        name: postgres.sql(
            f"select count(*), md5(coalesce(string_agg(md5(t::text), '' order by t::text), '')) from {name} t", database
        )
        for name in names.splitlines()
    }
    result["sequences"] = postgres.sql("select sequencename, last_value from pg_sequences order by 1", database)
    return result


def with_postgres(cli: Cli, postgres: PostgreSQL) -> Cli:
    path = os.path.dirname(PostgreSQL.program("pg_dump"))
    return Cli({**cli.environment, **postgres.environment, "PATH": f"{path}:{os.environ['PATH']}"}, cli.directory)


def test_a_database_there_and_back(cli: Cli, postgres: PostgreSQL, bucket: str, database: str) -> None:
    cli = with_postgres(cli, postgres)
    series = f"s3://{bucket}/app"
    before = fingerprint(postgres, database)
    assert len(before) == 5
    backup = cli.ok("push", series, "--json", "--", "pg_dump", "-Fc", "-Z0", database).json["id"]

    postgres.sql("create database by_backhaul")
    cli.ok("pull", series, "--", "pg_restore", "-d", "by_backhaul")
    assert fingerprint(postgres, "by_backhaul") == before

    postgres.sql("create database by_hand")
    pipeline = f"{tool('aws')} s3 cp s3://{bucket}/app/{backup}/data.zst - | {tool('zstd')} -d | pg_restore -d by_hand"
    subprocess.run(["bash", "-o", "pipefail", "-c", pipeline], env=cli.environment, check=True)
    assert fingerprint(postgres, "by_hand") == before

    producer = cli.ok("show", series, "--json").json["manifest"]["producers"][0]
    assert producer["command"] == ["pg_dump", "-Fc", "-Z0", "orders"]
    assert producer["exit_status"] == 0


def test_a_plain_dump_with_its_marker(cli: Cli, postgres: PostgreSQL, bucket: str, database: str) -> None:
    cli = with_postgres(cli, postgres)
    series = f"s3://{bucket}/plain"
    marker = "PostgreSQL database dump complete"
    cli.ok("push", series, "--expect", marker, "--", "pg_dump", database)
    postgres.sql("create database by_psql")
    cli.ok("pull", series, "--", "psql", "-X", "-q", "-v", "ON_ERROR_STOP=1", "-d", "by_psql", "-o", "/dev/null")
    assert fingerprint(postgres, "by_psql") == fingerprint(postgres, database)


def test_a_dump_of_no_such_database(cli: Cli, postgres: PostgreSQL, bucket: str) -> None:
    cli = with_postgres(cli, postgres)
    result = cli("push", f"s3://{bucket}/app", "--json", "--", "pg_dump", "-Fc", "no_such_database")
    assert result.code == 1
    assert "no_such_database" in json.loads(result.out)["why"]
    assert cli.ok("list", f"s3://{bucket}/app", "--json").json["backups"] == []


def test_a_restore_of_a_damaged_backup_leaves_nothing_half(
    cli: Cli, postgres: PostgreSQL, database: str, tmp_path: object
) -> None:
    cli = with_postgres(cli, postgres)
    series = str(cli.directory / "series")
    cli.ok("push", series, "--", "pg_dump", "-Fc", "-Z0", database)
    file = next((cli.directory / "series").rglob("data.zst"))
    content = bytearray(file.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    file.write_bytes(content)
    postgres.sql("create database from_damaged")
    result = cli("pull", series, "--", "pg_restore", "-1", "-d", "from_damaged")
    assert result.code == 1
    assert "data.zst" in result.err
    # One transaction that was never committed: no table appears.
    assert postgres.sql("select count(*) from pg_tables where schemaname = 'public'", "from_damaged") == "0"
