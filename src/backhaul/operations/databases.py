"""Which source a ``--from`` URL means."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from backhaul.errors import UsageError
from backhaul.formats.source_url import parse_source_url
from backhaul.operations import memory
from backhaul.operations.progress import PushProgress
from backhaul.sources.base import Source, SourceSet

# Each data stream is a dump, and a process of the server's, with a core each.
MAX_DEFAULT_STREAMS = 4


class SourceOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How a database is read.

    Attributes:
        streams: data streams at once; None for one a core, two to four. 1 makes one stream of all of a database.
        count: whether rows are counted, for a drill to compare.
    """

    streams: int | None = None
    count: bool = True


def source_of(
    text: str,
    options: SourceOptions = SourceOptions(),  # noqa: B008 - frozen
    *,
    progress: PushProgress | None = None,
    on_error_line: Callable[[bytes], None] | None = None,
) -> Source | SourceSet:
    """Return the source that a URL means; a plain path means a file.

    Args:
        text: the URL.
        options: how a database is read.
        progress: told the tables as their rows begin.
        on_error_line: told the lines of the programs' stderr that are news.

    Raises:
        UsageError: it is no URL that can be read, or an option does not fit it.
        ConfigurationError: a client library or an option file is missing.
    """
    url = parse_source_url(text)
    counters = progress or PushProgress()
    streams = options.streams or min(MAX_DEFAULT_STREAMS, max(2, memory.default_workers()))
    on_table = counters.tables.begin

    def on_phase(text: str) -> None:
        counters.tables.phase = text

    several = url.kind in ("postgresql", "mariadb")
    if options.streams is not None and not several and url.kind != "mariadb+physical":
        raise UsageError(
            f"--streams says nothing to {url.text}", "it is one stream in any case", "Leave --streams out."
        )
    if url.kind == "file":
        from backhaul.sources.file import FileSource

        return FileSource(url.path)
    if url.kind == "postgresql":
        from backhaul.sources.postgresql import PostgreSQLSource

        return PostgreSQLSource(
            url,
            streams=streams,
            count=options.count,
            on_error_line=on_error_line,
            on_table=on_table,
            on_phase=on_phase,
        )
    if url.kind == "postgresql+physical":
        from backhaul.sources.postgresql_physical import PostgreSQLPhysicalSource

        return PostgreSQLPhysicalSource(url, on_error_line=on_error_line)
    if url.kind == "mariadb":
        from backhaul.sources.mariadb import MariaDBSource

        return MariaDBSource(url, streams=streams, count=options.count, on_error_line=on_error_line, on_table=on_table)
    if url.kind == "mariadb+physical":
        from backhaul.sources.mariadb_physical import MariaDBPhysicalSource

        return MariaDBPhysicalSource(url, threads=streams, on_error_line=on_error_line, on_table=on_table)
    if url.kind == "sqlite":
        from backhaul.sources.sqlite import SQLiteSource

        return SQLiteSource(url, count=options.count)
    if url.kind == "redis":
        from backhaul.sources.redis import RedisSource

        return RedisSource(url)
    from backhaul.sources.directory import DirectorySource

    return DirectorySource(url, on_error_line=on_error_line, on_file=on_table)
