"""Databases with every awkward thing that the dumps of others were seen to lose, and fingerprints of them."""

from __future__ import annotations

import hashlib

from backhaul.testing.servers import MariaDB, PostgreSQL

# Large enough (16 MiB and more) for streams of their own.
POSTGRESQL = r"""
create extension pgcrypto;
create extension pg_trgm;
create schema "Größe & Maß";
create table "Größe & Maß"."t ""q"".x'" (id int primary key, "wért" text);
insert into "Größe & Maß"."t ""q"".x'" select n, 'ü' || n || E'\\\t\n' from generate_series(1, 1000) n;
create type mood as enum ('sad', 'ok', 'happy');
create domain positive as int check (value > 0);
create table events (
  id bigserial primary key, at timestamptz not null, kind mood, amount numeric(20, 4), tags text[], payload jsonb,
  raw bytea, span int4range, doubled numeric generated always as (amount * 2) stored, p positive default 1
);
insert into events (at, kind, amount, tags, payload, raw, span)
  select timestamptz '2026-01-01' + n * interval '1 second', (array['sad', 'ok', 'happy', null])[1 + n % 4]::mood,
         n / 7.0, array['a' || n % 5, null], jsonb_build_object('n', n, 'ä', md5(n::text)),
         decode(md5(n::text), 'hex'), int4range(n, n + 5)
  from generate_series(1, 150000) n;
create index on events using gin (payload);
create index on events (at) where kind = 'happy';
create table wide (id bigint generated always as identity (start with 1000 increment by 7) primary key, v text);
insert into wide (v) select repeat(md5(n::text), 6) from generate_series(1, 120000) n;
create table parts (d date not null, x int) partition by range (d);
create table parts_a partition of parts for values from ('2026-01-01') to ('2026-07-01');
create table parts_b partition of parts for values from ('2026-07-01') to ('2027-01-01') partition by list (x);
create table parts_b1 partition of parts_b for values in (1, 3, 5);
create table parts_b2 partition of parts_b default;
insert into parts select date '2026-01-01' + n % 360, n % 6 from generate_series(1, 5000) n;
create table parent (a int);
create table child (b int) inherits (parent);
insert into parent values (1), (2);
insert into child values (3, 4);
create materialized view totals as select kind, count(*), sum(amount) from events group by 1;
create unique index on totals (kind);
create materialized view unfilled as select 1 as x with no data;
create view happy as select id, amount from events where kind = 'happy';
create table empty_one (id int);
create table nothing ();
create unlogged table passing (id int);
insert into passing values (7);
create sequence alone start 17 increment 3 cycle maxvalue 1000;
select nextval('alone'), nextval('alone');
create table fk_a (id int primary key, b int);
create table fk_b (id int primary key, a int references fk_a);
alter table fk_a add foreign key (b) references fk_b deferrable initially deferred;
insert into fk_a values (1, null);
insert into fk_b values (1, 1);
update fk_a set b = 1;
select lo_from_bytea(0, decode(repeat(md5(n::text), 200), 'hex')) from generate_series(1, 25) n;
create role reader;
create role "Owner Ö" login password 'unsaid';
alter table empty_one enable row level security;
alter table empty_one force row level security;
create policy own on empty_one to reader using (id > 0);
alter table fk_a owner to "Owner Ö";
grant select (id) on events to reader;
grant usage on schema "Größe & Maß" to reader;
alter default privileges in schema "Größe & Maß" grant select on tables to reader;
create function stamped() returns trigger language plpgsql as $body$
begin new.v := coalesce(new.v, 'x;''"$$'); return new; end $body$;
create trigger stamp before insert on wide for each row execute function stamped();
create rule no_delete as on delete to empty_one do instead nothing;
create statistics ev_stats on kind, amount from events;
create publication pub for table events;
comment on table wide is 'wide; with ''quotes'' and "more"';
create procedure nothing_much() language sql as 'select 1';
create aggregate my_sum(int) (sfunc = int4pl, stype = int, initcond = '0');
create collation german (provider = icu, locale = 'de-u-co-phonebk');
create table sorted_names (name text collate german);
insert into sorted_names values ('Ärger'), ('Zebra'), ('Öl');
"""


def make_postgresql(server: PostgreSQL, name: str, *, public: bool = True) -> None:
    """Make the database; without ``public`` its tables are in a schema ``home``, and ``public`` is gone."""
    server.sql(f'create database "{name}"')
    script = POSTGRESQL.replace("create role reader;", "").replace(
        """create role "Owner Ö" login password 'unsaid';""", ""
    )
    if server.sql("select count(*) from pg_roles where rolname = 'reader'") == "0":
        server.sql("""create role reader; create role "Owner Ö" login password 'unsaid'""")
    if not public:
        server.sql(f'drop schema public; create schema home; alter database "{name}" set search_path = home', name)
    server.sql(script, name)
    server.sql(
        f"""alter database "{name}" set work_mem = '8MB'; grant connect on database "{name}" to reader;
            comment on database "{name}" is 'the ''app'''; analyze""",
        name,
    )


