"""``--from`` and ``--into`` URLs: ``postgresql://user@host:port/database?option=value`` and its kin.

The general form is RFC 3986's; ``postgresql://`` is libpq's own URI form but for the password, which is never part of
a command line (``ps`` shows it to everybody).
"""

from __future__ import annotations

import re
from urllib.parse import parse_qsl, unquote, urlsplit

from backhaul.errors import UsageError
from backhaul.formats.redaction import redact_text
from backhaul.model.source_url import SourceUrl

# Scheme and kind, in the order in which messages name them.
_KINDS = {
    "postgresql": "postgresql",
    "postgres": "postgresql",
    "postgresql+physical": "postgresql+physical",
    "mariadb": "mariadb",
    "mysql": "mariadb",
    "mariadb+physical": "mariadb+physical",
    "mysql+physical": "mariadb+physical",
    "sqlite": "sqlite",
    "redis": "redis",
    "rediss": "redis",
    "redis+unix": "redis",
    "dir": "dir",
    "file": "file",
}
SERVER_KINDS = ("postgresql", "postgresql+physical", "mariadb", "mariadb+physical", "redis")
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):/")
_PASSWORD_FILE = "password-file"  # noqa: S105 - an option's name
_PASSWORD_PLACES = {
    "postgresql": "in ~/.pgpass, in PGPASSWORD",
    "mariadb": "in ~/.my.cnf ([client]), in MYSQL_PWD",
    "redis": "in REDISCLI_AUTH",
}
_FORMS = (
    "Write postgresql:///app, postgresql+physical:///, mariadb:///app, mariadb+physical:///, sqlite:///path/f.db, "
    "redis://localhost, dir:///path, or a file's path."
)


def is_source_url(text: str) -> bool:
    """Tell whether the text is a URL of one of the kinds that can be backed up (and no store's)."""
    scheme = _SCHEME.match(text)
    return scheme is not None and scheme[1].lower() in _KINDS


def parse_source_url(text: str) -> SourceUrl:
    """Read a URL, or a plain path, which is a ``file``.

    Raises:
        UsageError: an unknown scheme, a password, or something else that can't be.
    """
    shown = redact_text(text)
    if not text:
        raise UsageError("The source has no name", "an empty text was given", _FORMS)
    scheme = _SCHEME.match(text)
    if scheme is None:
        return SourceUrl(text=text, kind="file", path=text)
    kind = _KINDS.get(scheme[1].lower())
    if kind is None:
        raise UsageError(f"{shown!r} can't be read or restored", f"the scheme {scheme[1]!r} is not known", _FORMS)
    try:
        parts = urlsplit(text)
        port = parts.port
        options = dict(parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query)))
    except ValueError as error:
        raise UsageError(f"{shown!r} is not a URL", str(error), _FORMS) from error
    if parts.password is not None or any("password" in name.lower() and name != _PASSWORD_FILE for name in options):
        places = _PASSWORD_PLACES.get(kind.partition("+")[0], "in a file")
        raise UsageError(
            f"{shown!r} holds a password",
            "every user of this host sees it in the list of processes",
            f"Put it {places}, or in a file: ?{_PASSWORD_FILE}=/etc/backhaul/db.password",
        )
    if kind in ("sqlite", "dir", "file"):
        return _path_url(text, kind, parts.netloc, parts.path, options)
    path = unquote(parts.path)
    password_file = options.pop(_PASSWORD_FILE, None)
    host = unquote(parts.hostname or "")
    if scheme[1].lower() == "redis+unix":
        return SourceUrl(
            text=shown, kind=kind, user=unquote(parts.username or ""), path=path, password_file=password_file
        )
    if kind == "redis":
        _refuse_options(shown, options, ())
    whole = {
        "postgresql+physical": "a physical backup is of the whole server",
        "mariadb+physical": "a physical backup is of the whole server",
        "redis": "a dump is of all databases",
    }
    if kind in whole and path.strip("/"):
        raise UsageError(f"{shown!r} names a database", whole[kind], "Leave the name out.")
    return SourceUrl(
        text=shown,
        kind=kind,
        user=unquote(parts.username or ""),
        host=host,
        port=port,
        database="" if kind.endswith("+physical") else path.removeprefix("/"),
        path=path if kind.endswith("+physical") else "",
        tls=scheme[1].lower() == "rediss",
        options=options,
        password_file=password_file,
    )


def _path_url(text: str, kind: str, host: str, path: str, options: dict[str, str]) -> SourceUrl:
    _refuse_options(text, options, {"dir": ("changing",), "sqlite": ("stage",)}.get(kind, ()))
    if host not in ("", "localhost") or not path.startswith("/"):
        raise UsageError(
            f"{text!r} names no path on this host",
            f"{host!r} stands where a host would" if host else "the path is not absolute",
            f"Write three slashes before the path: {kind}:///path",
        )
    # (sqlite:////path is how others write an absolute path.)
    return SourceUrl(text=text, kind=kind, path="/" + unquote(path).lstrip("/"), options=options)


def _refuse_options(text: str, options: dict[str, str], known: tuple[str, ...]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise UsageError(
            f"{text!r} has an option that means nothing here",
            ", ".join(unknown),
            f"Known are: {', '.join(known)}" if known else "Leave it out.",
        )
