"""Store paths as people write them: ``s3://bucket/prefix[?SETTING=VALUE&...]`` (``formats.store_settings``), a path,
or ``NAME:path`` for a store named in the config; and ``@WHEN`` behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from urllib.parse import parse_qsl

import msgspec

from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.store_settings import read_settings
from backhaul.formats.when import When, parse_when
from backhaul.model.location import Location

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(?!//)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USERINFO = re.compile(r"://[^/\s?]*@|(?<==)[^&\s]*://[^/\s]*@")
_ALMOST_S3 = re.compile(r"s3(?::/(?!/)|//|:(?!/))")

# The stores that a config names: a store path each, to which the path behind the colon is added.
Stores = Mapping[str, Location]
_NO_STORES: Stores = {}


def parse_location(text: str, stores: Stores = _NO_STORES, *, whole_bucket: bool = False) -> Location:
    """Read a store path.

    Args:
        text: as the user wrote it.
        stores: those that the config names.
        whole_bucket: accept an S3 path that names a bucket and nothing in it.

    Raises:
        UsageError: it is malformed.
        ConfigurationError: it names a store that no config defines.
    """
    if _USERINFO.search(text):
        raise UsageError(
            "A store path holds a password",
            f"{_USERINFO.sub('://***@', text)!r} names a user and a secret, which would spread into logs",
            "Leave it out: credentials come from the AWS environment or profile.",
        )
    if not text or "\0" in text:
        raise UsageError(
            f"{text!r} is not a store path", "it is empty" if not text else "it holds a NUL byte", _EXAMPLES
        )
    if _ALMOST_S3.match(text):
        bucket = text[2:].lstrip(":/")
        raise UsageError(f"{text!r} is not a store path", "it is almost one", f"Did you mean s3://{bucket}?")
    scheme = _SCHEME.match(text)
    if scheme is None:
        named = _NAMED.match(text)
        if named is not None:
            return _in_named_store(text, named[1], text[named.end() :], stores, whole=whole_bucket)
        return Location(text=text, kind="local", path=text)
    if scheme[1].lower() == "file":
        path = text[scheme.end() :]
        if not path.startswith("/"):
            raise UsageError(f"{text!r} is not a store path", "file:// needs an absolute path", "Write file:///path.")
        return Location(text=text, kind="local", path=path)
    if scheme[1].lower() == "s3":
        return _parse_s3(text, text[scheme.end() :], whole_bucket=whole_bucket)
    raise UsageError(f"{text!r} is not a store path", f"the scheme {scheme[1]}:// is not known", _EXAMPLES)


def _in_named_store(text: str, name: str, path: str, stores: Stores, *, whole: bool) -> Location:
    store = stores.get(name)
    if store is None:
        raise ConfigurationError(
            f"There is no store named {name!r}",
            f"{text!r} reads as NAME:path, and "
            + (f"the config names {', '.join(sorted(stores))}" if stores else "no config names a store"),
            f"For a local path write ./{text}.",
        )
    if "?" in path:
        raise UsageError(
            f"{text!r} has settings behind a named store",
            "those of a named store stand in the config",
            f"Write them into [stores.{name}], or use the whole URL.",
        )
    segments = [segment for segment in path.split("/") if segment]
    if (not segments and not whole) or any(segment in (".", "..") for segment in segments):
        raise UsageError(
            f"{text!r} is not a store path",
            "a series needs a path of its own in the store, without '.' and '..'",
            f"Write {name}:NAME, with the name of what you back up.",
        )
    base = [store.path.rstrip("/")] if store.path else []
    return msgspec.structs.replace(store, text=text, path="/".join([*base, *segments]))


def parse_series(text: str, stores: Stores = _NO_STORES) -> Location:
    """Read a SERIES where a whole series is meant, and no backup of it.

    Raises:
        UsageError: malformed, or it ends with an ``@WHEN``.
    """
    if names_backup(text):
        path = text.rpartition("@")[0]
        raise UsageError(f"{text!r} names one backup", "a whole series is meant here", f"Write {path}.")
    return parse_location(text, stores)


def names_backup(text: str) -> bool:
    """Tell whether the text ends with an ``@WHEN``, and so can only mean one backup of a series."""
    _, at, when = text.rpartition("@")
    if not at or "/" in when:
        return False
    try:
        parse_when(when)
    except UsageError:
        return False
    return True


def parse_reference(text: str, stores: Stores = _NO_STORES) -> tuple[Location, When]:
    """Read ``SERIES[@WHEN]``; without ``@WHEN`` it means the latest.

    Raises:
        UsageError: malformed, or what follows the last ``@`` is no time.
    """
    path, at, when = text.rpartition("@")
    if not at or "/" in when:
        return parse_location(text, stores), parse_when("latest")
    try:
        return parse_location(path, stores), parse_when(when)
    except UsageError as error:
        raise UsageError(
            error.what, error.why, f"{error.todo} If the path itself holds an '@', write {text}@latest."
        ) from error


_EXAMPLES = "Write s3://bucket/prefix, or a path such as /mnt/backups/db7."


def _parse_s3(text: str, rest: str, *, whole_bucket: bool) -> Location:
    rest, mark, query = rest.partition("?")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{text!r} is not a store path", "it names no bucket", _EXAMPLES)
    segments = [segment for segment in prefix.split("/") if segment]
    if not segments and not whole_bucket:
        raise UsageError(
            f"{text!r} names a whole bucket",
            "a series needs a path of its own in it",
            f"Write s3://{bucket}/NAME, with the name of what you back up.",
        )
    if any(segment in (".", "..") for segment in segments):
        raise UsageError(f"{text!r} is not a store path", "'.' and '..' mean nothing in S3", _EXAMPLES)
    given = dict(parse_qsl(query, keep_blank_values=True)) if mark else {}
    fields = read_settings(given, f"s3://{bucket}/{prefix}")
    return Location(text=text, kind="s3", bucket=bucket, path="/".join(segments), **fields)
