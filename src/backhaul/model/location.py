"""Where things are: a store path, taken apart. ``formats.location`` reads it from text."""

from __future__ import annotations

import msgspec


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """One series or mirror path.

    Attributes:
        text: as the user wrote it, without ``@WHEN``; used in every message.
        kind: ``s3`` or ``local``.
        bucket: the bucket's name (s3).
        path: the key prefix without slashes at its ends (s3), or a file system path (local).
        endpoint, region, profile: settings from the URL's query, where given (s3).
    """

    text: str
    kind: str
    path: str
    bucket: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
