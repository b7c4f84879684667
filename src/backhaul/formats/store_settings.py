"""Settings of a store, as they stand behind the ``?`` of a URL and in a ``[stores.NAME]`` table of the config.

One table of keys for both, so that what works in one works in the other.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Mapping
from typing import Any

from backhaul.errors import UsageError
from backhaul.formats.profiles import check_provider
from backhaul.formats.quantities import parse_duration, parse_size
from backhaul.model.location import WriteSettings

_LEAST_PART = 5 << 20
_FEWEST_PARTS = 2


def _endpoint(text: str) -> str:
    if "@" in text.partition("://")[2].partition("/")[0]:
        raise UsageError(
            "an endpoint with a user and a password",
            "they would spread into logs",
            "Credentials come from the AWS environment or profile.",
        )
    return text


def _credentials_file(text: str) -> str:
    if not text.startswith("/"):
        raise UsageError(
            f"credentials-file={text} is no whole path",
            "timers begin jobs in another directory",
            "Write a path that begins with /.",
        )
    return text


def _max_part(text: str) -> int:
    size = parse_size(text)
    if size < _LEAST_PART:
        raise UsageError(f"max-part={text} is too small", "S3 refuses parts below 5 MiB", "Write e.g. max-part=64Mi.")
    return size


def _max_parts(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not _FEWEST_PARTS <= int(text) <= 10_000:
        raise UsageError(f"max-parts={text} is no number of parts", "it is from 2 to 10000", "Write e.g. 1000.")
    return int(text)


def _timeout(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise UsageError("timeout=0 would fail every request", "no store answers in no time", "Write e.g. 60s.")
    return seconds


def _encryption(text: str) -> str:
    found = {"aes256": "AES256", "aws:kms": "aws:kms", "kms": "aws:kms"}.get(text.lower())
    if found is None:
        raise UsageError(f"sse={text} is not known", "known are AES256 and aws:kms", "Name one of these.")
    return found


def _lock_mode(text: str) -> str:
    if text.upper() not in ("GOVERNANCE", "COMPLIANCE"):
        raise UsageError(f"lock-mode={text} is not known", "known are governance and compliance", "Name one of these.")
    return text.upper()


def _retain_until(text: str) -> float | str:
    """Read a duration from the writing, or a date or time (UTC unless it says otherwise)."""
    try:
        return parse_duration(text)
    except UsageError:
        pass
    try:
        time = dt.datetime.fromisoformat(text)
    except ValueError as error:
        raise UsageError(
            f"retain-until={text} is no time", "it is a duration, a date or a time", "Write 30d or 2027-01-01."
        ) from error
    return (time if time.tzinfo else time.replace(tzinfo=dt.UTC)).isoformat()


def _tags(text: str) -> tuple[tuple[str, str], ...]:
    pairs: list[tuple[str, str]] = []
    for item in text.split(","):
        name, colon, value = item.partition(":")
        if not name or not colon:
            raise UsageError(f"tags={text} can't be read", f"{item!r} is not NAME:VALUE", "Write tags=team:db,env:prod")
        if name in dict(pairs):
            raise UsageError(f"tags={text} can't be set", f"{name} is there twice", "Give each name one value.")
        pairs.append((name, value))
    return tuple(pairs)


# Key, as in a URL (the config may write _ for -): what it means to people, its reader, and the field it sets.
_KEYS: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "endpoint": ("the URL of the S3 service", _endpoint, "endpoint"),
    "region": ("the region", str, "region"),
    "profile": ("a profile of ~/.aws/config, for credentials", str, "profile"),
    "credentials-file": (
        "a file of keys as ~/.aws/credentials is one, for runs without this shell's environment",
        _credentials_file,
        "credentials_file",
    ),
    "provider": ("what kind of store it is, where that is not recognised", check_provider, "provider"),
    "max-part": ("the largest part to make: bounds memory for very long streams", _max_part, "max_part"),
    "max-parts": ("most parts of an upload, where the provider allows fewer than is known", _max_parts, "max_parts"),
    "timeout": ("silence after which a request counts as lost", _timeout, "timeout"),
    "storage-class": ("the storage class of streams; manifests stay in the default one", str, "write.storage_class"),
    "tags": ("tags of what is written, NAME:VALUE,NAME:VALUE", _tags, "write.tags"),
    "sse": ("encryption by the store: AES256 or aws:kms", _encryption, "write.encryption"),
    "kms-key": ("the id of the key for aws:kms", str, "write.kms_key"),
    "retain-until": ("object lock: a duration from the writing, or a date", _retain_until, "write.retain"),
    "lock-mode": ("object lock: governance (the default) or compliance", _lock_mode, "write.lock_mode"),
}
SETTING_HELP: tuple[tuple[str, str], ...] = tuple((key, words) for key, (words, _, _) in _KEYS.items())


def read_settings(given: Mapping[str, str], where: str) -> dict[str, Any]:
    """Read settings as the fields of a ``Location`` that they set.

    Args:
        given: keys and values as text.
        where: what they belong to, for messages.

    Raises:
        UsageError: a key is not known, or a value can't be read.
    """
    fields: dict[str, Any] = {}
    write: dict[str, Any] = {}
    for key, text in given.items():
        known = _KEYS.get(key)
        if known is None:
            raise UsageError(
                f"{where} has a setting that is not known: {key}",
                "known are " + ", ".join(_KEYS),
                "Correct it; credentials come from the AWS environment or profile, never from a store path.",
            )
        if not text:
            raise UsageError(f"{where}: {key} is empty", "that sets nothing", "Give it a value, or leave it out.")
        try:
            value = known[1](text)
        except UsageError as error:
            raise UsageError(f"{where}: {error.what}", error.why, error.todo) from error
        target = known[2]
        if target.startswith("write."):
            name = target.removeprefix("write.")
            write["retain_until" if name == "retain" and isinstance(value, str) else name] = value
        else:
            fields[target] = value
    if "lock_mode" in write and "retain" not in write and "retain_until" not in write:
        raise UsageError(
            f"{where}: lock-mode locks nothing", "retain-until says for how long", "Add e.g. retain-until=30d."
        )
    if write.get("kms_key") and write.get("encryption") != "aws:kms":
        raise UsageError(f"{where}: kms-key needs sse=aws:kms", "nothing else uses such a key", "Add sse=aws:kms.")
    return {**fields, "write": WriteSettings(**write)}
