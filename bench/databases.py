"""A PostgreSQL database of 5 GB to S3 and back: ours against pg_dump with aws, and against pgBackRest.

Each way is a push and a restore into a new place. Measured are wall time, the CPU time of the way's own processes, that
of the whole machine meanwhile (the servers do most of the work), and the most that lay on the disk as a stage. What
bounds a push is what the server's own programs read out of it, to nowhere.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul.formats.quantities import format_size
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY, PostgreSQL, SeaweedFS, free_ports
from bench.results import Comparison, Line, Results, Run
from bench.runs import FailedError, attempt, machine, measured, today, versions
from bench.stores import BACKHAUL, BUCKET, aws, s3_environment

_COLUMNS = ["wall", "from - to", "its CPU", "CPU of the machine", "staged on disk", "time against ours"]
_TABLES = 4
# What a row takes, table and indexes together, as measured.
_ROW_BYTES = 344


class Way(msgspec.Struct, frozen=True):
    """One way there and back: shell commands, and what is done in between. A bound has no way back."""

    name: str
    push: str
    restore: str = ""
    stage: str = ""
    before: Callable[[], None] = lambda: None
    physical: bool = False


def make_database(server: PostgreSQL, size: int) -> int:
    """Make tables of that size, with indexes; return what the server says it has."""
    server.sql("create database shop")
    for number in range(_TABLES):
        rows = size // _TABLES // _ROW_BYTES
        server.sql(
            f"""create table orders_{number} (id bigserial primary key, customer int not null, placed timestamptz,
                total numeric(12, 2), status text, note text, payload jsonb);
                insert into orders_{number} (customer, placed, total, status, note, payload)
                select (random() * 100000)::int, timestamptz '2020-01-01' + n * interval '1 minute',
                       (random() * 10000)::numeric(12, 2), (array['new', 'paid', 'sent', 'back'])[1 + n % 4],
                       md5(n::text) || ' ordered by mail, to be delivered ' || md5((n * 7)::text),
                       jsonb_build_object('n', n, 'items', jsonb_build_array(n % 17, n % 19, n % 23), 'k', md5(n::text))
                  from generate_series(1, {rows}) n;
                create index on orders_{number} (customer);
                create index on orders_{number} (placed);""",
            "shop",
        )
    server.sql("vacuum analyze; checkpoint", "shop")
    return int(server.sql("select pg_database_size('shop')"))


def _busy() -> float:
    with open("/proc/stat") as file:
        words = file.readline().split()
    user, nice, system, _idle, _wait, irq, softirq = (int(word) for word in words[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _size_of(path: str) -> int:
    return sum(
        os.lstat(os.path.join(directory, name)).st_size for directory, _, files in os.walk(path) for name in files
    )


def run_once(command: str, environment: dict[str, str], stage: str) -> Run:
    """Run a way's half; watch what it stages.

    Raises:
        FailedError: it failed.
    """
    most = 0
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while stage and not done.wait(1.0):
            try:
                most = max(most, _size_of(stage))
            except OSError:
                continue

    watcher = threading.Thread(target=watch)
    watcher.start()
    busy = _busy()
    try:
        run = measured(command, environment)
    finally:
        busy = _busy() - busy
        done.set()
        watcher.join()
    if stage and Path(stage).exists():
        most = max(most, _size_of(stage))
    return msgspec.structs.replace(run, machine=round(busy, 2), staged=most)


def databases(directory: Path, size: int, rounds: int) -> Results:
    """Measure all ways, there and back, with a database of about ``size`` bytes."""
    certificate, key = directory / "cert.pem", directory / "key.pem"
    making = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {key} -out {certificate}"
    subprocess.run(making.split(), check=True, capture_output=True)
    https = free_ports(1)[0]
    store = SeaweedFS(directory / "s3")
    store.options = (f"-s3.port.https={https}", f"-s3.cert.file={certificate}", f"-s3.key.file={key}")
    (directory / "s3").mkdir()
    server = PostgreSQL()
    restored = PostgreSQL()
    try:
        store.start()
        client = store.client()
        client.create_bucket(Bucket=BUCKET)
        client.close()
        server.start()
        restored.start()
        found = make_database(server, size)
        print(f"  the database has {format_size(found)}", file=sys.stderr)
        return _compare(directory, store, https, server, restored, found, rounds)
    finally:
        server.stop()
        restored.stop()
        store.stop()


def _compare(
    directory: Path, store: SeaweedFS, https: int, server: PostgreSQL, restored: PostgreSQL, size: int, rounds: int
) -> Results:
    amazon = aws(store.endpoint)
    at = f"s3://{BUCKET}"
    bin_ = os.path.dirname(PostgreSQL.program("pg_dump"))
    home = server.environment["PGHOST"]
    away = restored.environment["PGHOST"]
    from_ = f"-h {home} -p {server.port} -U postgres -d shop"
    to = f"-h {away} -p {restored.port} -U postgres"
    stage = str(directory / "stage")
    account = server.account

    def fresh(name: str) -> Callable[[], None]:
        def make() -> None:
            shutil.rmtree(stage, ignore_errors=True)
            restored.sql(f'drop database if exists "{name}"')
            restored.sql(f'create database "{name}"')

        return make

    def drop(name: str) -> Callable[[], None]:
        return lambda: (restored.sql(f'drop database if exists "{name}"'), None)[1]

    # pgBackRest: its WAL goes to the store as the server writes it.
    configuration = directory / "pgbackrest.conf"
    data = Path(home) / "data"
    place = Path(away) / "pgbackrest"
    base = Path(away) / "base"
    for name in ("log", "lock", "spool"):
        (directory / name).mkdir()
    configuration.write_text(
        f"""[global]
