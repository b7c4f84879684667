"""References to secrets as the config writes them. A pure reader; ``operations.secrets`` fetches what they refer to.

::

    password = { file = "/etc/backhaul/smtp-password" }
    password = { env = "SMTP_PASSWORD" }
    password = { command = ["pass", "smtp"] }
    password = { credential = "smtp" }          # systemd's LoadCredential=smtp:...
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from typing import Any

from backhaul.formats.redaction import redact_command
from backhaul.model.secret import COMMAND, CREDENTIAL, ENV, FILE, SOURCES, Secret

_WAYS = 'write { file = "/path" }, { env = "NAME" }, { command = [...] } or { credential = "name" }'


def read_secret(value: Any, problem: Callable[[str], None], what: str = "a secret") -> Secret | None:
    """Read a reference to a secret.

    Args:
        value: what the config holds.
        problem: told each thing that is wrong with it; never with the value of what may be a secret.
        what: the thing that is secret, with its article.

    Returns:
        The reference, or None where there was a problem.
    """
    if isinstance(value, str):
        problem(f"{what} doesn't belong into the config: keep it where only this account reads it, and {_WAYS}")
        return None
    if not isinstance(value, Mapping):
        problem(f"it must say where {what} is kept: {_WAYS}")
        return None
    unknown = [key for key in value if key not in SOURCES]
    for key in unknown:
        close = get_close_matches(str(key), SOURCES, 1)
        problem(f"{key} is no place for secrets" + (f": did you mean {close[0]}?" if close else f": {_WAYS}"))
    if unknown:
        return None
    if len(value) != 1:
        problem(f"it must name one place, not {len(value)}: {_WAYS}")
        return None
    ((source, reference),) = value.items()
    if source == COMMAND:
        if isinstance(reference, str):
            problem(f"command must be a list, the program and its arguments: {_as_list(reference)}")
            return None
        if not isinstance(reference, list | tuple) or not all(_usable(word) for word in reference) or not reference:
            problem('command must be a list, the program and its arguments: ["pass", "smtp"]')
            return None
        return Secret(COMMAND, tuple(reference))
    if not _usable(reference) or not reference:
        problem(f"{source} must be text")
        return None
    if source == FILE and not reference.startswith(("/", "~/")):
        problem("file must be a whole path: it begins with / or ~/")
        return None
    if source == ENV and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", reference):
        problem("env must be the name of a variable: letters, digits and _")
        return None
    if source == CREDENTIAL and (not re.fullmatch(r"[A-Za-z0-9_.@:-]+", reference) or reference.startswith(".")):
        problem("credential must be a name as in LoadCredential=NAME:..., not a path")
        return None
    return Secret(source, (reference,))


def describe_secret(secret: Secret) -> str:
    """Return the place for messages; a command's own secrets are masked."""
    if secret.source == COMMAND:
        return f"the command {shlex.join(redact_command(secret.reference))}"
    name = secret.reference[0]
    return {FILE: f"the file {name}", ENV: f"the variable {name}"}.get(secret.source, f"the credential {name}")


def secret_schema() -> dict[str, Any]:
    """Return the JSON Schema of a reference."""
    text = {"type": "string", "minLength": 1}
    words = {"type": "array", "items": {"type": "string"}, "minItems": 1}
    return {
        "type": "object",
        "properties": {FILE: text, ENV: text, COMMAND: words, CREDENTIAL: text},
        "additionalProperties": False,
        "minProperties": 1,
        "maxProperties": 1,
    }


def _usable(word: Any) -> bool:
    return isinstance(word, str) and "\0" not in word


def _as_list(text: str) -> str:
    try:
        words = shlex.split(text)
    except ValueError:
        words = []
    # Its arguments may hold what must not be said.
    return f'["{words[0]}", ...]' if words else '["pass", "smtp"]'
