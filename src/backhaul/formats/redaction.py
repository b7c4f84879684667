"""Commands without their secrets, for manifests, logs and messages.

A secret in a command line is a mistake that operators make all the same; this keeps it from spreading. It
knows options and variables whose names say what they hold, passwords inside URLs and conninfo strings,
and MySQL's ``-pSECRET``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"

_NAME = r"[\w.-]*(?:passw(?:or)?d|passwd|pwd|passphrase|secret|token|credential|api[_-]?key|access[_-]?key)[\w.-]*"
_ASSIGNMENT = re.compile(rf"(?i)((?<![\w-])(?:--?)?{_NAME}\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s&;|]+)")
_URL_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://[^\s/:@]*:)[^\s/@]+(?=@)")
_OPTION = re.compile(rf"(?i)--?{_NAME}")
_SPACED_OPTION = re.compile(rf"(?i)((?<!\S)--{_NAME}\s+)('[^']*'|\"[^\"]*\"|[^\s-][^\s&;|]*)")
_MYSQL_PROGRAM = re.compile(r"(?:.*/)?(?:mysql|mariadb)[\w-]*")
_MYSQL_PASSWORD = re.compile(r"(?<!\S)(-p)(?=\S)('[^']*'|\"[^\"]*\"|\S+)")
_USERINFO_OPTION = re.compile(r"-u|--user")


def redact_text(text: str) -> str:
    """Mask the secrets that a line of shell or a message may hold."""
    text = _URL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    text = _ASSIGNMENT.sub(rf"\g<1>{MASK}", text)
    text = _SPACED_OPTION.sub(rf"\g<1>{MASK}", text)
    if re.search(r"\b(?:mysql|mariadb)", text):
        text = _MYSQL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    return text


def redact_command(command: Sequence[str]) -> tuple[str, ...]:
    """Mask the secrets of an argument vector, argument by argument."""
    out: list[str] = []
    is_mysql = False
    program = ""
    masked_next = False
    for index, argument in enumerate(command):
        if masked_next and not argument.startswith("-"):
            out.append(MASK)
            masked_next = False
            continue
        masked_next = False
        if index == 0 or (not program and "=" not in argument):
            program = argument
        is_mysql = is_mysql or bool(_MYSQL_PROGRAM.fullmatch(argument))
        if is_mysql and argument.startswith("-p") and len(argument) > 2:
            out.append(f"-p{MASK}")
        elif program.rpartition("/")[2] == "curl" and out and _USERINFO_OPTION.fullmatch(out[-1]):
            out.append(argument.partition(":")[0] + f":{MASK}")
        else:
            out.append(redact_text(argument))
            masked_next = bool(_OPTION.fullmatch(argument))
    return tuple(out)