def fingerprint_postgresql(server: PostgreSQL, name: str) -> dict[str, str]:
    """Checksums of every table's rows, sequences, large objects, and what the database itself is set to."""
    tables = server.sql(
        """select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
           where (c.relkind in ('r', 'p') or (c.relkind = 'm' and c.relispopulated))
             and n.nspname not like 'pg\\_%' and n.nspname <> 'information_schema' order by 1""",
        name,
    ).splitlines()
    result = {
        table: server.sql(
            f"select count(*), md5(coalesce(string_agg(md5(t::text), '' order by t::text), '')) from {table} t", name
        )
        for table in tables
    }
    assert len(result) > 15 or name not in ("app", "bare")
    result["sequences"] = server.sql(
        "select schemaname, sequencename, last_value, increment_by, cycle from pg_sequences order by 1, 2", name
    )
    result["large objects"] = server.sql(
        "select count(*), md5(string_agg(md5(lo_get(oid)), '' order by oid)) from pg_largeobject_metadata", name
    )
    result["settings"] = server.sql(
        f"""select setconfig from pg_db_role_setting s join pg_database d on d.oid = s.setdatabase
            where datname = '{name}' order by 1""",
    )
    result["database"] = server.sql(
        f"""select pg_get_userbyid(datdba), datcollate, encoding, shobj_description(oid, 'pg_database'),
            (select string_agg(a::text, ' ' order by a::text) from aclexplode(datacl) a)
            from pg_database where datname = '{name}'""",
    )
    return result


def schema_postgresql(server: PostgreSQL, name: str) -> str:
    """The definitions, as pg_dump writes them."""
    import os
    import subprocess

    done = subprocess.run(
        [PostgreSQL.program("pg_dump"), "-s", "-d", f"dbname='{name}'"],
        env={**os.environ, **server.environment},
        capture_output=True,
        text=True,
        check=True,
    )
    # (Each dump has a token of its own.)
    return "\n".join(line for line in done.stdout.splitlines() if "restrict" not in line)


MARIADB = r"""
create table accounts (id int primary key auto_increment, owner varchar(100) not null, balance decimal(12, 2),
  doubled decimal(13, 2) as (balance * 2) stored, seen timestamp null, unique key (owner), check (balance > -1e9)
) auto_increment = 500;
insert into accounts (owner, balance) select concat('ö', seq, '\'\\"\n'), seq / 7 from seq_1_to_3000;
create table big (id int primary key, v varchar(400), key (v(20)));
insert into big select seq, repeat(md5(seq), 8) from seq_1_to_90000;
create table big_too (id bigint unsigned primary key, b blob, j json);
insert into big_too select seq, repeat(unhex(md5(seq)), 10), json_object('n', seq) from seq_1_to_90000;
create table `Größe & "Maß``` (id int primary key, `wért` varchar(20) character set latin1) default charset = utf8mb4;
insert into `Größe & "Maß``` values (1, 'ü'), (2, null), (0, '');
create table old_style (id int primary key, t text) engine = Aria;
insert into old_style select seq, concat('row ', seq) from seq_1_to_500;
create table empty_one (id int);
create table dated (d date not null, x int) partition by range (year(d))
  (partition p0 values less than (2026), partition p1 values less than maxvalue);
insert into dated select date '2025-06-01' + interval seq day, seq from seq_1_to_700;
create table fk_a (id int primary key, b int);
create table fk_b (id int primary key, a int, foreign key (a) references fk_a (id));
alter table fk_a add foreign key (b) references fk_b (id);
insert into fk_a values (1, null);
insert into fk_b values (1, 1);
update fk_a set b = 1;
create sequence counting start with 17 increment by 3 nocache;
select nextval(counting), nextval(counting);
create table history (id int primary key, v int) with system versioning;
insert into history values (1, 1), (2, 2);
update history set v = 3 where id = 1;
create function plus_one(i int) returns int deterministic return i + 1;
create view rich as select plus_one(id) as next_id, owner from accounts where balance > 100;
create view richer as select * from rich where next_id > 1000;
delimiter //
create procedure fill(in n int) begin declare i int default 0; while i < n do set i = i + 1; end while; end//
create trigger shout before insert on old_style for each row begin set new.t = upper(new.t); end//
delimiter ;
create event nightly on schedule every 1 day disable do delete from empty_one;
create table bits (id int primary key, b bit(9), g point, e enum('x', 'ß'), s set('a', 'b'), f double, y year, t time(3));
insert into bits values (1, b'101010101', point(1, 2), 'ß', 'a,b', 1e-300, 2026, '-12:34:56.789');
"""


def make_mariadb(server: MariaDB, name: str) -> None:
    """Make the database."""
    server.sql(f"create database `{name}` character set utf8mb4 collate utf8mb4_unicode_ci")
    server.sql(MARIADB, name)


def fingerprint_mariadb(server: MariaDB, name: str) -> dict[str, str]:
    """A checksum of every table's rows, and where sequences go on.

    (``CHECKSUM TABLE`` is of the records as they lie there: it differs where a NULL was written another way.)
    """
    tables = server.sql(
        f"""select table_name from information_schema.tables
            where table_schema = '{name}' and table_type not in ('VIEW', 'SEQUENCE') order by 1"""
    ).splitlines()
    assert len(tables) > 8
    result = {}
    for table in tables:
        quoted = table.replace("`", "``")
        rows = server.dump(
            name, "--no-create-info", "--order-by-primary", "--skip-routines", "--skip-events", table=table
        )
        result[table] = hashlib.md5(rows).hexdigest()
        result[f"count {table}"] = server.sql(f"select count(*) from `{quoted}`", name)
    result["old rows"] = server.sql("select count(*) from history for system_time all", name)
    result["counting"] = server.sql("select next_not_cached_value from counting", name)
    result["auto_increment"] = server.sql(
        f"select auto_increment from information_schema.tables where table_schema = '{name}' and table_name = 'accounts'"
    )
    return result
