"""Where a secret is kept: the config names the place, never the secret itself."""

from __future__ import annotations

import msgspec

FILE, ENV, COMMAND, CREDENTIAL = "file", "env", "command", "credential"
SOURCES = (FILE, ENV, COMMAND, CREDENTIAL)


class Secret(msgspec.Struct, frozen=True):
    """A reference to a secret.

    Attributes:
        source: one of ``SOURCES``.
        reference: the file's path, the variable's name, the program with its arguments, or the name of a
            credential that systemd hands over.
    """

    source: str
    reference: tuple[str, ...]
