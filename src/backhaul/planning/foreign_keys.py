"""Whether foreign keys can be made side by side.

Each locks its own table, and then the one that it refers to. Where tables refer to each other in a circle, two of them
that are made at once wait for each other: PostgreSQL ends one (*deadlock detected*), and with it the restore.
"""

from __future__ import annotations

import re
from graphlib import CycleError, TopologicalSorter

_NAME = rb'(?:"(?:[^"]|"")*"|[^\s."(;]+)'
_TABLE = rb"(?:" + _NAME + rb"\.)?" + _NAME
_KEY = re.compile(
    rb"ALTER TABLE (?:ONLY )?(" + _TABLE + rb")\s+ADD CONSTRAINT [^;]*? REFERENCES (" + _TABLE + rb")\s*\("
)


def have_circles(script: bytes) -> bool:
    """Tell whether the tables of a script refer to each other in a circle.

    Args:
        script: the statements that make the foreign keys, as pg_dump writes them.
    """
    refers: dict[bytes, set[bytes]] = {}
    for own, other in _KEY.findall(script):
        if own != other:
            refers.setdefault(own, set()).add(other)
    try:
        TopologicalSorter(refers).prepare()
    except CycleError:
        return True
    return False
