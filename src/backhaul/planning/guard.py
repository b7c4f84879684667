"""The guard: what stands between a plan and the mirror. Pure: it is told what was found, and says why not."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from backhaul.errors import UsageError
from backhaul.model.mirror import RECYCLE, TOMBSTONE, MirrorRecord, Refusal, SourceRecord, Totals

DEFAULT_FILES, DEFAULT_PERCENT = 10, 10.0


class MaxDelete(msgspec.Struct, frozen=True):
    """How many files a run may delete, or begin to: a number, or a share of those that the mirror holds."""

    files: int | None = None
    percent: float | None = None

    def limit(self, live: int) -> int:
        """Return the number of files, for a mirror that holds that many."""
        if self.files is not None:
            return self.files
        if self.percent is not None:
            return int(live * self.percent / 100)
        return max(DEFAULT_FILES, int(live * DEFAULT_PERCENT / 100))


def parse_max_delete(text: str) -> MaxDelete:
    """Read ``N`` or ``P%``.

    Raises:
        UsageError: it is neither.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)", text.strip(), re.ASCII)
    if match is None or (not match[2] and "." in match[1]) or (match[2] and float(match[1]) > 100):
        raise UsageError(
            f"{text!r} is not a number of deletes", "it is neither a number nor a percentage", "Write e.g. 50 or 20%."
        )
    return MaxDelete(percent=float(match[1])) if match[2] else MaxDelete(files=int(match[1]))


def judge(
    directory: str,
    totals: Totals,
    deletes: Sequence[str],
    max_delete: MaxDelete,
    *,
    record: MirrorRecord | None,
    source: SourceRecord,
    sentinel_missing: str = "",
    vanished_mounts: Sequence[str] = (),
    accept_source: bool = False,
    allow_empty: bool = False,
    counts_live: int | None = None,
    records_lost: bool = False,
    overwrite: bool = False,
) -> tuple[Refusal, ...]:
    """Return why the plan must not be applied; nothing if it may be.

    Args:
        directory: the source, for messages.
        totals: what was found.
        deletes: names that would be tombstoned or recycled, at most some of them.
        max_delete: what the operator allows.
        record: the mirror's own page; None for a new mirror.
        source: where the tree comes from now.
        sentinel_missing: the name of a file that must be there and is not.
        vanished_mounts: directories that were file systems of their own, and are not any more.
        accept_source: the operator says that another source is right.
        allow_empty: the operator says that an empty source is right.
        records_lost: this host knows the mirror, and its records are not there any more.
        overwrite: the operator says that objects which the mirror did not write may be replaced.
        counts_live: files of the copy that counts, while another one is built beside it; None else.
    """
    refusals = []
    shown = tuple(deletes)
    gone, recycled, live = totals.of(TOMBSTONE).files, totals.of(RECYCLE).files, totals.live.files
    if counts_live is not None:
        # The new copy is to take that one's place: what is missing here then is as good as deleted.
        gone, live = max(gone, counts_live - totals.local.files), counts_live
    if sentinel_missing:
        refusals.append(
            Refusal(
                f"{directory} is not the source that was meant",
                f"its sentinel {sentinel_missing} is not there: the disk is probably not mounted",
                "Mount it. If the sentinel was removed on purpose, leave --sentinel out, or make the file again.",
                shown,
            )
        )
    if record is not None and record.source != source and not accept_source:
        before = record.source
        why = (
            f"it was on the file system {before.file_system}, and is on {source.file_system}: is the disk mounted?"
            if (before.host, before.path) == (source.host, source.path)
            else f"this mirror comes from {before.path} on {before.host.split(' ')[0]}"
        )
        refusals.append(
            Refusal(
                f"{directory} is not where this mirror comes from",
                why,
                "Mount the disk, or correct the paths. If the source has moved for good: --accept-source, once.",
                shown,
            )
        )
    if records_lost and not overwrite:
        refusals.append(
            Refusal(
                "The records of this mirror are gone",
                ".backhaul/ was there at the last run, and is not now: what was in the recycler is not known any more",
                "Correct the path, or bring them back. To go on without: --overwrite, once.",
                shown,
            )
        )
    elif record is None and totals.unknown.files and not overwrite:
        refusals.append(
            Refusal(
                f"{totals.unknown.files} objects that this mirror did not write would be replaced",
                "the mirror is new, and objects with other content have names of its files",
                "Look at them: sync --dry-run names them. If that is right: --overwrite, once.",
                shown,
            )
        )
    refusals += [
        Refusal(
            f"{directory}/{mount} is not the file system that it was",
            "it was mounted at the last run, and is not now",
            "Mount it. If it is gone for good: --accept-source, once.",
            shown,
        )
        for mount in vanished_mounts
    ]
    if totals.local.files + totals.excluded.files == 0 and live > 0 and not allow_empty:
        refusals.append(
            Refusal(
                f"{directory} is empty",
                f"the mirror holds {live} files of it",
                "Mount the disk, or correct the path. If it is to be empty: --allow-empty.",
                shown,
            )
        )
    limit = max_delete.limit(live)
    for count, words in ((gone, "are gone here"), (recycled, "would be deleted from the recycler")):
        if count > limit:
            refusals.append(
                Refusal(
                    f"Too much would be deleted: {count} files {words}",
                    f"at most {limit} of {live} may be (--max-delete)",
                    f"Look at the names. If that is right: --max-delete {count}, for this once.",
                    shown,
                )
            )
    return tuple(refusals)