repo1-type=s3
repo1-path=/pgbackrest
repo1-s3-bucket={BUCKET}
repo1-s3-endpoint=127.0.0.1
repo1-storage-port={https}
repo1-storage-verify-tls=n
repo1-s3-region=us-east-1
repo1-s3-uri-style=path
repo1-s3-key={ACCESS_KEY}
repo1-s3-key-secret={SECRET_KEY}
repo1-retention-full=1
compress-type=zst
compress-level=1
process-max=2
start-fast=y
log-path={directory}/log
lock-path={directory}/lock
spool-path={directory}/spool
log-level-console=warn
[main]
pg1-path={data}
pg1-socket-path={home}
pg1-port={server.port}
pg1-user=postgres
"""
    )
    switch = ""
    if account is not None:
        switch = f"setpriv --reuid={account.pw_uid} --regid={account.pw_gid} --clear-groups -- "
        for path in (directory, configuration, *(directory / name for name in ("log", "lock", "spool"))):
            os.chown(path, account.pw_uid, account.pw_gid)
    rest = f"{switch}pgbackrest --config={configuration} --stanza=main"
    server.sql(
        f"alter system set archive_command = 'pgbackrest --config={configuration} --stanza=main archive-push %p'"
    )
    server.sql("alter system set archive_mode = on")
    server.restart()
    environment = s3_environment(store.endpoint)
    try:
        measured(f"{rest} stanza-create", environment)
    except FailedError as error:
        print(f"  pgBackRest could not be set up: {error}", file=sys.stderr)  # its runs will say the same in the table

    ours = (
        f"{BACKHAUL} push -q {at}/shop --from 'postgresql://postgres@/shop?host={home}&port={server.port}' --streams 2"
    )
    theirs = f"{rest} --type=full backup"
    url = f"postgresql://postgres@/ours?host={away}&port={restored.port}"
    physical = f"postgresql+physical://postgres@/?host={home}&port={server.port}"
    ways = [
        Way("backhaul", ours, f"{BACKHAUL} restore -q {at}/shop --into '{url}'", before=drop("ours")),
        Way(
            "backhaul, without row counts",
            ours.replace("/shop --from", "/plain --from") + " --no-counts",
            f"{BACKHAUL} restore -q {at}/plain --into '{url}'",
            before=drop("ours"),
        ),
        Way(
            "pg_dump -Fc, aws s3 cp; aws s3 cp, pg_restore",
            f"{bin_}/pg_dump -Fc {from_} | {amazon} s3 cp - {at}/fc.dump --expected-size 6000000000",
            f"{amazon} s3 cp {at}/fc.dump - | {bin_}/pg_restore {to} -d fc",
            before=fresh("fc"),
        ),
        Way(
            "pg_dump -Fd -j2, aws s3 sync; back, pg_restore -j2",
            f"{bin_}/pg_dump -Fd -j2 -f {stage} {from_} && {amazon} s3 sync --only-show-errors {stage} {at}/fd",
            f"{amazon} s3 sync --only-show-errors {at}/fd {stage} && {bin_}/pg_restore -j2 {to} -d fd {stage}",
            stage=stage,
            before=fresh("fd"),
        ),
        Way(
            "backhaul, physical",
            f"{BACKHAUL} push -q {at}/base --from '{physical}'",
            f"{BACKHAUL} restore -q {at}/base --into {base}",
            before=lambda: shutil.rmtree(base, ignore_errors=True),
            physical=True,
        ),
        Way(
            "pgBackRest (zst, level 1, process-max=2)",
            theirs,
            f"mkdir {place} && chmod 700 {place}"
            + (f" && chown {account.pw_uid}:{account.pw_gid} {place}" if account is not None else "")
            + f" && {rest} --pg1-path={place} restore",
            before=lambda: shutil.rmtree(place, ignore_errors=True),
            physical=True,
        ),
    ]
    bounds = [
        Way("pg_dump -Fc -Z0 alone, to nowhere", f"{bin_}/pg_dump -Fc -Z0 {from_} > /dev/null"),
        Way(
            "pg_basebackup alone, to nowhere",
            f"{bin_}/pg_basebackup -h {home} -p {server.port} -U postgres -c fast -D - -Ft -X fetch > /dev/null",
            physical=True,
        ),
    ]
    pushes, restores = [], []
    for way in (*ways, *bounds):
        beside = "backhaul, physical" if way.physical else "backhaul"
        pushes.append(Line(way.name, base=beside, limit=way in bounds))
        if way.restore:
            restores.append(Line(way.name, base=beside))
    for number in range(rounds):
        back = iter(restores)
        for way, push in zip((*ways, *bounds), pushes, strict=True):
            way.before()
            attempt(push, functools.partial(run_once, way.push, environment, way.stage), f"push {number + 1}")
            if way.restore:
                if way.stage:
                    shutil.rmtree(way.stage, ignore_errors=True)
                restore = functools.partial(run_once, way.restore, environment, way.stage)
                attempt(next(back), restore, f"restore {number + 1}")
            way.before()
            time.sleep(2)
    times = "one round" if rounds == 1 else f"medians of {rounds} alternating rounds"
    return Results(
        area="databases",
        date=today(),
        machine=machine(),
        conditions=f"a database of {format_size(size)}, tables and indexes; {times}",
        comparisons=[
            Comparison("push", "Push of a PostgreSQL database", _COLUMNS, pushes, shows="wall"),
            Comparison("restore", "Restore of a PostgreSQL database", _COLUMNS, restores, shows="wall"),
        ],
        versions=versions("pg_dump", "pgbackrest", "aws", "weed"),
    )
