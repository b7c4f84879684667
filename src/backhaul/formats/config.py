"""The config as TOML: the stores that have names. A pure reader; ``operations.places`` finds the files.

::

    [stores.offsite]
    url = "s3://acme/backups"
    endpoint = "https://s3.example.com"
    provider = "scaleway"
    storage-class = "ONEZONE_IA"
    tags = { team = "db" }
    retain-until = "30d"

``offsite:db7/orders`` is then ``s3://acme/backups/db7/orders`` with these settings, which are those of a URL
(``formats.store_settings``).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any

from backhaul.errors import ConfigurationError, UsageError
from backhaul.formats.location import parse_location
from backhaul.formats.store_settings import SETTING_HELP, read_settings
from backhaul.model.location import Location

_TABLES = ("stores",)
_SETTINGS = tuple(name for name, _ in SETTING_HELP)


def read_stores(text: str, where: str) -> dict[str, Location]:
    """Return the stores of a config file by name.

    Args:
        text: TOML.
        where: the file's name, for messages.

    Raises:
        ConfigurationError: with everything that is wrong, not only the first.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{where} can't be read", str(error), "Correct the line that it names.") from error
    stores = document.get("stores", {})
    problems: list[str] = []
    found: dict[str, Location] = {}
    for key in document:
        if key not in _TABLES:
            close = get_close_matches(key, _TABLES, 1)
            problems.append(f"{key} is not known" + (f": did you mean {close[0]}?" if close else ""))
    if not isinstance(stores, Mapping):
        stores, problems = {}, ["stores must be tables: [stores.NAME]"]
    for name, table in stores.items():
        try:
            found[name] = _read_store(name, table)
        except UsageError as error:
            where = "" if error.what.startswith("[") else f"[stores.{name}] "
            problems.append(f"{where}{error.what}: {error.why}; {error.todo.rstrip('.')}.")
    if problems:
        raise ConfigurationError(f"{where} is not right", "\n".join(problems), "Correct the config, and try again.")
    return found


def _read_store(name: str, table: Any) -> Location:
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        raise UsageError("its name can't be used", "names have letters, digits, - and _", "Choose another")
    if not isinstance(table, Mapping) or not isinstance(table.get("url"), str):
        raise UsageError("it has no url", "a store is a table with a url", 'Write url = "s3://bucket/path".')
    location = parse_location(table["url"], whole_bucket=True)
    given: dict[str, str] = {}
    for raw_key, value in table.items():
        key = raw_key.replace("_", "-")
        if key == "url":
            continue
        if key not in _SETTINGS:
            close = get_close_matches(key, _SETTINGS, 1)
            raise UsageError(
                f"{raw_key} is not a setting of a store",
                f"did you mean {close[0]}" if close else "known are url, " + ", ".join(_SETTINGS),
                "Correct or remove it",
            )
        given[key] = _as_text(key, value)
    if location.kind != "s3":
        if given:
            raise UsageError(f"a directory has no {', '.join(given)}", "these are settings of S3", "Remove them")
        return location
    fields = read_settings({**_settings_of(table["url"]), **given}, f"[stores.{name}]")
    return Location(text=location.text, kind="s3", bucket=location.bucket, path=location.path, **fields)


def _settings_of(url: str) -> dict[str, str]:
    from urllib.parse import parse_qsl

    return dict(parse_qsl(url.partition("?")[2], keep_blank_values=True))


def _as_text(key: str, value: Any) -> str:
    if key == "tags" and isinstance(value, Mapping):
        return ",".join(f"{name}:{text}" for name, text in value.items())
    if isinstance(value, str) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    if hasattr(value, "isoformat"):
        return str(value.isoformat())
    raise UsageError(f"{key} is {value!r}", "it must be text", f'Write {key} = "..."')
