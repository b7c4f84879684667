"""What a store says of the things it keeps."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping

import msgspec

Metadata = Mapping[str, str]
NO_METADATA: Metadata = {}


class StoredObject(msgspec.Struct, frozen=True, kw_only=True):
    """One object. ``key`` is relative to the store's root; ``modified`` is when it became visible (UTC).

    ``etag`` and ``checksum`` (``CRC64NVME:<base64>``) are None where the store gives none;
    ``modified_ns`` is the exact file time on local stores and None elsewhere. ``metadata`` is what was stored with it,
    where it was asked for by ``stat`` and the store keeps such. ``retained_until`` (UTC) and ``legal_hold`` are its
    object lock, where it was asked for by ``stat`` and the store says so: who may not know it is told of none.
    """

    key: str
    size: int
    modified: dt.datetime
    etag: str | None = None
    checksum: str | None = None
    modified_ns: int | None = None
    metadata: Mapping[str, str] = NO_METADATA
    retained_until: dt.datetime | None = None
    legal_hold: bool = False


class Upload(msgspec.Struct, frozen=True, kw_only=True):
    """An object in the making: invisible under ``key`` until completed. ``token`` is the store's own."""

    key: str
    token: str


class UploadedPart(msgspec.Struct, frozen=True, kw_only=True):
    """A part that the store acknowledged. ``number`` counts from 1; ``crc64nvme`` is of the part alone."""

    number: int
    size: int
    etag: str
    crc64nvme: int


class UnfinishedUpload(msgspec.Struct, frozen=True, kw_only=True):
    """An upload that nobody completed yet. ``last_activity`` is when its newest part arrived (UTC)."""

    upload: Upload
    size: int
    last_activity: dt.datetime
