"""Commands without their secrets, for manifests, logs and messages.

A secret in a command line is a mistake that operators make all the same; this keeps it from spreading. It
knows options and variables whose names say what they hold, passwords inside URLs and conninfo strings,
authorization headers, and the short options of common programs. It can't know every program: the right
place for a secret is a file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

MASK = "***"

_WORD = (
    r"(?:passw(?:or)?d|passwd|pwd|passphrase|secret|token|credential|api[_-]?key|access[_-]?key)(?![_-]file)"
    r"[\w.-]{0,60}"
)
_NAME = rf"[\w.-]*{_WORD}"
# (In texts what stands before the word is not looked at: a long one would be, from each of its letters.)
_ASSIGNMENT = re.compile(rf"(?i)({_WORD}\s*=\s*)('[^']*'|\"[^\"]*\"|[^\s&;|]+)")
_WHOLE_ASSIGNMENT = re.compile(rf"(?is)((?:--?)?{_NAME}=).+")
_URL_PASSWORD = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]{0,30}://[^\s/:@]*:)\S+(?=@)")
_AUTHORIZATION = re.compile(r"(?i)(\bauthorization\s*:\s*|\b(?:bearer|basic)\s+)([^\s'\"]+(?:\s+[^\s'\"]+)?)")
# An age identity says itself that it is one, wherever it stands.
_AGE_IDENTITY = re.compile(r"(?i)(SECRET-KEY-(?:PQ-)?1)[A-Z0-9]+")
_PRIVATE_KEY = re.compile(r"(?s)(-----BEGIN [A-Z ]*PRIVATE KEY-----).*?(?=-----END|$)")
# And so does the key that the hosts of a fan-out share.
_SHARED_KEY = re.compile(r"(BACKHAUL-SHARED-KEY-1\s+)[A-Za-z0-9+/=_-]+")
_PASS_SOURCE = re.compile(r"\b(pass:)\S+")
_OPTION = re.compile(rf"(?i)--?{_NAME}")
_SPACED_OPTION = re.compile(rf"(?i)((?<!\S)--?[\w.-]{{0,60}}?{_WORD}\s+)('[^']*'|\"[^\"]*\"|[^\s&;|]+)")

# Programs whose short options take a secret: (program, option). A value may follow at once or as the next word.
_SHORT_OPTIONS = (
    (r"(?:mysql|mariadb)[\w-]*", "-p", False),
    (r"redis-cli", "-a", True),
    (r"sshpass", "-p", True),
    (r"mongo(?:dump|restore|export|import|sh)?", "-p", True),
    (r"openssl|gpg|7z|zip", "-k", True),
    (r"curl", "-u", True),
    (r"curl", "--user", True),
    (r"curl", "-U", True),
)
# Oracle's programs take user/secret@where as a plain word.
_ORACLE = re.compile(r"(?:sqlplus|expdp|impdp|exp|imp)")
_ORACLE_LOGIN = re.compile(r"(\w+/)[^\s@]+(?=@|$)")


def is_secret_name(name: str) -> bool:
    """Tell whether an option or variable of that name probably holds a secret (and no file's name)."""
    return re.fullmatch(rf"(?i){_NAME}", name) is not None and not name.lower().endswith(("_file", "_id", "_path"))


def redact_identities(text: str) -> str:
    """Mask age identities and private keys, which say themselves what they are: in anything, whoever put them there."""
    text = _SHARED_KEY.sub(rf"\g<1>{MASK}", text)
    return _AGE_IDENTITY.sub(rf"\g<1>{MASK}", _PRIVATE_KEY.sub(rf"\g<1>{MASK}", text))


def redact_text(text: str) -> str:
    """Mask the secrets that a line of shell or a message may hold."""
    text = _URL_PASSWORD.sub(rf"\g<1>{MASK}", text)
    text = _AUTHORIZATION.sub(rf"\g<1>{MASK}", text)
    text = _PASS_SOURCE.sub(rf"\g<1>{MASK}", text)
    text = redact_identities(text)
    text = _ASSIGNMENT.sub(rf"\g<1>{MASK}", text)
    text = _SPACED_OPTION.sub(rf"\g<1>{MASK}", text)
    for program, option, spaced in _SHORT_OPTIONS:
        if re.search(rf"(?:^|[\s/;|&(]){program}\b", text):
            gap = r"\s*" if spaced else ""
            text = re.sub(rf"((?<!\S){option}{gap})('[^']*'|\"[^\"]*\"|[^\s=]\S*)", rf"\g<1>{MASK}", text)
    return text


def redact_command(command: Sequence[str]) -> tuple[str, ...]:
    """Mask the secrets of an argument vector, argument by argument.

    Bytes that are no text (surrogates) come out escaped, so that the result can always be written down.
    """
    words = [word.encode(errors="surrogateescape").decode(errors="backslashreplace") for word in command]
    out: list[str] = []
    programs: list[str] = []
    mask_next = False
    for index, word in enumerate(words):
        name = word.rpartition("/")[2]
        if index == 0 or re.fullmatch(r"[a-z][\w-]*", name):
            programs.append(name)
        if mask_next:
            out.append(MASK)
            mask_next = False
            continue
        masked, mask_next = _redact_word(word, programs)
        out.append(masked)
    return tuple(out)


def _redact_word(word: str, programs: list[str]) -> tuple[str, bool]:
    """Return the word, masked, and whether the next one is a secret."""
    for program, option, spaced in _SHORT_OPTIONS:
        if any(re.fullmatch(program, name) for name in programs):
            if word == option:
                return word, spaced
            if word.startswith(option) and not option.startswith("--"):
                return option + MASK, False
    if _OPTION.fullmatch(word):
        return word, True
    if match := _WHOLE_ASSIGNMENT.fullmatch(word):
        return match[1] + MASK, False
    if any(_ORACLE.fullmatch(name) for name in programs):
        word = _ORACLE_LOGIN.sub(rf"\g<1>{MASK}", word)
    return redact_text(word), False
