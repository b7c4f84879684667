"""The right to make one backup, as a value: the content of ``claim.json``."""

from __future__ import annotations

import msgspec


class Claim(msgspec.Struct, frozen=True):
    """Which run is making a backup, for people and for telling runs apart (``run`` is random)."""

    run: str
    host: str
    pid: int
    since: str
