"""The manifest as JSON: versioned, readable by a person, unknown keys kept, newer majors refused.

``version`` is ``MAJOR.MINOR``. A minor version adds keys that older readers may ignore; a major version
changes what known keys mean.
"""

from __future__ import annotations

from typing import Any

import msgspec

from backhaul.errors import FormatError
from backhaul.formats.names import is_backup_id, object_key, parse_key
from backhaul.model.manifest import Manifest

FORMAT = "backhaul-manifest"
VERSION = "1.3"
_MAJOR = 1
_LONGEST_MAJOR = 9
# A manifest is a page of text; anything larger is not one and is not read into memory.
MAX_SIZE = 64 << 20
# What stands for a MAC while it is computed: as many hexadecimal digits.
NO_MAC = "0" * 64
# What a struct is msgspec finds out at the first decoding, and threads that do so at once can crash the process
# (seen with 0.22): so it is found out here.
msgspec.json.Decoder(Manifest)


def encode(manifest: Manifest) -> bytes:
    """Return the manifest as indented JSON, with the keys that a newer minor version had added."""
    document = to_document(manifest)
    # (Raises UnicodeEncodeError for text that is none; whoever records names from outside has cleaned them.)
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def to_document(manifest: Manifest) -> dict[str, Any]:
    """Return the manifest as plain dictionaries and lists, unknown keys in their places."""
    document: dict[str, Any] = msgspec.to_builtins(manifest)
    document.pop("extra")
    _graft(document, manifest.extra)
    return document


def authenticated_bytes(text: bytes, manifest: Manifest) -> bytes:
    """Return what the MACs of a manifest are of: its own bytes, with zeros for the digits of every MAC.

    So whatever is changed is noticed, be it only white space: no reader need agree with another one on what it means.

    Args:
        text: the manifest as it lies in the store.
        manifest: what it says.
    """
    for stream in manifest.streams:
        if stream.encryption is not None:
            mac = stream.encryption.mac.encode(errors="replace")
            # A string that stands somewhere else too, or is none, is no MAC: then nothing fits.
            if len(mac) == len(NO_MAC) and text.count(mac) == 1:
                text = text.replace(mac, NO_MAC.encode())
    return text


def decode(data: bytes, *, where: str = "manifest.json", expected_id: str | None = None) -> Manifest:
    """Read a manifest.

    Args:
        data: the object's bytes.
        where: the object's name, for messages.
        expected_id: the id of the directory it lies in; a manifest that was moved there by hand is refused.

    Raises:
        FormatError: not JSON, not a manifest, of a newer major version, or of another backup.
    """
    try:
        document = msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"{where} is not a manifest", str(error), _DAMAGED) from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(f"{where} is not a manifest", f'it does not say "format": "{FORMAT}"', _DAMAGED)
    version = document.get("version")
    major = version.partition(".")[0] if isinstance(version, str) else ""
    if not major.isascii() or not major.isdigit() or len(major) > _LONGEST_MAJOR:
        raise FormatError(f"{where} is not a manifest", f"its version is {version!r}", _DAMAGED)
    if int(major) > _MAJOR:
        raise FormatError(
            f"{where} was written by a newer Backhaul",
            f"it is of version {version}, and this program reads up to {_MAJOR}.x",
            "Install a newer Backhaul to read this backup.",
        )
    try:
        manifest = msgspec.convert({key: value for key, value in document.items() if key != "extra"}, Manifest)
    except msgspec.ValidationError as error:
        raise FormatError(f"{where} is not a whole manifest", str(error), _DAMAGED) from error
    if not is_backup_id(manifest.id) or (expected_id is not None and manifest.id != expected_id):
        raise FormatError(
            f"{where} is the manifest of another backup",
            f"it says id {manifest.id!r}" + (f" but lies under {expected_id}" if expected_id else ""),
            _DAMAGED,
        )
    _check_streams(manifest, where)
    known: dict[str, Any] = msgspec.to_builtins(manifest)
    known.pop("extra")
    return msgspec.structs.replace(manifest, extra=_unknown(document, known))


def _check_streams(manifest: Manifest, where: str) -> None:
    """Refuse streams that no push writes: none at all, one name twice, or an object that is not the stream's own.

    Object names become paths: what is not a plain name of the stream's is not looked for.
    """
    names_ = [stream.name for stream in manifest.streams]
    if not names_ or len(set(names_)) != len(names_):
        raise FormatError(f"{where} is not a whole manifest", "it names no stream, or one twice", _DAMAGED)
    for stream in manifest.streams:
        for file in [stream.object, *(segment.object for segment in stream.segments)]:
            key = parse_key(object_key(manifest.id, file))
            if key is None or (key.kind, key.stream) != ("stream", stream.name):
                raise FormatError(
                    f"{where} is not a whole manifest", f"the stream {stream.name!r} has an object {file!r}", _DAMAGED
                )


_DAMAGED = "Use another backup of the series (backhaul list), and look at who else writes to this store."


def _unknown(document: Any, known: Any) -> Any:
    """Return the parts of ``document`` that ``known`` lacks; list items by their index as text."""
    if isinstance(document, list) and isinstance(known, list | tuple):
        pairs: Any = {str(i): (item, known[i]) for i, item in enumerate(document) if i < len(known)}
    elif isinstance(document, dict) and isinstance(known, dict):
        pairs = {key: (value, known[key]) for key, value in document.items() if key in known}
    else:
        return {}
    rest = {key: value for key, value in document.items() if key not in known} if isinstance(document, dict) else {}
    for key, (theirs, ours) in pairs.items():
        inner = _unknown(theirs, ours)
        if inner:
            rest[key] = inner
    return rest


def _graft(document: Any, extra: Any) -> None:
    """Put what ``_unknown`` took out back in its places."""
    for key, value in extra.items():
        if isinstance(document, list | tuple):
            _graft(document[int(key)], value)
        elif key in document:
            _graft(document[key], value)
        else:
            document[key] = value
