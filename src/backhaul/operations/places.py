"""From what the user calls a place to its location: store paths, and the stores that the config names.

The config is ``/etc/backhaul/config.toml``, ``/etc/backhaul/conf.d/*.toml`` and then
``~/.config/backhaul/config.toml`` (``XDG_CONFIG_HOME``), later ones winning by store; or the one file that
``--config`` or ``BACKHAUL_CONFIG`` names. It is read only when a name asks for it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from backhaul.errors import ConfigurationError
from backhaul.formats import location as format_
from backhaul.formats.config import read_stores
from backhaul.formats.when import When
from backhaul.model.location import Location

CONFIG_VARIABLE = "BACKHAUL_CONFIG"
# Where the config of the host itself lies.
SYSTEM = Path("/etc/backhaul")


class _Stores(Mapping[str, Location]):
    """The named stores, read when the first one is asked for."""

    def __init__(self) -> None:
        self._found: dict[str, Location] | None = None

    def _read(self) -> dict[str, Location]:
        if self._found is None:
            self._found = {}
            for path in config_files():
                self._found.update(read_stores(read_text(path), str(path)))
        return self._found

    def __getitem__(self, name: str) -> Location:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())


def config_files() -> list[Path]:
    """Return the config files that count, in the order in which they are read."""
    named = os.environ.get(CONFIG_VARIABLE)
    if named:
        return [Path(named)]
    candidates = [SYSTEM / "config.toml", *sorted((SYSTEM / "conf.d").glob("*.toml")), user_config()]
    return [path for path in candidates if path.is_file()]


def user_config() -> Path:
    """Return where a user's own config lies, or would."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config")
    return home / "backhaul/config.toml"


def read_text(path: Path) -> str:
    """Return a config file's text.

    Raises:
        ConfigurationError: it can't be read.
    """
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} can't be read", str(error), "Correct its name or its permissions.") from error


def store_at(text: str) -> Location:
    """Read a STORE: a store path, which may be a whole bucket.

    Raises:
        UsageError: it is malformed.
        ConfigurationError: it names a store that no config defines, or the config can't be read.
    """
    return format_.parse_location(text, _Stores(), whole_bucket=True)


def series_at(text: str) -> Location:
    """Read a SERIES. Raises as ``store_at`` does."""
    return format_.parse_series(text, _Stores())


def reference_at(text: str) -> tuple[Location, When]:
    """Read ``SERIES[@WHEN]``. Raises as ``store_at`` does."""
    return format_.parse_reference(text, _Stores())


def place_of(location: Location) -> str:
    """Return what all spellings of a place have in common."""
    if location.kind == "local":
        return f"local {os.path.realpath(location.path)}"
    return " ".join(str(part) for part in ("s3", location.endpoint, location.bucket, location.path))
