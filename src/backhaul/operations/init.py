"""init: find the databases of this host, and propose how to back them up. Nothing is written or changed."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from pathlib import Path

from backhaul.errors import BackhaulError
from backhaul.formats.source_url import parse_source_url
from backhaul.model.results import FoundSource, InitResult
from backhaul.sources.base import unique_names

_POSTGRESQL_SOCKETS = ("/run/postgresql", "/var/run/postgresql", "/tmp")
_MARIADB_SOCKETS = ("/run/mysqld/mysqld.sock", "/var/lib/mysql/mysql.sock", "/tmp/mysql.sock")
_REDIS_SOCKETS = ("/run/redis/redis-server.sock", "/run/redis/redis.sock", "/tmp/redis.sock")
_REDIS_PORT = 6379
# From here on a physical backup is restored much faster than rows and indexes are made anew.
LARGE = 200 * 10**9


def init(store: str | None = None) -> InitResult:
    """Look for servers on this host's sockets and default ports, and propose commands.

    Args:
        store: where backups are to go, e.g. ``s3://acme/db7``; None for a placeholder.
    """
    where = (store or f"s3://BUCKET/{socket.gethostname()}").rstrip("/")
    found = [*_postgresql(), *_mariadb(), *_redis()]
    names = unique_names([source.label for source in found])
    proposals = tuple(_with_commands(source, f"{where}/{name}") for source, name in zip(found, names, strict=True))
    return InitResult(store=where, found=proposals)


def _with_commands(source: FoundSource, series: str) -> FoundSource:
    import msgspec

    if source.problem:
        return msgspec.structs.replace(source, commands=(f"backhaul doctor {_quoted(source.url)}",))
    return msgspec.structs.replace(
        source,
        commands=(
            f"backhaul doctor {_quoted(source.url)}",
            f"backhaul push {_quoted(series)} --from {_quoted(source.url)}",
            f"backhaul drill {_quoted(series)}",
        ),
    )


def _quoted(text: str) -> str:
    import shlex

    return shlex.quote(text)


def _postgresql() -> Iterator[FoundSource]:
    places = dict.fromkeys([*filter(None, [os.environ.get("PGHOST")]), *_POSTGRESQL_SOCKETS])
    seen = set()
    for directory in places:
        if not Path(directory).is_dir():
            continue
        for path in sorted(Path(directory).glob(".s.PGSQL.*")):
            port = path.name.rpartition(".")[2]
            real = (os.path.realpath(path), port)
            if not port.isdigit() or real in seen:
                continue
            seen.add(real)
            yield from _postgresql_at(directory, port)


def _postgresql_at(directory: str, port: str) -> Iterator[FoundSource]:
    from backhaul.databases.postgresql import PostgreSQLServer

    options = "" if (directory, port) == ("/run/postgresql", "5432") else f"?host={directory}&port={port}"
    label = f"postgresql-{port}"
    base = f"postgresql:///{options}"
    try:
        server = PostgreSQLServer(parse_source_url(base))
        facts = server.facts()
        databases = server.databases()
    except BackhaulError as error:
        yield FoundSource(kind="postgresql", url=base, label=label, problem=f"{error.what}: {error.why}")
        return
    total = sum(size for _, size in databases)
    if total >= LARGE:
        yield FoundSource(
            kind="postgresql+physical",
            url=f"postgresql+physical:///{options}",
            label=label,
            server=facts.version,
            size=total,
        )
    for name, size in databases:
        if name != "postgres":
            url = f"postgresql:///{name}{options}"
            yield FoundSource(kind="postgresql", url=url, label=name, server=facts.version, size=size)


def _mariadb() -> Iterator[FoundSource]:
    from backhaul.databases.mariadb import MariaDBServer, database_record

    seen = set()
    for path in (*filter(None, [os.environ.get("MYSQL_UNIX_PORT")]), *_MARIADB_SOCKETS):
        if not Path(path).is_socket() or os.path.realpath(path) in seen:
            continue
        seen.add(os.path.realpath(path))
        base = f"mariadb:///?socket={path}"
        try:
            server = MariaDBServer(parse_source_url(base))
            facts = server.facts()
            names = server.databases()
            with server.session() as connection:
                sizes = {name: database_record(connection, name)[0].size for name in names}
        except BackhaulError as error:
            yield FoundSource(kind="mariadb", url=base, label="mariadb", problem=f"{error.what}: {error.why}")
            continue
        if sum(sizes.values()) >= LARGE:
            url = f"mariadb+physical:///?socket={path}"
            yield FoundSource(
                kind="mariadb+physical", url=url, label="mariadb", server=facts.version, size=sum(sizes.values())
            )
        for name, size in sizes.items():
            url = f"mariadb:///{name}?socket={path}"
            yield FoundSource(kind="mariadb", url=url, label=name, server=facts.version, size=size)


def _redis() -> Iterator[FoundSource]:
    from backhaul.databases.redis import RedisConnection

    urls = [f"redis+unix://{path}" for path in _REDIS_SOCKETS if Path(path).is_socket()]
    with socket.socket() as probe:
        probe.settimeout(1.0)
        if probe.connect_ex(("127.0.0.1", _REDIS_PORT)) == 0:
            urls.append("redis://127.0.0.1")
    for url in urls:
        try:
            connection = RedisConnection(parse_source_url(url))
            information = connection.information("memory") | connection.information("server")
            connection.close()
        except BackhaulError as error:
            yield FoundSource(kind="redis", url=url, label="redis", problem=f"{error.what}: {error.why}")
            continue
        yield FoundSource(
            kind="redis",
            url=url,
            label="redis",
            server=information.get("redis_version", ""),
            size=int(information.get("used_memory", 0)),
        )
