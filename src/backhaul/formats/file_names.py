"""Names of files, for people: whatever bytes a name has, it is one line of printable text."""

from __future__ import annotations


def shown(name: str) -> str:
    """Return a name with control characters and bytes that are not UTF-8 as escapes (``\\n``, ``\\xff``)."""
    text = name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return (
        text
        if text.isprintable()
        else "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    )


def is_text(name: str) -> bool:
    """Tell whether a name is UTF-8, as keys and records have to be."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
