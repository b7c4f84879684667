"""Store paths as people write them: ``s3://bucket/prefix[?endpoint=URL&region=R&profile=P]``, a path, or
``NAME:path`` for a store named in the config; and ``@WHEN`` behind them."""

from __future__ import annotations

import re
from urllib.parse import parse_qsl

from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.when import When, parse_when
from backhaul.model.location import Location

_NAMED = re.compile(r"([A-Za-z][A-Za-z0-9_-]*):(?!//)")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_USERINFO = re.compile(r"://[^/\s?]*@|(?<==)[^&\s]*://[^/\s]*@")
_ALMOST_S3 = re.compile(r"s3(?::/(?!/)|//|:(?!/))")
_S3_SETTINGS = ("endpoint", "region", "profile")


def parse_location(text: str) -> Location:
    """Read a store path.

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
            raise ConfigurationError(
                f"There is no store named {named[1]!r}",
                f"{text!r} reads as NAME:path, and no config defines that name",
                f"For a local path write ./{text}.",
            )
        return Location(text=text, kind="local", path=text)
    if scheme[1].lower() == "file":
        path = text[scheme.end() :]
        if not path.startswith("/"):
            raise UsageError(f"{text!r} is not a store path", "file:// needs an absolute path", "Write file:///path.")
        return Location(text=text, kind="local", path=path)
    if scheme[1].lower() == "s3":
        return _parse_s3(text, text[scheme.end() :])
    raise UsageError(f"{text!r} is not a store path", f"the scheme {scheme[1]}:// is not known", _EXAMPLES)


def parse_series(text: str) -> Location:
    """Read a SERIES where a whole series is meant, and no backup of it.

    Raises:
        UsageError: malformed, or it ends with an ``@WHEN``.
    """
    path, at, when = text.rpartition("@")
    if at and "/" not in when:
        try:
            parse_when(when)
        except UsageError:
            return parse_location(text)
        raise UsageError(f"{text!r} names one backup", "a whole series is meant here", f"Write {path}.")
    return parse_location(text)


def parse_reference(text: str) -> tuple[Location, When]:
    """Read ``SERIES[@WHEN]``; without ``@WHEN`` it means the latest.

    Raises:
        UsageError: malformed, or what follows the last ``@`` is no time.
    """
    path, at, when = text.rpartition("@")
    if not at or "/" in when:
        return parse_location(text), parse_when("latest")
    try:
        return parse_location(path), parse_when(when)
    except UsageError as error:
        raise UsageError(
            error.what, error.why, f"{error.todo} If the path itself holds an '@', write {text}@latest."
        ) from error


_EXAMPLES = "Write s3://bucket/prefix, or a path such as /mnt/backups/db7."


def _parse_s3(text: str, rest: str) -> Location:
    rest, mark, query = rest.partition("?")
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"{text!r} is not a store path", "it names no bucket", _EXAMPLES)
    segments = [segment for segment in prefix.split("/") if segment]
    if not segments:
        raise UsageError(
            f"{text!r} names a whole bucket",
            "a series needs a path of its own in it",
            f"Write s3://{bucket}/NAME, with the name of what you back up.",
        )
    if any(segment in (".", "..") for segment in segments):
        raise UsageError(f"{text!r} is not a store path", "'.' and '..' mean nothing in S3", _EXAMPLES)
    settings: dict[str, str] = {}
    if mark:
        for key, value in parse_qsl(query, keep_blank_values=True):
            if key not in _S3_SETTINGS or not value:
                raise UsageError(
                    f"s3://{bucket}/{prefix} has a setting that is not known: {key}",
                    "known are " + ", ".join(_S3_SETTINGS),
                    "Credentials come from the AWS environment or profile, never from the URL.",
                )
            settings[key] = value
    return Location(text=text, kind="s3", bucket=bucket, path="/".join(segments), **settings)
