"""Where things are: a store path, taken apart. ``formats.location`` reads it from text."""

from __future__ import annotations

import msgspec


class WriteSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What is asked of a store for the objects that are written.

    Attributes:
        storage_class: of streams; manifests stay in the default class, where they can be read at once.
        tags: names and values.
        encryption: ``AES256`` or ``aws:kms``; None leaves it to the bucket.
        kms_key: the key's id, for ``aws:kms``.
        retain: seconds from the writing for which the object is locked, or None.
        retain_until: an ISO date or time up to which it is locked, or None.
        lock_mode: ``GOVERNANCE`` or ``COMPLIANCE``.
    """

    storage_class: str | None = None
    tags: tuple[tuple[str, str], ...] = ()
    encryption: str | None = None
    kms_key: str | None = None
    retain: float | None = None
    retain_until: str | None = None
    lock_mode: str = "GOVERNANCE"


class Location(msgspec.Struct, frozen=True, kw_only=True):
    """One series or mirror path.

    Attributes:
        text: as the user wrote it, without ``@WHEN``; used in every message.
        kind: ``s3`` or ``local``.
        bucket: the bucket's name (s3).
        path: the key prefix without slashes at its ends (s3), or a file system path (local).
        endpoint, region, profile: settings of the connection, where given (s3).
        credentials_file: a file of keys as ~/.aws/credentials is one, instead of that and the environment (s3).
        provider: the profile's name where it was set rather than recognised (s3).
        max_parts: a lower limit than the profile's (s3).
        max_part: the largest part to make, which bounds memory (s3).
        timeout: seconds of silence after which a request counts as lost; None for the default (s3).
        write: what is asked of the store for what is written (s3).
    """

    text: str
    kind: str
    path: str
    bucket: str = ""
    endpoint: str | None = None
    region: str | None = None
    profile: str | None = None
    credentials_file: str | None = None
    provider: str | None = None
    max_parts: int | None = None
    max_part: int | None = None
    timeout: float | None = None
    write: WriteSettings = WriteSettings()
