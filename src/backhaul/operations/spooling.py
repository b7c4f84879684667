"""The spool that a run was given: looked at before anything begins."""

from __future__ import annotations

import os

from backhaul.errors import ConfigurationError
from backhaul.pipeline.spool import SpoolSpace, open_nameless


def check_spool(directory: str) -> None:
    """Make sure that files can be made there.

    Raises:
        ConfigurationError: they can't.
    """
    try:
        os.close(open_nameless(directory))
    except OSError as error:
        raise ConfigurationError(
            f"The spool {directory} can't be used",
            error.strerror or str(error),
            "Name a directory that can be written, on a disk with room.",
        ) from error


def spool_space(directory: str | None, size: int) -> SpoolSpace | None:
    """Return the room of at most so many bytes that a directory gives, or None without one.

    Raises:
        ConfigurationError: it can't be used.
    """
    if directory is None:
        return None
    check_spool(directory)
    return SpoolSpace(directory, size)
