"""Where a database is, taken apart. ``formats.source_url`` reads it from text."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class SourceUrl(msgspec.Struct, frozen=True, kw_only=True):
    """One ``--from`` or ``--into`` URL; it holds no password.

    Attributes:
        text: as the user wrote it, for messages.
        kind: ``postgresql``, ``mariadb``, either with ``+physical``, ``sqlite``, ``redis``, ``dir`` or ``file``.
        user, host, port: empty or None where they were not given: the server's own defaults.
        database: empty for the whole server.
        path: of what is a file or a directory.
        tls: whether the scheme asks for TLS (``rediss``).
        options: what followed the question mark.
        password_file: a file whose first line is the password, or None.
        isolated: whether nothing that the environment says of servers counts: a scratch server.
    """

    text: str
    kind: str
    user: str = ""
    host: str = ""
    port: int | None = None
    database: str = ""
    path: str = ""
    tls: bool = False
    options: Mapping[str, str] = {}
    password_file: str | None = None
    isolated: bool = False
