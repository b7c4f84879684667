"""A script of SQL as PostgreSQL's dumps write it, taken apart at the ends of its statements."""

from __future__ import annotations

import re
from collections.abc import Iterator

# What may hold a semicolon that ends nothing: strings, quoted names, comments, dollar quotes.
_TOKEN = re.compile(
    r"""[eE]'(?:[^'\\]|\\.|'')*' | '(?:[^']|'')*' | "(?:[^"]|"")*" | --[^\n]*
      | \$(?P<tag>[A-Za-z_]*)\$.*?\$(?P=tag)\$ | ;""",
    re.VERBOSE | re.DOTALL,
)


def split_statements(script: str) -> Iterator[str]:
    """Yield the statements without their semicolons; psql's own commands (lines with a backslash) are left out."""
    script = re.sub(r"(?m)^\\.*$", "", script)
    start = 0
    for match in _TOKEN.finditer(script):
        if match[0] == ";":
            statement = _without_comments(script[start : match.start()])
            if statement:
                yield statement
            start = match.end()


def _without_comments(statement: str) -> str:
    return re.sub(r"\A(?:\s*--[^\n]*\n)*\s*", "", statement).strip()
