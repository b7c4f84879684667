"""What dead runs left in a series, and what of it may go."""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from backhaul.formats.names import parse_key
from backhaul.model.objects import StoredObject, UnfinishedUpload
from backhaul.model.results import CleanAction


def plan_clean(
    objects: Iterable[StoredObject],
    uploads: Iterable[UnfinishedUpload],
    *,
    now: dt.datetime,
    older_than: float,
) -> tuple[list[CleanAction], list[CleanAction]]:
    """Decide what to remove and what to keep, each with its reason.

    Only names that Backhaul itself writes are considered; whatever else lies in the series is other
    people's. A backup's leftovers are as young as the youngest of them: a run that still uploads
    keeps all of its own.

    Args:
        objects: everything listed under the series.
        uploads: every unfinished upload under the series.
        now: the present (aware).
        older_than: seconds without activity after which a run counts as dead.

    Returns:
        What to remove and what to keep. Uploads come before objects, so that a clean that dies halfway
        never leaves a claim gone while its upload is still there.
    """
    named = [(entry, name) for entry in objects if (name := parse_key(entry.key)) is not None]
    named_uploads = [(entry, name) for entry in uploads if (name := parse_key(entry.upload.key)) is not None]
    committed = {name.id for _, name in named if name.kind == "manifest"}
    newest: dict[str, dt.datetime] = {}
    for backup, time in [
        *((name.id, entry.modified) for entry, name in named if name.id not in committed or name.kind == "claim"),
        *((name.id, entry.last_activity) for entry, name in named_uploads),
    ]:
        newest[backup] = max(time, newest.get(backup, time))

    remove: list[CleanAction] = []
    keep: list[CleanAction] = []

    def decide(kind: str, key: str, size: int, backup: str, token: str, reason: str) -> None:
        age = (now - newest[backup]).total_seconds()
        dead = age >= older_than
        action = CleanAction(
            kind=kind,
            key=key,
            size=size,
            age_seconds=age,
            token=token,
            reason=reason if dead else "its run may still be alive",
        )
        (remove if dead else keep).append(action)

    for upload, name in named_uploads:
        reason = "unfinished upload beside a committed backup" if name.id in committed else "unfinished upload"
        decide("upload", upload.upload.key, upload.size, name.id, upload.upload.token, reason)
    for entry, name in sorted(named, key=lambda pair: (pair[1].kind == "claim", pair[0].key)):
        if name.id not in committed:
            decide("object", entry.key, entry.size, name.id, "", "no manifest: its run died before it committed")
        elif name.kind == "claim":
            decide(
                "object",
                entry.key,
                entry.size,
                name.id,
                "",
                "the claim of a run that died after it committed",
            )
    return remove, keep
